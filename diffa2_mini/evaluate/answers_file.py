"""The file of a model's answers, so that a run that was stopped goes on.

Each answer is a line of JSON, written as soon as it is there. It has the published fields of its
question, with the choices in the order in which they were shown, and the reply under `response`:
what the benchmarks' own scripts read. Answers made elsewhere are read too.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from ..data import read_manifest
from ..errors import UserError, require
from ..training.files import append, digest_of, write_whole
from .answers import Answer
from .benchmarks import BenchmarkQuestion, choices_of, id_of, numbered

PREDICTIONS = ("response", "model_prediction", "model_output", "answer_prediction")
START = '{"benchmark": '  # of a line that we wrote
FOUND = ("error", "cut", "incomplete")  # what is wrong with a clip, as an Answer has it
OURS = ("benchmark", "by", "prompt_sha256", "clip_sha256", "id", *FOUND)  # not published


def asked(benchmark: str, by: str, question: BenchmarkQuestion) -> dict[str, str | None]:
    """What an answer depends on. `by` tells which model answers, and how; prompt and clip count by
    their contents. A clip that cannot be read has none."""
    prompt, clip = hashlib.sha256(question.prompt.encode()).hexdigest(), None
    with suppress(OSError):
        if question.audio is not None and question.audio.is_file():
            clip = digest_of(question.audio)
    return {"benchmark": benchmark, "by": by, "prompt_sha256": prompt, "clip_sha256": clip}


def to_line(benchmark: str, by: str, question: BenchmarkQuestion, answer: Answer) -> str:
    """A line of the file: what the answer depends on, the published fields, and the answer."""
    published = {name: value for name, value in question.row.items() if name not in OURS}
    row = {"benchmark": benchmark, "by": by, "id": question.id} | published
    row |= {"response": answer.reply} | asked(benchmark, by, question)
    row |= {name: getattr(answer, name) for name in FOUND if getattr(answer, name)}
    return json.dumps(row, ensure_ascii=False) + "\n"


def answer_in(row: dict) -> Answer | None:
    """The answer in a line, under any of the PREDICTIONS; None if there is none."""
    name = next((name for name in PREDICTIONS if row.get(name) is not None), None)
    if name is None:
        return None
    require(isinstance(row[name], (str, int, float)),
            f"expected text under {name}, got {type(row[name]).__name__}")
    reply, error = str(row[name]), str(row.get("error") or "")
    return Answer(reply, "" if reply else error, bool(row.get("cut")),
                  str(row.get("incomplete") or ""))


def expect_same_question(row: dict, question: BenchmarkQuestion) -> None:
    """Raise UserError if the row was asked another question, or with other choices."""
    text, choices = str(question.row.get("question", "")).strip(), choices_of(row)
    require(text in str(row.get("question", text)) and choices in ([], [*question.choices]),
            f"{question.id} was asked another question, or other choices, or in another order; "
            "check --benchmark, --file and --shuffle-options")


def traits(row: dict) -> list[str]:
    """What an answer depends on, as a line tells it."""
    names = ("benchmark", "prompt_sha256", "clip_sha256")
    return [*str(row.get("by")).split(", "), *(f"{name} {row.get(name)}" for name in names)]


def expect_same_run(row: dict, now: dict[str, str | None]) -> None:
    """Raise UserError if an answer depends on other things than it would `now`. A clip that is gone
    since was read, and is not another."""
    was, now = traits(row), traits(row | {name: value for name, value in now.items() if value})
    theirs = ", ".join(each for each in was if each not in now)
    ours = ", ".join(each for each in now if each not in was)
    require(theirs == ours, f"{row['id']} is an answer of {theirs}, this run is {ours}; choose "
                            "another --out, or delete such lines to ask anew")


def match(rows: list[dict], questions: list[BenchmarkQuestion], source: Path,
          benchmark: str = "", by: str = "") -> dict[str, Answer]:
    """The answers in `rows` by the id of their question. Raises UserError if one answers no
    question, one that has been answered already, or one that had another text or other choices; or,
    with `by`, if it depends on other things than it would now."""
    known, answers, seen = {question.id: question for question in questions}, {}, {}
    for i, row in enumerate(rows, start=1):
        try:
            id = numbered(id_of(row), seen)
            require(id in known, f"{id} is not asked (id#2 is the second answer to id); check "
                                 "--benchmark and --file")
            expect_same_question(row, known[id])
            if by:
                expect_same_run(row, asked(benchmark, by, known[id]))
            if found := answer_in(row):
                answers[id] = found
        except UserError as error:
            raise UserError(f"{source}: entry {i}: {error}") from None
    require(answers or by, f"{source}: expected predictions under one of {', '.join(PREDICTIONS)}, "
                           "got none")
    return answers


def resume(path: Path, benchmark: str, by: str,
           questions: list[BenchmarkQuestion]) -> dict[str, Answer]:
    """The answers that a run that was stopped has left in `path`. A line that was not finished is
    taken out of the file, and so are clips that could not be read: they are tried again. Raises
    UserError if the file is another run's, or was asked other things under the same ids, and leaves
    it; and now, not after the first answers, if it cannot be written."""
    append(path, "")
    # a line may end within a letter
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        rows = [json.loads(line) for line in lines]
        ours = all(line[:len(START)] == START[:len(line)] for line in [*lines, rest])
    except ValueError:
        ours = False
    require(ours, f"{path}: expected answers of an earlier run, got another file or a damaged "
                  "line; choose another --out, or delete that line")
    kept = [(line, row) for line, row in zip(lines, rows) if "error" not in row]
    answers = match([row for _, row in kept], questions, path, benchmark, by)
    if rest or len(kept) < len(lines):
        text = "".join(f"{line}\n" for line, _ in kept)
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return answers


def read_answers(path: Path, benchmark: str, alone: bool) -> list[dict]:
    """The entries of a file of answers. Raises UserError if they are another benchmark's; or, where
    they bring their questions themselves (`alone`), if a question is in it twice."""
    rows, asked = read_manifest(path), set()
    for i, row in enumerate(rows, start=1):
        require(isinstance(row, dict),
                f"{path}: expected an object as entry {i}, got {type(row).__name__}")
        theirs = row.get("benchmark", benchmark)
        require(theirs == benchmark, f"{path}: entry {i} answers a question of {theirs}, "
                                     f"not of {benchmark}; check --benchmark")
        names = ("id", "audio_id", "audio_filepath", "question")
        key = json.dumps([row.get(name) for name in names])
        require(not alone or key not in asked,
                f"{path}: entry {i} answers a question that has been answered above; delete one")
        asked.add(key)
    return rows
