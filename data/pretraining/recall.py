"""Associative recall, an exercise for the backbone (as in arXiv 2312.04927): pairs of words, then
the same pairs in another order, of which one word has to be recalled.

To find the letter that stands before a choice is the same task, and learned from texts alone it
takes many times longer.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.pretraining.config import PretrainConfig
from data.pretraining.texts import LETTERS, TextExample
from diffa2_mini.tokenizer import Tokenizer


@dataclass(frozen=True)
class RecallExercise:
    """The words [n] to draw pairs from, and the tokens beside them. n is at least two for each of
    `config.recall_pairs`."""

    words: Tensor
    separator: int
    mask_id: int
    config: PretrainConfig
    generator: torch.Generator

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of words [B, n, 2], the same pairs in another order [B, n, 2], and which word of
        these to recall, 0 or 1 [B, n]."""
        B, n = self.config.backbone_batch, self.config.recall_pairs
        device = self.words.device

        def shuffled(k: int) -> Tensor:
            """B random orders of k things: [B, k]."""
            return torch.rand(B, k, generator=self.generator).argsort(1).to(device)

        pairs = self.words[shuffled(len(self.words))[:, :2 * n]].view(B, n, 2)
        asked = pairs.gather(1, shuffled(n)[:, :, None].expand(-1, -1, 2))  # [B, n, 2]
        which = torch.randint(0, 2, (B, n), generator=self.generator)
        return pairs, asked, which.to(device)


def exercise_on(examples: Iterable[TextExample], tokenizer: Tokenizer, config: PretrainConfig,
                generator: torch.Generator, device: torch.device) -> RecallExercise:
    """The exercise on all words that describe some examples, and the letters of choices."""
    words = {word for example in examples for word in example.words()}
    ids = {token for word in words for token in tokenizer.encode(f" {word}")}
    ids |= {tokenizer.encode(letter)[0] for letter in LETTERS}
    return RecallExercise(torch.tensor(sorted(ids), device=device), tokenizer.encode("\n")[0],
                          tokenizer.mask_id, config, generator)
