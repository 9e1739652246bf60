"""A model's answers to many questions, and the file that keeps them for a run that goes on.

An answer is a line of JSON with the published fields of its question, the choices as they were
shown, and the reply under `response`: what the benchmarks' own scripts read. Answers made elsewhere
are read too.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ..audio import duration
from ..config import DecodeConfig
from ..data import Example
from ..errors import UserError, require
from ..fast.device import autocast
from ..fast.generate import generate_responses
from ..listen import Diffa2
from ..tokenizer import Tokenizer
from ..training.features import FeatureCache
from ..training.files import append, digest_of, write_whole
from .benchmarks import BenchmarkQuestion, choices_of, id_of, read_questions

AT_ONCE = 8  # questions; with 64 a CPU takes nearly twice as long
PREDICTIONS = ("response", "model_prediction", "model_output", "answer_prediction")
START = b'{"benchmark": '  # of a line that we wrote
OURS = ("benchmark", "by", "id", "prompt_sha256", "clip_sha256", "error", "cut", "incomplete")


@dataclass
class Reply:
    """A model's answer to a question, or why there is none."""

    text: str
    error: str = ""
    cut: bool = False  # the clip was longer than the model takes
    incomplete: str = ""  # what a clip lacks that ends early or is damaged, and was used


@dataclass(frozen=True)
class Respondent:
    """The model of `features`, and how it answers, in their precision."""

    features: FeatureCache
    tokenizer: Tokenizer
    parts: tuple[str, ...]  # what it splices into the prompt
    decode: DecodeConfig
    generate: Callable = generate_responses
    after_batch: Callable[[], None] = lambda: None  # may raise, to end early

    @torch.no_grad()
    def answer(self, examples: list[Example], batch_size: int = AT_ONCE,
               numbers: Sequence[int] | None = None) -> tuple[list[str], int]:
        """Answers, in the order of the examples, and the number of forward passes for all.
        `numbers`: which of all that are asked each example is (default: its place in the list)."""
        answers, n_passes, numbers = [], 0, numbers or range(len(examples))
        features, model, tokenizer = self.features, self.features.model, self.tokenizer
        for start in range(0, len(examples), batch_size):
            batch = examples[start:start + batch_size]
            audio = features([example.path for example in batch])
            prompts = [tokenizer.prompt(model.config.text.system, example.instruction)
                       for example in batch]
            with autocast(features.device, features.dtype):
                embeddings = model.embed_audio(audio, self.parts)
                tokens, n = self.generate(model, tokenizer, embeddings, prompts, self.decode,
                                          numbers[start:start + batch_size])
            answers += [tokenizer.decode(row) for row in tokens.tolist()]
            n_passes += n
            self.after_batch()
        return answers, n_passes


def seconds_of(question: BenchmarkQuestion) -> float:
    """How long the clip is. Raises UserError if there is none, or none that can be read."""
    require(question.audio is not None, "no clip is named")
    return duration(question.audio)


def expect_clips(questions: list[BenchmarkQuestion]) -> None:
    """Raise UserError if not one clip is there: then nothing about the model would be measured."""
    for question in questions:
        try:
            seconds_of(question)
            return
        except UserError as error:
            reason = " ".join(str(error).split())  # one line, whatever is in the names
    raise UserError(f"expected the clips of {len(questions)} questions, found not one that can be "
                    f"read ({reason}); check --audio-root and --file")


def answer_questions(diffa2: Diffa2, decode: DecodeConfig,
                     questions: list[tuple[int, BenchmarkQuestion]]) -> list[Reply]:
    """Answers to questions, each with its number among all of the benchmark, as one batch."""
    features = FeatureCache(diffa2.model, diffa2.device, diffa2.dtype, keep=True)
    answers, examples, clips = {}, {}, {}  # by number, the last by path
    for number, question in questions:
        path = question.audio
        try:
            cut = seconds_of(question) > diffa2.config.audio.max_seconds
            clips[path] = clips.get(path) or features.load(path)
            answers[number] = Reply("", "", cut, features.incomplete.get(path, ""))
            examples[number] = Example(path, question.prompt, question.answer, "", "", "")
        except UserError as error:
            answers[number] = Reply("", str(error))
    if clips:
        features.memory |= zip(clips, features.encode_together([*clips.values()]))
    respondent = Respondent(features, diffa2.tokenizer, diffa2.parts, decode)
    texts, _ = respondent.answer([*examples.values()], len(questions), numbers=[*examples])
    for number, text in zip(examples, texts):
        answers[number].text = text
    return [*answers.values()]


def asked(question: BenchmarkQuestion) -> dict[str, str | None]:
    """What is asked, by its contents: prompt and clip, None if that is not there."""
    prompt, clip = hashlib.sha256(question.prompt.encode()).hexdigest(), None
    with suppress(OSError):
        if question.audio and question.audio.is_file():
            clip = digest_of(question.audio)
    return {"prompt_sha256": prompt, "clip_sha256": clip}


def to_line(benchmark: str, by: str, question: BenchmarkQuestion, reply: Reply) -> str:
    """A line of the file. `by` tells which model answered, and how."""
    published = {name: value for name, value in question.row.items() if name not in OURS}
    row = {"benchmark": benchmark, "by": by, "id": question.id} | published
    row |= {"response": reply.text} | asked(question)
    row |= {name: value for name, value in vars(reply).items() if value and name in OURS}
    return json.dumps(row, ensure_ascii=False) + "\n"


def answer_in(row: dict) -> Reply | None:
    """The answer in a line, under any of the PREDICTIONS; None if there is none."""
    for name in PREDICTIONS:
        if row.get(name) is not None:
            require(isinstance(row[name], (str, int, float)),
                    f"expected text under {name}, got {type(row[name]).__name__}")
            reply, error = str(row[name]), str(row.get("error") or "")
            return Reply(reply, "" if reply else error, bool(row.get("cut")),
                         str(row.get("incomplete") or ""))
    return None


def expect_same(row: dict, question: BenchmarkQuestion, by: str | None) -> None:
    """Raise UserError if an answer is to another question, or to choices in another order; or, with
    `by`, to another prompt or clip or by another model. A clip that is gone is no other clip."""
    text, choices = str(question.row.get("question", "")).strip(), choices_of(row)
    require(text in str(row.get("question", text)) and choices in ([], [*question.choices]),
            f"{question.id} was asked another question, or other choices, or in another order; "
            "check --benchmark, --file and --shuffle-options")
    depends = {"by": by} | asked(question) if by else {}
    for name, value in depends.items():
        was, now = ({*str(each).split(", ")} for each in (row.get(name), value))
        require(value is None or was == now, f"{name!r} of {question.id} is "
                f"{', '.join(sorted(was - now)) or 'plain'}, this run has "
                f"{', '.join(sorted(now - was)) or 'none of it'}; "
                "choose another --out, or delete such lines to ask anew")


def match(rows: list[dict], questions: list[BenchmarkQuestion], source: Path, benchmark: str,
          by: str | None = None) -> dict[str, Reply]:
    """The answers in `rows`, by id. Raises UserError for one to no question, or not to the same."""
    known, answers, seen = {question.id: question for question in questions}, {}, Counter()
    for i, row in enumerate(rows, start=1):
        try:
            id, theirs = id_of(row, seen), row.get("benchmark", benchmark)
            require(theirs == benchmark, f"answers a question of {theirs}, not of {benchmark}")
            require(id in known, f"{id} is not asked (id#2: the second answer to id); check --file")
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
    require(not twice, f"{source}: a question of {', '.join(twice[:5])} is answered twice")
    return questions


def resume(path: Path, benchmark: str, by: str,
           questions: list[BenchmarkQuestion]) -> dict[str, Reply]:
    """The answers that a stopped run has left in `path`. An unfinished line is taken out of the
    file, and so are clips that could not be read, to be tried again. Raises UserError if the file
    is another run's, which stays, or cannot be written."""
    append(path, "")
    *lines, rest = path.read_bytes().split(b"\n")
    try:
        rows = [json.loads(line) for line in lines]
        ours = all(line[:len(START)] == START[:len(line)] for line in [*lines, rest])
    except ValueError:
        ours = False
    require(ours, f"{path}: expected answers of an earlier run, got another file or a damaged "
                  "line; choose another --out, or delete that line")
    kept = [row for row in rows if "error" not in row]
    answers = match(kept, questions, path, benchmark, by)
    if rest or len(kept) < len(rows):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_whole(path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))
    return answers
