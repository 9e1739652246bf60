"""How good the answers are: exact match by type of question, right letters, word error rate.

An open question is right if the answer is the target, word for word. A lettered one is right if its letter is. Speech
recognition is also measured by corpus word error rate: (substitutions + deletions + insertions) / reference words.
"""

from dataclasses import dataclass, field
from typing import Callable

import numpy as np
import torch

from .config import DecodeConfig
from .data import Example
from .decode import generate
from .ears import Ears
from .model import Diffa2, Reader
from .tokenizer import Tokenizer


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Edits that turn the hypothesis into the reference, counted in words, and the words of the reference."""
    truth, guess = reference.split(), hypothesis.split()
    row = np.arange(len(guess) + 1)  # edits from the first 0 ... n words of the guess to no word of the truth
    for i, word in enumerate(truth, start=1):
        previous, row = row, np.empty_like(row)
        row[0] = i
        for j, other in enumerate(guess, start=1):
            row[j] = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (word != other))
    return int(row[-1]), len(truth)


@torch.no_grad()
def answer(model: Diffa2, tokenizer: Tokenizer, ears: Ears, examples: list[Example], parts: tuple[str, ...],
           decode: DecodeConfig, batch_size: int = 64, progress: Callable = iter) -> tuple[list[str], int]:
    """The model's answers, in the order of the examples, and how many forward passes they took in all."""
    answers, n_steps = [], 0
    for start in progress(range(0, len(examples), batch_size)):
        batch = examples[start:start + batch_size]
        heard = model.hear(ears([example.path for example in batch]), parts)
        prompts = [tokenizer.prompt(model.config.text.system, example.instruction) for example in batch]
        reader = Reader(model, heard, prompts, [decode.gen_length] * len(batch), tokenizer.mask_id)
        for step in generate(reader, decode, tokenizer.eos_id):
            tokens, n_steps = step.tokens, n_steps + 1
        answers += [tokenizer.decode(row) for row in tokens.tolist()]
    return answers, n_steps


def is_right(example: Example, answer: str) -> bool:
    """Whether the answer is the target; of a lettered question, whether its letter is."""
    if example.type.endswith("+abcd"):
        return answer[:1] == example.answer[:1]
    return answer == example.answer


@dataclass
class Report:
    """Accuracy by (domain, type), and the figures that sum it up."""

    accuracy: dict[tuple[str, str], float]
    count: dict[tuple[str, str], int]
    figures: dict[str, float] = field(default_factory=dict)


def report(examples: list[Example], answers: list[str]) -> Report:
    """Score answers. `open`, `lettered` and `caption` are means over types, `overall` is the mean over questions."""
    hits = {}
    for example, text in zip(examples, answers, strict=True):
        hits.setdefault((example.domain, example.type), []).append(is_right(example, text))
    accuracy = {key: float(np.mean(values)) for key, values in sorted(hits.items())}
    groups = {
        "open": [a for (_, type), a in accuracy.items() if not type.endswith("+abcd")],
        "lettered": [a for (_, type), a in accuracy.items() if type.endswith("+abcd")],
        "caption": [a for (_, type), a in accuracy.items() if type == "caption"],
    }
    figures = {name: float(np.mean(values)) for name, values in groups.items() if values}
    figures["overall"] = float(np.mean(sum(hits.values(), [])))
    figures["worst_open"] = min(groups["open"], default=float("nan"))
    errors = [word_errors(example.answer, text) for example, text in zip(examples, answers) if example.type == "asr"]
    if errors:
        figures["wer"] = sum(e for e, _ in errors) / sum(n for _, n in errors)
    return Report(accuracy, {key: len(values) for key, values in hits.items()}, figures)


def table(result: Report) -> str:
    """The report as text: a line per type of question, a column per domain, and the figures below."""
    domains = sorted({domain for domain, _ in result.accuracy})
    types = sorted({type for _, type in result.accuracy}, key=lambda type: (type.endswith("+abcd"), type))
    lines = ["".join([f"{'question':14}", *(f"{domain:>10}" for domain in domains)])]
    for type in types:
        cells = [result.accuracy.get((domain, type)) for domain in domains]
        lines.append("".join([f"{type:14}", *(f"{'' if cell is None else f'{cell:.2f}':>10}" for cell in cells)]))
    figures = ", ".join(f"{name} {value:.3f}" for name, value in result.figures.items())
    return "\n".join([*lines, f"{sum(result.count.values())} questions: {figures}"])
