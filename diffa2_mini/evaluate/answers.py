"""A model's answers to many questions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..audio import duration
from ..config import DecodeConfig
from ..data import Example
from ..errors import UserError, require
from ..fast.device import autocast
from ..fast.generate import generate_responses
from ..listen import Diffa2
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
    each example is (default: its place in the list). The precision is that of `features`."""
    answers, n_passes, numbers = [], 0, numbers or range(len(examples))
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


def answer_questions(diffa2: Diffa2, features: FeatureCache, decode: DecodeConfig,
                     questions: list[BenchmarkQuestion], numbers: Sequence[int]) -> list[Answer]:
    """Answers to some questions of a benchmark, decoded as a batch; `numbers` tells which of all
    each is. What `features` keeps is dropped afterwards: a long benchmark would fill the memory."""
    found, examples, asked = [], [], []
    for number, question in zip(numbers, questions, strict=True):
        try:
            cut = seconds_of(question) > diffa2.config.audio.max_seconds
            features.get(question.audio)
        except UserError as error:
            found.append(Answer("", str(error)))
            continue
        found.append(Answer("", "", cut, features.incomplete.get(question.audio, "")))
        examples.append(Example(question.audio, question.prompt, question.answer, "", "", ""))
        asked.append(number)
    texts, _ = answer(diffa2.model, diffa2.tokenizer, features, examples, diffa2.parts, decode,
                      len(questions), numbers=asked)
    features.memory.clear()
    replies = iter(texts)
    return [each if each.error else replace(each, reply=next(replies)) for each in found]
