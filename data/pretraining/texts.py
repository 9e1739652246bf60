"""What the backbone is pretrained on: questions about clips that exist as text alone.

A description of the clip takes the place of the audio embeddings: either as a sentence, or in a
form that resembles what an adapter gives. Nothing of this is in DIFFA-2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from data.pretraining.config import PretrainConfig
from data.toy import TextExample, text_example
from diffa2_mini.config import TextConfig
from diffa2_mini.model import Diffa2Model
from diffa2_mini.tokenizer import Prompt, Tokenizer

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

    audio_embeddings: list[Tensor]  # [A, D] each
    prompts: list[Prompt]
    response: Tensor  # [B, R]
    valid: Tensor  # bool [B, R], False at padding
    weight: Tensor  # [B, R], how much each token's loss counts


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


def embed(model: Diffa2Model, descriptions: list[Description], noise: float = 0.0,
          rng: np.random.Generator | None = None) -> list[Tensor]:
    """Embeddings [A, D] of each description, looked up at once, with Gaussian `noise` of this
    standard deviation. Silence is the mean of all embeddings, which is no word."""
    weight = model.llada.wte.weight
    silence, nothing = len(weight), len(weight) + 1  # rows behind the vocabulary's
    table = torch.cat([weight, weight.detach().mean(0, keepdim=True), torch.zeros_like(weight[:1])])
    pairs = [((*part, nothing) if part else (silence, nothing))[:2]
             for description in descriptions for part in description]
    x = F.embedding(torch.tensor(pairs, device=weight.device), table).sum(1)  # [sum of A, D]
    if noise:
        x = x + noise * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)).to(x)
    return x.split([len(each) for each in descriptions])


def token_weights(response: Tensor, tokenizer: Tokenizer, config: PretrainConfig) -> Tensor:
    """How much each token of `response` [B, R] counts: an EOS after the first less, the letter of a
    choice more."""
    letters = torch.tensor([tokenizer.encode(letter)[0] for letter in LETTERS])
    weight = torch.ones(response.shape)
    weight[torch.isin(response, letters)] = config.letter_weight
    weight[(response == tokenizer.eos_id).long().cumsum(1) > 1] = config.eos_weight
    return weight


def draw_batch(model: Diffa2Model, tokenizer: Tokenizer, max_silences: int, config: PretrainConfig,
               rng: np.random.Generator, draw: TextSource = text_example) -> TextBatch:
    """A batch of new examples, in either form with the same probability, with Gaussian noise. Half
    of the batches have no system prompt: short ones are faster."""
    text, device = model.config.text, model.llada.wte.weight.device
    system = str(rng.choice(["", text.system, TextConfig.train_system], p=[0.5, 0.3, 0.2]))
    examples = [draw(rng, False) for _ in range(config.backbone_batch)]
    descriptions = [like_audio(tokenizer, example, max_silences, rng) if rng.random() < 0.5
                    else as_sentence(tokenizer, example) for example in examples]
    audio_embeddings = embed(model, descriptions, config.noise, rng)
    prompts = [tokenizer.prompt(system, example.instruction) for example in examples]
    rows = [torch.tensor(tokenizer.response(example.answer, text.response_multiple))
            for example in examples]
    response = pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_id)
    valid = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    weight = token_weights(response, tokenizer, config)
    return TextBatch(audio_embeddings, prompts, response.to(device), valid.to(device),
                     weight.to(device))
