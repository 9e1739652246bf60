"""The file of a model's answers, so that a run that was stopped goes on.

Each answer is a line of JSON, written as soon as it is there. It has the published fields of its
question, with the choices in the order in which they were shown, and the reply under `response`:
what the benchmarks' own scripts read. Answers made elsewhere are read too.
"""

import hashlib
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

from ..errors import UserError, require
from ..training.files import append, digest_of, write_whole
from .answers import Answer
from .benchmarks import BenchmarkQuestion, choices_of, id_of, read_questions

PREDICTIONS = ("response", "model_prediction", "model_output", "answer_prediction")
START = '{"benchmark": '  # of a line that we wrote
FOUND = ("error", "cut", "incomplete")  # what is wrong with a clip, as an Answer has it
OURS = ("benchmark", "by", "prompt_sha256", "clip_sha256", "id", *FOUND)  # not published


def asked(question: BenchmarkQuestion) -> dict[str, str | None]:
    """What is asked, by its contents: prompt and clip, None if that is not there."""
    prompt, clip = hashlib.sha256(question.prompt.encode()).hexdigest(), None
    with suppress(OSError):
        if question.audio is not None and question.audio.is_file():
            clip = digest_of(question.audio)
    return {"prompt_sha256": prompt, "clip_sha256": clip}


def to_line(benchmark: str, by: str, question: BenchmarkQuestion, answer: Answer) -> str:
    """A line of the file. `by` tells which model answered, and how."""
    published = {name: value for name, value in question.row.items() if name not in OURS}
    row = {"benchmark": benchmark, "by": by, "id": question.id} | published
    row |= {"response": answer.reply} | asked(question)
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


def expect_same(row: dict, question: BenchmarkQuestion, by: str | None) -> None:
    """Raise UserError if an answer is to another question, or to choices in another order; or, with
    `by`, if it depends on other things than it would now. A clip that is gone since was read, and
    is not another."""
    text, choices = str(question.row.get("question", "")).strip(), choices_of(row)
    require(text in str(row.get("question", text)) and choices in ([], [*question.choices]),
            f"{question.id} was asked another question, or other choices, or in another order; "
            "check --benchmark, --file and --shuffle-options")
    depends = {"by": by} | asked(question) if by else {}
    for name, value in depends.items():
        was, now = str(row.get(name)).split(", "), str(value).split(", ")
        theirs = ", ".join(each for each in was if each not in now)
        ours = ", ".join(each for each in now if each not in was)
        require(value is None or theirs == ours,
                f"{name!r} of {question.id} is {theirs}, this run has {ours}; choose another "
                "--out, or delete such lines to ask anew")


def match(rows: list[dict], questions: list[BenchmarkQuestion], source: Path, benchmark: str,
          by: str | None = None) -> dict[str, Answer]:
    """The answers in `rows` by the id of their question. Raises UserError if one answers no
    question, one that has been answered already, or another than `expect_same` expects."""
    known, answers, seen = {question.id: question for question in questions}, {}, Counter()
    for i, row in enumerate(rows, start=1):
        try:
            id = id_of(row, seen)
            theirs = row.get("benchmark", benchmark)
            require(theirs == benchmark, f"answers a question of {theirs}, not of {benchmark}; "
                                         "check --benchmark")
            require(id in known, f"{id} is not asked (id#2 is the second answer to id); check "
                                 "--benchmark and --file")
            expect_same(row, known[id], by)
            if found := answer_in(row):
                answers[id] = found
        except UserError as error:
            raise UserError(f"{source}: entry {i}: {error}") from None
    require(answers or by, f"{source}: expected predictions under one of {', '.join(PREDICTIONS)}, "
                           "got none")
    return answers


def questions_in(rows: list[dict], source: Path, benchmark: str) -> list[BenchmarkQuestion]:
    """The questions that answers bring along. Raises UserError if one is answered twice."""
    questions = read_questions(benchmark, rows, source)
    keys = Counter((id_of(row, Counter()), question.audio, str(row.get("question")))
                   for row, question in zip(rows, questions))
    twice = [id for (id, *_), n in keys.items() if n > 1]
    require(not twice, f"{source}: a question of {', '.join(twice[:5])} is answered twice; delete "
                       "an answer")
    return questions


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
