"""What the backbone is pretrained on: questions about clips that exist as text alone.

A description of the clip takes the place of the audio embeddings: either as a sentence, or in a
form that resembles what an adapter gives. Nothing of this is in DIFFA-2.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from data.pretraining.config import PretrainConfig
from data.toy import TextExample, text_example
from diffa2_mini.config import Config, TextConfig
from diffa2_mini.model import Diffa2Model
from diffa2_mini.noise import stream
from diffa2_mini.tokenizer import Prompt, Tokenizer
from diffa2_mini.training.loader import leave_process_group, signals_blocked

# draws an example, of the evaluation or not
TextSource = Callable[[np.random.Generator, bool], TextExample]
LETTERS = ("A.", "B.", "C.", "D.")  # of lettered choices
# what stands in the audio's place: at each position one token id, two whose embeddings are summed,
# or none
Description = list[tuple[int, ...]]
SILENCE = ()


@dataclass(frozen=True)
class TextBatch:
    """Examples as the model takes them."""

    audio: Tensor  # [n, 2], the descriptions one after the other: see `pairs_of`
    n_audio: list[int]  # the length A of each description, n in all
    noise: Tensor  # [n, D]
    prompts: list[Prompt]
    response: Tensor  # [B, R]
    valid: Tensor  # bool [B, R], False at padding
    weight: Tensor  # [B, R], how much each token's loss counts

    def to(self, device: torch.device) -> "TextBatch":
        moved = {name: value.to(device) for name, value in vars(self).items()
                 if isinstance(value, Tensor)}
        return replace(self, **moved)

    def audio_embeddings(self, model: Diffa2Model) -> list[Tensor]:
        """What stands in the audio's place, [A, D] each."""
        return embed(model, self.audio, self.n_audio, self.noise)


def ids_of(tokenizer: Tokenizer, words: list[str]) -> list[int]:
    """Token ids of words, one after the other."""
    return [token for word in words for token in tokenizer.encode(f" {word}")]


def as_sentence(tokenizer: Tokenizer, example: TextExample) -> Description:
    """The description as a sentence."""
    return [(token,) for token in ids_of(tokenizer, example.words())]


def like_audio(tokenizer: Tokenizer, example: TextExample, max_silences: int,
               rng: np.random.Generator) -> Description:
    """The description in a form that resembles what an adapter gives. Each trait, and each item
    summed with its ordinal, comes one to five times in a row, followed by up to `max_silences`
    silences."""
    parts = [(token,) for token in ids_of(tokenizer, example.traits)]
    if example.items:
        ordinals, items = (ids_of(tokenizer, words) for words in zip(*example.items))
        parts += zip(items, ordinals)
    rows = []
    for part in parts:
        rows += [part] * rng.integers(1, 6)
        rows += [SILENCE] * rng.integers(0, max_silences + 1)
    return rows


def pairs_of(descriptions: list[Description], vocab_size: int) -> Tensor:
    """Descriptions one after the other, as two ids [n, 2] for each position. Behind the vocabulary
    there is one for silence, and one for nothing."""
    silence, nothing = vocab_size, vocab_size + 1
    return torch.tensor([((*part, nothing) if part else (silence, nothing))[:2]
                         for description in descriptions for part in description])


def embed(model: Diffa2Model, pairs: Tensor, lengths: list[int], noise: Tensor | float = 0.0
          ) -> list[Tensor]:
    """Embeddings [A, D] of descriptions of these `lengths`: those of `pairs` [n, 2], looked up at
    once and summed, and `noise` [n, D]. Silence is the mean of all embeddings, which is no word."""
    weight = model.llada.wte.weight
    silence, nothing = weight.detach().mean(0, keepdim=True), torch.zeros_like(weight[:1])
    table = torch.cat([weight, silence, nothing])
    return list((F.embedding(pairs.to(table.device), table).sum(1) + noise).split(lengths))


def token_weights(response: Tensor, tokenizer: Tokenizer, config: PretrainConfig) -> Tensor:
    """How much each token of `response` [B, R] counts: an EOS after the first less, the letter of a
    choice more."""
    letters = torch.tensor([tokenizer.encode(letter)[0] for letter in LETTERS])
    weight = torch.ones(response.shape)
    weight[torch.isin(response, letters)] = config.letter_weight
    weight[(response == tokenizer.eos_id).long().cumsum(1) > 1] = config.eos_weight
    return weight


@dataclass(frozen=True)
class Texts(Dataset):
    """The batch of each step: new examples, each in either form with the same probability, with
    Gaussian noise. Half of the batches have no system prompt: short ones are faster. In the
    steps after the first `backbone_steps`, descriptions like audio have silences too."""

    config: Config
    pretrain: PretrainConfig
    tokenizer: Tokenizer
    seed: int
    draw: TextSource = text_example

    def __getitem__(self, step: int) -> TextBatch:
        rng, text, llada = stream("texts", self.seed, step), self.config.text, self.config.llada
        max_silences = self.pretrain.silences if step >= self.pretrain.backbone_steps else 0
        system = str(rng.choice(["", text.system, TextConfig.train_system], p=[0.5, 0.3, 0.2]))
        examples = [self.draw(rng, False) for _ in range(self.pretrain.backbone_batch)]
        descriptions = [like_audio(self.tokenizer, example, max_silences, rng)
                        if rng.random() < 0.5 else as_sentence(self.tokenizer, example)
                        for example in examples]
        audio = pairs_of(descriptions, llada.vocab_size)
        noise = self.pretrain.noise * rng.standard_normal((len(audio), llada.width), np.float32)
        prompts = [self.tokenizer.prompt(system, example.instruction) for example in examples]
        rows = [torch.tensor(self.tokenizer.response(example.answer, text.response_multiple))
                for example in examples]
        response = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.eos_id)
        valid = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows],
                             batch_first=True)
        return TextBatch(audio, [len(each) for each in descriptions], torch.from_numpy(noise),
                         prompts, response, valid,
                         token_weights(response, self.tokenizer, self.pretrain))

    def batches(self, steps: range, device: torch.device) -> Iterator[TextBatch]:
        """The batches of some steps, on the device. By default up to eight processes draw them
        ahead for a GPU, which is faster than they are."""
        n_workers = self.pretrain.workers
        if n_workers is None:
            n_workers = min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
        loader = DataLoader(self, batch_size=None, sampler=steps, num_workers=n_workers,
                            generator=torch.Generator(),
                            worker_init_fn=leave_process_group if n_workers else None)
        with signals_blocked():
            drawn = iter(loader)
        return (batch.to(device) for batch in drawn)
