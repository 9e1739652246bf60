"""The same transformer read from left to right: the autoregressive twin that masked diffusion is
compared with.

Not part of DIFFA-2. Weights, prompt and splice are the same; but a token attends only to those
before it, and the loss is the cross-entropy of the next one (as in GPT, arXiv 2005.14165). Later
tokens change no earlier state, so its cache of keys and values is exact: a step computes one token.
And a step generates one token, where the diffusion model's generates several.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.pretraining.config import PretrainConfig
from data.pretraining.recall import draw_pairs
from data.pretraining.texts import TextBatch
from diffa2_mini.config import DecodeConfig, StageConfig
from diffa2_mini.data import Batch, PreferenceBatch
from diffa2_mini.fast.state import empty_caches, place
from diffa2_mini.llada import Llada
from diffa2_mini.model import Diffa2Model, lay_out
from diffa2_mini.tokenizer import Prompt, Tokenizer


def causal_mask(valid: Tensor) -> Tensor:
    """What each token may attend to, bool [B, S, S]: itself and those before it that are `valid`
    [B, S]."""
    S = valid.shape[1]
    return torch.ones(S, S, dtype=torch.bool, device=valid.device).tril() & valid[:, None]


# ----------------------------------------------------------------------------------------- the loss


def states_before(model: Diffa2Model, audio_embeddings: list[Tensor], prompts: list[Prompt],
                  response: Tensor, valid: Tensor) -> Tensor:
    """Hidden states [B, R, D] from which the tokens of `response` [B, R] are predicted: for each
    that of the token before it. `valid` [B, R] is False at padding."""
    before, lengths = model.splice(audio_embeddings, prompts)  # [B, P, D]
    P = before.shape[1]
    positions, valid = lay_out(lengths, P, valid)  # [B, P + R]
    x = torch.cat([before, model.llada.wte(response)], dim=1)  # [B, P + R, D]
    hidden = model.llada(x, causal_mask(valid), positions)
    # the prompt's last token; behind it there may be padding: [B, D]
    last = hidden[torch.arange(len(x), device=x.device), lengths - 1]
    return torch.cat([last[:, None], hidden[:, P:-1]], dim=1)


def next_token_losses(model: Diffa2Model, audio_embeddings: list[Tensor], prompts: list[Prompt],
                      response: Tensor, valid: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropies [K] of the K tokens of `response` [B, R] that are `counted`, bool [B, R], in
    row order."""
    hidden = states_before(model, audio_embeddings, prompts, response, valid)
    logits = model.llada.logits(hidden[counted])  # [K, V]
    return F.cross_entropy(logits.float(), response[counted], reduction="none")


def next_token_loss(model: Diffa2Model, audio_embeddings: list[Tensor], prompts: list[Prompt],
                    response: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens of `response` [B, R], each counted by its `weight`
    [B, R]."""
    counted = valid & (weight > 0)
    losses = next_token_losses(model, audio_embeddings, prompts, response, valid, counted)
    return (losses * weight[counted]).sum() / weight[counted].sum().clamp(min=1)


def answer_tokens(response: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Which tokens of `response` [B, R] are the answer, bool [B, R]: `<|eot_id|>` included, what
    fills the response behind it not."""
    ends = (response == tokenizer.eot_id).long()
    return ends.cumsum(1) - ends == 0


def answer_loss(model: Diffa2Model, batch: Batch, stage: StageConfig, tokenizer: Tokenizer,
                counted: Tensor | None = None) -> Tensor:
    """What stages 1 to 3 minimise: the mean loss of the tokens of the answers; of those alone that
    are `counted`, bool [B, R], if it is given."""
    answer = answer_tokens(batch.response, tokenizer)
    weight = (answer if counted is None else answer & counted).float()
    audio_embeddings = model.embed_audio(batch.audio, stage.audio)
    return next_token_loss(model, audio_embeddings, batch.prompts, batch.response, batch.valid,
                           weight)


def log_probabilities(model: Diffa2Model, batch: PreferenceBatch, stage: StageConfig,
                      tokenizer: Tokenizer) -> Tensor:
    """log p of the chosen and the rejected answer of each pair, [B, 2], in nats. They are exact,
    and no bounds: with them the loss of stage 4 is that of DPO (arXiv 2305.18290)."""
    embeddings = model.embed_audio(batch.audio, stage.audio)
    both = [row for row in embeddings for _ in range(2)]  # B -> 2B
    prompts = [prompt for prompt in batch.prompts for _ in range(2)]
    counted = answer_tokens(batch.response, tokenizer)
    losses = next_token_losses(model, both, prompts, batch.response, batch.valid, counted)  # [K]
    sums = losses.new_zeros(counted.shape).masked_scatter(counted, losses).sum(1)  # [K] -> [2B]
    return -sums.view(-1, 2)


# --------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def generate_greedily(model: Diffa2Model, tokenizer: Tokenizer, audio_embeddings: list[Tensor],
                      prompts: list[Prompt], decode: DecodeConfig,
                      numbers: Sequence[int] | None = None) -> tuple[Tensor, int]:
    """The most probable next token, again and again: answers [B, R], padded with EOS, and the
    number of forward passes. The first pass computes the prompts, each of the others one token of
    each answer. Nothing is drawn, so that the `numbers` of `generate_responses` are not used."""
    before, lengths = model.splice(audio_embeddings, prompts)
    (B, P, _), R, device = before.shape, decode.gen_length, before.device
    positions, valid = lay_out(lengths, P, torch.ones(B, R, dtype=torch.bool, device=device))
    mask, cache_positions = causal_mask(valid), torch.arange(P + R, device=device)
    caches = empty_caches(model.llada, B, P + R)
    hidden = model.llada(before, mask[:, :P], positions[:, :P], place(caches, cache_positions[:P]))
    hidden = hidden[torch.arange(B, device=device), lengths - 1]  # [B, D]
    tokens = torch.full((B, R), tokenizer.eos_id, device=device)
    ends = torch.tensor([tokenizer.eot_id, tokenizer.eos_id], device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for j in range(R):
        logits = model.llada.logits(hidden)  # [B, V]
        logits[:, tokenizer.mask_id] = -torch.inf  # a mask is not an answer
        tokens[:, j] = torch.where(ended, tokenizer.eos_id, logits.argmax(-1))
        ended |= torch.isin(tokens[:, j], ends)
        if ended.all() or j + 1 == R:
            return tokens, j + 1
        at = slice(P + j, P + j + 1)
        hidden = model.llada(model.llada.wte(tokens[:, j:j + 1]), mask[:, at], positions[:, at],
                             place(caches, cache_positions[at]))[:, 0]


# ------------------------------------------------------------------------------------ pretraining


def text_loss(model: Diffa2Model, tokenizer: Tokenizer, batch: TextBatch, config: PretrainConfig,
              rng: np.random.Generator) -> Tensor:
    """What stage 0 minimises, on the same texts with the same weights per token as the diffusion
    model. Nothing is drawn."""
    return next_token_loss(model, batch.audio_embeddings(model), batch.prompts, batch.response,
                           batch.valid, batch.weight)


def recall_loss(model: Llada, words: Tensor, tokenizer: Tokenizer, config: PretrainConfig,
                generator: torch.Generator) -> Tensor:
    """Cross-entropy of the words to recall: the pairs are repeated in another order and turned
    round, and of each the first word is predicted after the second. So a letter is found that
    stands before its choice. The diffusion model's exercise asks for either word; when this one
    did, it was not learned: 1.41 nats after 3,500 steps, where guessing costs 1.39."""
    pairs, asked, _ = draw_pairs(words, config, generator)
    n, asked = pairs.shape[1], asked.flip(2)  # [B, n, 2]
    both = torch.cat([pairs, asked], dim=1)  # [B, 2n, 2]
    # word, word, separator, ...: [B, 2n, 3], flattened to [B, 6n]
    tokens = F.pad(both, (0, 1), value=tokenizer.encode("\n")[0]).flatten(1)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    hidden = model(model.wte(tokens), causal_mask(everything)).unflatten(1, (-1, 3))
    logits = model.logits(hidden[:, n:, 0])  # [B, n, V], at the first words of the repeated pairs
    return F.cross_entropy(logits.flatten(0, 1), asked[:, :, 1].flatten())
