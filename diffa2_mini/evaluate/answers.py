"""A model's answers to many questions; and their file, so that a run that was stopped goes on.

Each answer is a line of JSON, written as soon as it is there. It has the published fields of its
question, with the choices in the order in which they were shown, and the reply under `response`:
what the benchmarks' own scripts read. Answers made elsewhere are read too.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..audio import duration
from ..config import DecodeConfig
from ..data import Example, read_manifest
from ..errors import UserError, require
from ..fast.device import autocast
from ..fast.generate import generate
from ..fast.state import DecodingState
from ..model import Diffa2Model
from ..tokenizer import Prompt, Tokenizer
from ..training.features import FeatureCache
from ..training.files import append, write
from .benchmarks import Question, choices_of, id_of, numbered

PREDICTIONS = ("response", "model_prediction", "model_output", "answer_prediction")
START = '{"benchmark": '  # of a line that we wrote
ASKED = ("prompt_sha256", "clip_sha256")  # what was asked, by its contents
FOUND = ("error", "cut", "incomplete")  # what is wrong with a clip, as an Answer has it
OURS = ("benchmark", "by", *ASKED, "id", *FOUND)  # beside the published fields


@dataclass(frozen=True)
class Answer:
    """A reply to a question, or why there is none. `cut`: the clip was longer than the model hears.
    `incomplete`: what the clip lacks, if it ends early or is damaged and was heard nevertheless."""

    reply: str
    error: str = ""
    cut: bool = False
    incomplete: str = ""


def fill_in(model: Diffa2Model, tokenizer: Tokenizer, audio_embeddings: list[Tensor],
            prompts: list[Prompt], decode: DecodeConfig,
            numbers: Sequence[int] | None = None) -> tuple[Tensor, int]:
    """Answers [B, R] to prompts with what was heard, decoded together, and how many forward passes
    they took. `numbers`: see `generate`."""
    state, n_steps = DecodingState(model, audio_embeddings, prompts,
                                   [decode.gen_length] * len(prompts), tokenizer.mask_id), 0
    for step in generate(state, decode, tokenizer.eos_id, numbers=numbers):
        tokens, n_steps = step.tokens, n_steps + 1
    return tokens, n_steps * decode.passes_per_step


@torch.no_grad()
def answer(model: Diffa2Model, tokenizer: Tokenizer, features: FeatureCache,
           examples: list[Example], parts: tuple[str, ...], decode: DecodeConfig,
           batch_size: int = 64, respond: Callable = fill_in,
           numbers: Sequence[int] | None = None) -> tuple[list[str], int]:
    """The model's answers, in the order of the examples, and how many forward passes they took in
    all. `respond` makes them, as `fill_in` does. `numbers` tells which of all that are asked each
    example is (default: its place in the list). The model computes in the precision of the `ears`,
    and the log-mel in float32 whatever that is."""
    answers, n_passes = [], 0
    numbers = range(len(examples)) if numbers is None else numbers
    for start in range(0, len(examples), batch_size):
        batch = examples[start:start + batch_size]
        audio = features([example.path for example in batch])
        prompts = [
            tokenizer.prompt(model.config.text.system, example.instruction) for example in batch]
        with autocast(features.device, features.dtype):
            tokens, n = respond(model, tokenizer, model.embed_audio(audio, parts), prompts, decode,
                                numbers[start:start + batch_size])
        answers += [tokenizer.decode(row) for row in tokens.tolist()]
        n_passes += n
    return answers, n_passes


def seconds_of(question: Question) -> float:
    """How long the clip is. Raises UserError if there is none, or none that can be read."""
    require(question.audio is not None, "no clip is named")
    return duration(question.audio)


def expect_clips(questions: list[Question]) -> None:
    """Raise UserError if not one clip is there: then nothing about the model would be measured."""
    errors = []
    for question in questions:
        try:
            seconds_of(question)
            return
        except UserError as error:
            errors.append(" ".join(str(error).split()))  # one line, whatever is in the names
    raise UserError(f"expected the clips of {len(errors)} questions, found not one that can be "
                    f"heard ({errors[0]}); check --audio-root and --file")


def expect_replies(questions: list[Question], answers: dict[str, Answer]) -> None:
    """Raise UserError if not one question has a reply: then there is nothing to score."""
    found = [answers[question.id] for question in questions if question.id in answers]
    errors = [" ".join(answer.error.split()) for answer in found if answer.error]
    require(len(errors) < len(found), f"expected replies to {len(questions)} questions, got none"
                                      + (f" ({errors[0]})" if errors else ""))


def answer_batch(model: Diffa2Model, tokenizer: Tokenizer, features: FeatureCache,
                 questions: list[Question], parts: tuple[str, ...], decode: DecodeConfig,
                 numbers: Sequence[int]) -> list[Answer]:
    """Answers to some questions, which are asked together; `numbers` tells which of the benchmark's
    each is. `ears` keep what they hear; here it is forgotten afterwards."""
    errors, long, examples, asked = {}, set(), [], []
    for number, question in zip(numbers, questions, strict=True):
        try:
            if seconds_of(question) > model.config.audio.max_seconds:
                long.add(question.id)
            features.listen(question.audio)
            examples.append(Example(question.audio, question.prompt, question.answer, "", "", ""))
            asked.append(number)
        except UserError as error:
            errors[question.id] = str(error)
    texts = iter(answer(model, tokenizer, features, examples, parts, decode, len(questions),
                        numbers=asked)[0])
    features.kept.clear()  # the clips of a long benchmark would fill the memory
    return [Answer("", errors[q.id]) if q.id in errors else
            Answer(next(texts), cut=q.id in long, incomplete=features.incomplete.get(q.audio, ""))
            for q in questions]


# ----------------------------------------------------------------------------------------- the file


def contents(path: Path | None) -> str | None:
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


def to_line(benchmark: str, by: str, question: Question, answer: Answer) -> str:
    """A line of the file. `by` tells which model answered, and how; the ASKED tell what."""
    published = {name: value for name, value in question.row.items() if name not in OURS}
    row = {"benchmark": benchmark, "by": by, "id": question.id} | published
    row |= {"response": answer.reply}
    row |= dict(zip(ASKED, (text_sha256(question.prompt), contents(question.audio))))
    row |= {name: getattr(answer, name) for name in FOUND if getattr(answer, name)}
    return json.dumps(row, ensure_ascii=False) + "\n"


def answer_in(row: dict) -> Answer | None:
    """The answer in a line, under any of the PREDICTIONS; None if there is none."""
    name = next((name for name in PREDICTIONS if row.get(name) is not None), None)
    require(name is None or isinstance(row[name], (str, int, float)),
            f"expected text under {name}, got another thing")
    reply = name and str(row[name])
    error, incomplete = (str(row.get(name) or "") for name in ("error", "incomplete"))
    return name and Answer(reply, "" if reply else error, bool(row.get("cut")), incomplete)


def match(rows: list[dict], questions: list[Question], source: Path) -> dict[str, Answer]:
    """The answers in `rows` by the id of their question. Raises UserError if one answers no
    question, one that has been answered already, or one that had another text or its choices in
    another order."""
    known, answers, seen, strange = {question.id: question for question in questions}, {}, {}, []
    for i, row in enumerate(rows, start=1):
        try:
            id = numbered(id_of(row), seen)
            found = answer_in(row)
        except UserError as error:
            raise UserError(f"{source}: entry {i} is no answer: {error}") from None
        answers |= {id: found} if found else {}
        if id not in known:
            strange.append(id)
            continue
        question = known[id].row.get("question")
        require(question is None or str(question).strip() in str(row.get("question", question)),
                f"{source}: entry {i} ({id}) was asked another question than it is now; check "
                "--benchmark and --file")
        if choices_of(row):
            same = sorted(choices_of(row)) == sorted(known[id].choices)
            require(
                same,
                f"{source}: entry {i} ({id}) was asked with other choices; check --benchmark and --file"
            )
            require(tuple(choices_of(row)) == known[id].choices,
                    f"{source}: entry {i} ({id}) was asked with its choices in "
                    "another order; give the --shuffle-options that it was asked with")
    listed = ", ".join(strange[:5]) + (f" and {len(strange) - 5} more" if len(strange) > 5 else "")
    require(
        not strange,
        f"{source}: expected an answer to each question of the benchmark, got one to {listed}, which is not "
        "asked (id#2 is the second answer to id); check --benchmark and --file")
    require(
        answers,
        f"{source}: expected predictions under {', '.join(PREDICTIONS[:-1])} or {PREDICTIONS[-1]}, got none"
    )
    return answers


def expect_same_run(rows: list[dict], benchmark: str, by: str, path: Path) -> None:
    """Raise UserError unless all lines of a file are answers to this benchmark, by this model."""
    old = any(name not in row for row in rows for name in ASKED)
    require(not old, f"{path}: holds answers of an earlier version, which did not note the "
                     "contents of prompts and clips; choose another --out")
    for name, now in (("benchmark", benchmark), ("by", by)):
        other = next((str(row.get(name)) for row in rows if row.get(name) != now), now)
        then, here = other.split(", "), now.split(", ")
        differing = ", ".join(word for word in then if word not in here) or other
        require(other == now, f"{path}: holds answers of {differing}, this run is "
                              f"{', '.join(word for word in here if word not in then) or now}; "
                              "choose another --out")


def expect_same_questions(rows: list[dict], questions: list[Question], path: Path) -> None:
    """Raise UserError unless the lines of a file were asked what their questions ask now, about the
    same clips. A clip that is gone since was heard, and is not another."""
    known, clips, changed = {question.id: question for question in questions}, {}, []
    for row in rows:
        question = known[row["id"]]
        if question.audio not in clips:
            clips[question.audio] = contents(question.audio)
        if row["prompt_sha256"] != text_sha256(question.prompt):
            changed.append(f"{question.id} (another prompt)")
        elif clips[question.audio] not in (None, row["clip_sha256"]):
            changed.append(f"{question.id} (another clip under the same name)")
    listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
    require(not changed, f"{path}: what was asked has changed since: {listed}; delete these lines "
                         "to ask anew, or choose another --out")


def resume(path: Path, benchmark: str, by: str, questions: list[Question]) -> dict[str, Answer]:
    """The answers that a run that was stopped has left in `path`. A line that was not finished is
    taken out of the file, and so are clips that could not be heard: they are tried again. Raises
    UserError if the file is another run's, or was asked other things under the same ids, and leaves
    it; and now, not after the first answers, if it cannot be written."""
    append(path, "")
    try:
        # a line may end within a letter
        *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(
            f"{path}: could not be read ({error.strerror}); choose another --out") from None
    ours = all(line.startswith(START)
               for line in lines) and (rest.startswith(START) or START.startswith(rest))
    require(ours,
            f"{path}: expected answers of an earlier run, got another file; choose another --out")
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError:
        raise UserError(
            f"{path}: a line of it is damaged; delete that line, or choose another --out") from None
    expect_same_run(rows, benchmark, by, path)
    answers = match(rows, questions, path) if rows else {}
    expect_same_questions([row for row in rows if "error" not in row], questions, path)
    kept = [line for line, row in zip(lines, rows) if "error" not in row]
    if rest or len(kept) < len(lines):
        write(path,
              lambda temporary: temporary.write_text("".join(f"{line}\n"
                                                             for line in kept), encoding="utf-8"))
    return {id: answer for id, answer in answers.items() if not answer.error}


def read_answers(path: Path, benchmark: str, alone: bool) -> list[dict]:
    """The entries of a file of answers. Raises UserError if they are another benchmark's; or, where
    they bring their questions themselves (`alone`), if a question is in it twice."""
    rows, asked = read_manifest(path), set()
    for i, row in enumerate(rows, start=1):
        require(isinstance(row, dict),
                f"{path}: expected an object as entry {i}, got {type(row).__name__}")
        require(
            row.get("benchmark", benchmark) == benchmark,
            f"{path}: entry {i} answers a question of {row.get('benchmark')}, not of {benchmark}; check --benchmark"
        )
        key = json.dumps(
            [row.get(name) for name in ("id", "audio_id", "audio_filepath", "question")])
        require(not alone or key not in asked,
                f"{path}: entry {i} answers a question that has been answered above; delete one")
        asked.add(key)
    return rows
