"""A model's answers to many questions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..audio import duration
from ..config import DecodeConfig
from ..data import Example
from ..errors import UserError, require
from ..fast.device import autocast
from ..fast.generate import generate_responses
from ..model import Diffa2Model
from ..tokenizer import Tokenizer
from ..training.features import FeatureCache
from .benchmarks import BenchmarkQuestion


@dataclass(frozen=True)
class Answer:
    """A reply to a question, or why there is none. `cut`: the clip was longer than the model takes.
    `incomplete`: what the clip lacks, if it ends early or is damaged and was used nevertheless."""

    reply: str
    error: str = ""
    cut: bool = False
    incomplete: str = ""


@torch.no_grad()
def answer(model: Diffa2Model, tokenizer: Tokenizer, features: FeatureCache,
           examples: list[Example], parts: tuple[str, ...], decode: DecodeConfig,
           batch_size: int = 64, respond: Callable = generate_responses,
           numbers: Sequence[int] | None = None) -> tuple[list[str], int]:
    """The model's answers, in the order of the examples, and the number of forward passes for all.
    `respond` decodes them, as `generate_responses` does. `numbers`: which of all that are asked
    each example is (default: its place in the list). The model computes in the precision of
    `features`, and the log-mel in float32 whatever that is."""
    answers, n_passes = [], 0
    numbers = range(len(examples)) if numbers is None else numbers
    for start in range(0, len(examples), batch_size):
        batch = examples[start:start + batch_size]
        audio = features([example.path for example in batch])
        prompts = [tokenizer.prompt(model.config.text.system, example.instruction)
                   for example in batch]
        with autocast(features.device, features.dtype):
            tokens, n = respond(model, tokenizer, model.embed_audio(audio, parts), prompts, decode,
                                numbers[start:start + batch_size])
        answers += [tokenizer.decode(row) for row in tokens.tolist()]
        n_passes += n
    return answers, n_passes


# ------------------------------------------------------------------------- questions of a benchmark


def seconds_of(question: BenchmarkQuestion) -> float:
    """How long the clip is. Raises UserError if there is none, or none that can be read."""
    require(question.audio is not None, "no clip is named")
    return duration(question.audio)


def expect_clips(questions: list[BenchmarkQuestion]) -> None:
    """Raise UserError if not one clip is there: then nothing about the model would be measured."""
    errors = []
    for question in questions:
        try:
            seconds_of(question)
            return
        except UserError as error:
            errors.append(" ".join(str(error).split()))  # one line, whatever is in the names
    raise UserError(f"expected the clips of {len(errors)} questions, found not one that can be "
                    f"read ({errors[0]}); check --audio-root and --file")


def expect_replies(questions: list[BenchmarkQuestion], answers: dict[str, Answer]) -> None:
    """Raise UserError if not one question has a reply: then there is nothing to score."""
    found = [answers[question.id] for question in questions if question.id in answers]
    errors = [" ".join(answer.error.split()) for answer in found if answer.error]
    reason = f" ({errors[0]})" if errors else ""
    require(len(errors) < len(found),
            f"expected replies to {len(questions)} questions, got none{reason}")


@dataclass(frozen=True)
class Respondent:
    """A model with all that it needs to answer questions, and how it decodes."""

    model: Diffa2Model
    tokenizer: Tokenizer
    features: FeatureCache
    parts: tuple[str, ...]  # of the audio embeddings
    decode: DecodeConfig

    def answer_together(self, questions: list[BenchmarkQuestion],
                        numbers: Sequence[int]) -> list[Answer]:
        """Answers to some questions, decoded as a batch; `numbers` tells which of the benchmark's
        each is. Hidden states that `features` keeps are dropped afterwards: the clips of a long
        benchmark would fill the memory."""
        errors, long, examples, asked = {}, set(), [], []
        for number, question in zip(numbers, questions, strict=True):
            try:
                if seconds_of(question) > self.model.config.audio.max_seconds:
                    long.add(question.id)
                self.features.get(question.audio)
                examples.append(
                    Example(question.audio, question.prompt, question.answer, "", "", ""))
                asked.append(number)
            except UserError as error:
                errors[question.id] = str(error)
        texts, _ = answer(self.model, self.tokenizer, self.features, examples, self.parts,
                          self.decode, len(questions), numbers=asked)
        self.features.memory.clear()
        left, found = iter(texts), []
        for question in questions:
            if question.id in errors:
                found.append(Answer("", errors[question.id]))
            else:
                found.append(Answer(next(left), cut=question.id in long,
                                    incomplete=self.features.incomplete.get(question.audio, "")))
        return found
