"""What the backbone is pretrained on: questions about clips that exist as text alone.

A description of the clip takes the place of the audio embeddings: either as a sentence, or in a
form that resembles what an adapter gives. Nothing of this is in DIFFA-2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.pretraining.config import PretrainConfig
from diffa2_mini.model import Diffa2Model
from diffa2_mini.tokenizer import Prompt, Tokenizer

LETTERS = ("A.", "B.", "C.", "D.")  # of lettered choices


@dataclass(frozen=True)
class TextExample:
    """A question about a clip, which `traits` and the items with their ordinals describe."""

    traits: list[str]
    items: list[tuple[str, str]]
    type: str
    instruction: str
    answer: str

    def words(self) -> list[str]:
        """The description as a sentence: `speech high voice first three second one`."""
        return [*self.traits, *(word for pair in self.items for word in pair)]


@dataclass(frozen=True)
class TextBatch:
    """Examples as the model takes them."""

    audio_embeddings: list[Tensor]  # [A, D] each
    prompts: list[Prompt]
    response: Tensor  # [B, R]
    valid: Tensor  # bool [B, R], False at padding
    weight: Tensor  # [B, R], how much each token's loss counts


def embed_words(model: Diffa2Model, tokenizer: Tokenizer, words: list[str]) -> Tensor:
    """Embeddings [A, D] of words, one after the other."""
    ids = [token for word in words for token in tokenizer.encode(f" {word}")]
    return model.llada.wte(torch.tensor(ids, device=model.llada.wte.weight.device))


def embed_like_audio(model: Diffa2Model, tokenizer: Tokenizer, example: TextExample,
                     max_silences: int, rng: np.random.Generator) -> Tensor:
    """Embeddings [A, D] that resemble those of an adapter. Each trait, and each item summed with
    its ordinal, comes one to five times in a row, followed by up to `max_silences` times the mean
    of all embeddings, which is no word."""
    parts = embed_words(model, tokenizer, example.traits)
    if example.items:
        ordinals, items = zip(*example.items)
        numbered = (embed_words(model, tokenizer, items)
                    + embed_words(model, tokenizer, ordinals))
        parts = torch.cat([parts, numbered])
    silence = model.llada.wte.weight.detach().mean(0)
    rows = []
    for part in parts:
        rows.append(part.expand(rng.integers(1, 6), -1))
        rows.append(silence.expand(rng.integers(0, max_silences + 1), -1))
    return torch.cat(rows)


def embed_noisily(model: Diffa2Model, tokenizer: Tokenizer, examples: list[TextExample],
                  max_silences: int, config: PretrainConfig,
                  rng: np.random.Generator) -> list[Tensor]:
    """Embeddings [A, D] of each example, in either form with the same probability, with Gaussian
    noise."""
    clean = [embed_like_audio(model, tokenizer, example, max_silences, rng) if rng.random() < 0.5
             else embed_words(model, tokenizer, example.words()) for example in examples]
    noise = [rng.standard_normal(x.shape, dtype=np.float32) for x in clean]
    return [x + config.noise * torch.from_numpy(e).to(x) for x, e in zip(clean, noise)]


def pad_responses(tokenizer: Tokenizer, examples: list[TextExample],
                  multiple: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, R] of the answers, each with EOS up to a multiple of `multiple` tokens, and
    which of them are not the batch's padding [B, R]."""
    rows = [torch.tensor(tokenizer.response(example.answer, multiple)) for example in examples]
    valid = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    return (pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_id),
            pad_sequence(valid, batch_first=True))


def token_weights(response: Tensor, tokenizer: Tokenizer, config: PretrainConfig) -> Tensor:
    """How much each token of `response` [B, R] counts: an EOS after the first less, the letter of a
    choice more."""
    letters = torch.tensor([tokenizer.encode(letter)[0] for letter in LETTERS])
    weight = torch.ones(response.shape, device=response.device)
    weight[torch.isin(response, letters.to(response.device))] = config.letter_weight
    weight[(response == tokenizer.eos_id).long().cumsum(1) > 1] = config.eos_weight
    return weight


def make_batch(model: Diffa2Model, tokenizer: Tokenizer, examples: list[TextExample], system: str,
               audio_embeddings: list[Tensor], config: PretrainConfig) -> TextBatch:
    """A batch of examples whose descriptions are embedded already."""
    response, valid = (x.to(audio_embeddings[0].device) for x in pad_responses(
        tokenizer, examples, model.config.text.response_multiple))
    prompts = [tokenizer.prompt(system, example.instruction) for example in examples]
    return TextBatch(audio_embeddings, prompts, response, valid,
                     token_weights(response, tokenizer, config))


def draw_batch(model: Diffa2Model, tokenizer: Tokenizer, sample: Callable, max_silences: int,
               config: PretrainConfig, rng: np.random.Generator) -> TextBatch:
    """A batch of new examples. Half of the batches have no system prompt: short ones are faster.
    `sample(rng, evaluation)` gives a TextExample."""
    text = model.config.text
    system = str(rng.choice(["", text.system, text.train_system], p=[0.5, 0.3, 0.2]))
    examples = [sample(rng, False) for _ in range(config.backbone_batch)]
    audio_embeddings = embed_noisily(model, tokenizer, examples, max_silences, config, rng)
    return make_batch(model, tokenizer, examples, system, audio_embeddings, config)
