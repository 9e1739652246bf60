"""The same transformer read from left to right: the autoregressive twin that masked diffusion is
compared with.

Not part of DIFFA-2. Weights, prompt and splice are the same; but a token attends only to those
before it, and the loss is the cross-entropy of the next one (as in GPT, arXiv 2005.14165). As
nothing that comes later changes what was read, its cache of keys and values is exact: each step
reads one token. And each step writes one token, the diffusion model's several.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import DecodeConfig, PretrainConfig, StageConfig
from ..data import Batch
from ..fast.cache import empty_caches, place
from ..llada import Llada
from ..model import Diffa2Model, lay_out
from ..tokenizer import Prompt, Tokenizer
from .backbone import Method, draw_recall, read_texts


def look_back(valid: Tensor) -> Tensor:
    """What each token may attend to, bool [B, S, S]: itself and what stands before it, if it is
    `real` [B, S]."""
    S = valid.shape[1]
    return torch.ones(S, S, dtype=torch.bool, device=valid.device).tril() & valid[:, None]


# ----------------------------------------------------------------------------------------- the loss


def states(model: Diffa2Model, audio_embeddings: list[Tensor], prompts: list[Prompt],
           response: Tensor, valid: Tensor) -> Tensor:
    """Hidden states [B, R, D] from which the tokens of `response` [B, R] are predicted: each that
    of the token before it. `real` [B, R] is False at padding."""
    before, lengths = model.splice(audio_embeddings, prompts)
    positions, valid = lay_out(lengths, before.shape[1], valid)
    x = torch.cat([before, model.llada.wte(response)], dim=1)  # [B, P + R, D]
    hidden = model.llada(x, look_back(valid), positions)
    # [B, D]; behind it there may be padding
    last_of_prompt = hidden[torch.arange(len(x), device=x.device), lengths - 1]
    return torch.cat([last_of_prompt[:, None], hidden[:, before.shape[1]:-1]], dim=1)


def next_token_loss(model: Diffa2Model, audio_embeddings: list[Tensor], prompts: list[Prompt],
                    response: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens of `response` [B, R], each counted by its `weight` [B,
    R]."""
    counted = valid & (weight > 0)
    # [K, V]
    logits = model.llada.logits(states(model, audio_embeddings, prompts, response, valid)[counted])
    losses = F.cross_entropy(logits.float(), response[counted], reduction="none")
    return (losses * weight[counted]).sum() / weight[counted].sum()


def answer_loss(model: Diffa2Model, batch: Batch, stage: StageConfig,
                tokenizer: Tokenizer) -> Tensor:
    """What stages 1 to 3 minimise: the loss of the answers, `<|eot_id|>` included and the padding
    behind it not."""
    behind = (batch.response == tokenizer.eot_id).long().cumsum(1) - (batch.response
                                                                      == tokenizer.eot_id).long()
    audio_embeddings = model.embed_audio(batch.audio, stage.audio)
    return next_token_loss(model, audio_embeddings, batch.prompts, batch.response, batch.valid,
                           (behind == 0).float())


# ----------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def write(model: Diffa2Model, tokenizer: Tokenizer, audio_embeddings: list[Tensor],
          prompts: list[Prompt], decode: DecodeConfig,
          numbers: Sequence[int] | None = None) -> tuple[Tensor, int]:
    """The most probable next token, again and again: answers [B, R], padded with EOS, and how many
    forward passes they took. The first pass reads the prompts, each of the others one token of each
    answer. Nothing is drawn, so that the `numbers` of `fill_in` decide nothing."""
    before, lengths = model.splice(audio_embeddings, prompts)
    (B, P, _), R, device = before.shape, decode.gen_length, before.device
    positions, valid = lay_out(lengths, P, torch.ones(B, R, dtype=torch.bool, device=device))
    seen, cache_positions = look_back(valid), torch.arange(P + R, device=device)
    caches = empty_caches(model.llada, B, P + R)
    hidden = model.llada(before, seen[:, :P], positions[:, :P], place(caches, cache_positions[:P]))
    hidden = hidden[torch.arange(B, device=device), lengths - 1]  # [B, D]
    tokens = torch.full((B, R), tokenizer.eos_id, device=device)
    ends = torch.tensor([tokenizer.eot_id, tokenizer.eos_id], device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for j in range(R):
        logits = model.llada.logits(hidden)
        logits[:, tokenizer.mask_id] = -torch.inf  # a mask is not an answer
        tokens[:, j] = torch.where(ended, tokenizer.eos_id, logits.argmax(-1))
        ended |= torch.isin(tokens[:, j], ends)
        if ended.all() or j + 1 == R:
            return tokens, j + 1
        at = slice(P + j, P + j + 1)
        hidden = model.llada(model.llada.wte(tokens[:, j:j + 1]), seen[:, at], positions[:, at],
                             place(caches, cache_positions[at]))[:, 0]


# -------------------------------------------------------------------------------------- pretraining


def text_loss(model: Diffa2Model, tokenizer: Tokenizer, examples: list, system: str, silences: int,
              config: PretrainConfig, rng: np.random.Generator) -> Tensor:
    """What stage 0 minimises, on the same texts with the same weights per token as the diffusion
    model."""
    return next_token_loss(model,
                           *read_texts(model, tokenizer, examples, system, silences, config, rng))


def recall_loss(model: Llada, words: Tensor, separator: int, mask_id: int, config: PretrainConfig,
                generator: torch.Generator) -> Tensor:
    """The exercise in recall: pairs of words, then the same pairs in another order and turned
    round, the first word after the second: so a letter is found that stands before its choice. The
    diffusion model's asks for either word; when this one did, it was not learned: 1.41 nats after
    3,500 steps, where guessing costs 1.39."""
    pairs, asked, _ = draw_recall(words, config, generator)
    asked = asked.flip(2)
    # [B, 6n]: word, word, separator, ...
    tokens = F.pad(torch.cat([pairs, asked], dim=1), (0, 1), value=separator).flatten(1)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    hidden = model(model.wte(tokens), look_back(everything)).unflatten(1, (-1, 3))  # [B, 2n, 3, D]
    return F.cross_entropy(
        model.logits(hidden[:, pairs.shape[1]:, 0]).flatten(0, 1), asked[:, :, 1].flatten())


METHOD = Method(text_loss, recall_loss, write)
