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
from data.toy import TextExample, text_example
from diffa2_mini.config import TextConfig
from diffa2_mini.model import Diffa2Model
from diffa2_mini.tokenizer import Prompt, Tokenizer

# draws an example, of the evaluation or not
TextSource = Callable[[np.random.Generator, bool], TextExample]
LETTERS = ("A.", "B.", "C.", "D.")  # of lettered choices


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
        ordinals, items = (embed_words(model, tokenizer, words) for words in zip(*example.items))
        parts = torch.cat([parts, items + ordinals])
    silence = model.llada.wte.weight.detach().mean(0)
    rows = []
    for part in parts:
        rows.append(part.expand(rng.integers(1, 6), -1))
        rows.append(silence.expand(rng.integers(0, max_silences + 1), -1))
    return torch.cat(rows)


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
    clean = [embed_like_audio(model, tokenizer, example, max_silences, rng) if rng.random() < 0.5
             else embed_words(model, tokenizer, example.words()) for example in examples]
    noise = [rng.standard_normal(x.shape, dtype=np.float32) for x in clean]
    audio_embeddings = [x + config.noise * torch.from_numpy(e).to(x) for x, e in zip(clean, noise)]
    prompts = [tokenizer.prompt(system, example.instruction) for example in examples]
    rows = [torch.tensor(tokenizer.response(example.answer, text.response_multiple))
            for example in examples]
    response = pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_id)
    valid = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    weight = token_weights(response, tokenizer, config)
    return TextBatch(audio_embeddings, prompts, response.to(device), valid.to(device),
                     weight.to(device))
