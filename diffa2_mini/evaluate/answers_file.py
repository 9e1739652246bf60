"""The file of a model's answers, so that a run that was stopped goes on.

Each answer is a line of JSON, written as soon as it is there. It has the published fields of its
question, with the choices in the order in which they were shown, and the reply under `response`:
what the benchmarks' own scripts read. Answers made elsewhere are read too.
"""

import hashlib
import json
from pathlib import Path

from ..data import read_manifest
from ..errors import UserError, require
from ..training.files import append, write_whole
from .answers import Answer
from .benchmarks import BenchmarkQuestion, choices_of, id_of, numbered

PREDICTIONS = ("response", "model_prediction", "model_output", "answer_prediction")
START = '{"benchmark": '  # of a line that we wrote
ASKED = ("prompt_sha256", "clip_sha256")  # what was asked, by its contents
FOUND = ("error", "cut", "incomplete")  # what is wrong with a clip, as an Answer has it
OURS = ("benchmark", "by", *ASKED, "id", *FOUND)  # beside the published fields


def first_few(names: list[str]) -> str:
    """Five of the names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


# --------------------------------------------------------------------------------------- writing


def file_sha256(path: Path | None) -> str | None:
    """SHA-256 of a file; None where there is none to read."""
    found = hashlib.sha256()
    try:
        if path is None or not path.is_file():
            return None
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                found.update(piece)
    except OSError:
        return None
    return found.hexdigest()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def to_line(benchmark: str, by: str, question: BenchmarkQuestion, answer: Answer) -> str:
    """A line of the file. `by` tells which model answered, and how; the ASKED tell what."""
    published = {name: value for name, value in question.row.items() if name not in OURS}
    row = {"benchmark": benchmark, "by": by, "id": question.id} | published
    row |= {"response": answer.reply, "prompt_sha256": text_sha256(question.prompt),
            "clip_sha256": file_sha256(question.audio)}
    row |= {name: getattr(answer, name) for name in FOUND if getattr(answer, name)}
    return json.dumps(row, ensure_ascii=False) + "\n"


# --------------------------------------------------------------------------------------- reading


def answer_in(row: dict) -> Answer | None:
    """The answer in a line, under any of the PREDICTIONS; None if there is none."""
    name = next((name for name in PREDICTIONS if row.get(name) is not None), None)
    if name is None:
        return None
    require(isinstance(row[name], (str, int, float)),
            f"expected text under {name}, got another thing")
    reply = str(row[name])
    error, incomplete = (str(row.get(name) or "") for name in ("error", "incomplete"))
    return Answer(reply, "" if reply else error, bool(row.get("cut")), incomplete)


def expect_same_question(row: dict, question: BenchmarkQuestion, where: str) -> None:
    """Raise UserError if the row was asked another question, or with its choices in another
    order."""
    text = question.row.get("question")
    require(text is None or str(text).strip() in str(row.get("question", text)),
            f"{where} was asked another question than it is now; check --benchmark and --file")
    choices = choices_of(row)
    if choices:
        require(sorted(choices) == sorted(question.choices),
                f"{where} was asked with other choices; check --benchmark and --file")
        require(tuple(choices) == question.choices,
                f"{where} was asked with its choices in another order; give the --shuffle-options "
                "that it was asked with")


def match(rows: list[dict], questions: list[BenchmarkQuestion], source: Path) -> dict[str, Answer]:
    """The answers in `rows` by the id of their question. Raises UserError if one answers no
    question, one that has been answered already, or one that had another text or its choices in
    another order."""
    known, answers, seen, unknown = {question.id: question for question in questions}, {}, {}, []
    for i, row in enumerate(rows, start=1):
        try:
            id = numbered(id_of(row), seen)
            found = answer_in(row)
        except UserError as error:
            raise UserError(f"{source}: entry {i} is no answer: {error}") from None
        if found:
            answers[id] = found
        if id in known:
            expect_same_question(row, known[id], f"{source}: entry {i} ({id})")
        else:
            unknown.append(id)
    require(not unknown, f"{source}: expected an answer to each question of the benchmark, got one "
                         f"to {first_few(unknown)}, which is not asked (id#2 is the second answer "
                         "to id); check --benchmark and --file")
    *names, last = PREDICTIONS
    require(answers, f"{source}: expected predictions under {', '.join(names)} or {last}, got none")
    return answers


def expect_same_run(rows: list[dict], benchmark: str, by: str, path: Path) -> None:
    """Raise UserError unless all lines of a file are answers to this benchmark, by this model."""
    old = any(name not in row for row in rows for name in ASKED)
    require(not old, f"{path}: holds answers of an earlier version, which did not note the "
                     "contents of prompts and clips; choose another --out")
    for name, now in (("benchmark", benchmark), ("by", by)):
        other = next((str(row.get(name)) for row in rows if row.get(name) != now), now)
        then, here = other.split(", "), now.split(", ")
        theirs = ", ".join(word for word in then if word not in here) or other
        ours = ", ".join(word for word in here if word not in then) or now
        require(other == now, f"{path}: holds answers of {theirs}, this run is {ours}; "
                              "choose another --out")


def expect_same_inputs(rows: list[dict], questions: list[BenchmarkQuestion], path: Path) -> None:
    """Raise UserError unless the lines of a file had the prompts that their questions have now, and
    the same clips. A clip that is gone since was read, and is not another."""
    known, clips, changed = {question.id: question for question in questions}, {}, []
    for row in rows:
        question = known[row["id"]]
        if question.audio not in clips:
            clips[question.audio] = file_sha256(question.audio)
        if row["prompt_sha256"] != text_sha256(question.prompt):
            changed.append(f"{question.id} (another prompt)")
        elif clips[question.audio] not in (None, row["clip_sha256"]):
            changed.append(f"{question.id} (another clip under the same name)")
    require(not changed, f"{path}: what was asked has changed since: {first_few(changed)}; delete "
                         "these lines to ask anew, or choose another --out")


def read_lines(path: Path) -> tuple[list[str], list[dict], str]:
    """The lines of our file, what they say, and the beginning of a line that was not finished.
    Raises UserError if the file is not ours, or damaged."""
    try:
        # a line may end within a letter
        *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(
            f"{path}: could not be read ({error.strerror}); choose another --out") from None
    ours = all(line.startswith(START) for line in lines)
    ours = ours and (rest.startswith(START) or START.startswith(rest))
    require(ours,
            f"{path}: expected answers of an earlier run, got another file; choose another --out")
    try:
        return lines, [json.loads(line) for line in lines], rest
    except ValueError:
        raise UserError(
            f"{path}: a line of it is damaged; delete that line, or choose another --out") from None


def resume(path: Path, benchmark: str, by: str,
           questions: list[BenchmarkQuestion]) -> dict[str, Answer]:
    """The answers that a run that was stopped has left in `path`. A line that was not finished is
    taken out of the file, and so are clips that could not be read: they are tried again. Raises
    UserError if the file is another run's, or was asked other things under the same ids, and leaves
    it; and now, not after the first answers, if it cannot be written."""
    append(path, "")
    lines, rows, rest = read_lines(path)
    expect_same_run(rows, benchmark, by, path)
    answers = match(rows, questions, path) if rows else {}
    expect_same_inputs([row for row in rows if "error" not in row], questions, path)
    kept = [line for line, row in zip(lines, rows) if "error" not in row]
    if rest or len(kept) < len(lines):
        text = "".join(f"{line}\n" for line in kept)
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return {id: answer for id, answer in answers.items() if not answer.error}


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
