"""The reverse process: from a response of masks to an answer, many tokens at a time (arXiv 2502.09992, section 2.4).

Each step predicts every masked token at once, then commits some of the predictions and leaves the rest masked. Which
ones is the decoder's whole question. The *fixed schedule* of LLaDA commits equally many in each step, the most
confident first (or random ones). *Factor-based parallel decoding* (Fast-dLLM, arXiv 2505.22618, section 3.3) commits as
many as their joint confidence allows: sorted c_1 >= c_2 >= ..., token n goes while (n + 1)(1 - c_n) <= f, and the first
always. The response is filled in block by block, from left to right, and ends early once its EOS is settled.
"""

from dataclasses import dataclass
from typing import Callable, Iterator

import torch
from torch import Tensor

from .config import DecodeConfig


@dataclass
class Step:
    """What one step of decoding did to each of B responses of R tokens."""

    tokens: Tensor  # [B, R] after the step; masks where nothing is committed yet
    predicted: Tensor  # [B, R] the token that each position would get now
    confidence: Tensor  # [B, R] softmax probability of that token, free of noise
    committed: Tensor  # bool [B, R], what this step settled


def choose(logits: Tensor, temperature: float, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """A token for each position and its probability. With a temperature T the token is the largest p / (-log u)^T, u
    uniform (Gumbel-max, in float64), which samples from p^(1/T); the probability stays that of T = 0."""
    probabilities = logits.double().softmax(-1)  # [B, R, V]
    scores = probabilities if noise is None else probabilities / (-noise.log()) ** temperature
    tokens = scores.argmax(-1)
    return tokens, probabilities.gather(-1, tokens[..., None]).squeeze(-1)


def most_confident(confidence: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Fixed schedule: the k candidates [B, R] of highest confidence (fewer if there are fewer), as bool [B, R]."""
    ranked = confidence.masked_fill(~candidates, -1).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(candidates).scatter(-1, ranked[:, :k], True)
    return chosen & candidates


def factor_based(confidence: Tensor, candidates: Tensor, factor: float) -> Tensor:
    """Factor-based parallel decoding: how many candidates go is decided by their confidence; bool [B, R]."""
    ordered, ranked = confidence.masked_fill(~candidates, -1).sort(dim=-1, descending=True, stable=True)
    n = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
    go = (n + 1) * (1 - ordered) <= factor
    go[:, 0] = True
    until_first_failure = go.long().cumprod(-1).bool()
    return torch.zeros_like(candidates).scatter(-1, ranked, until_first_failure) & candidates


def finished(tokens: Tensor, mask_id: int, eos_id: int) -> Tensor:
    """bool [B]: the response has an EOS with no mask before it."""
    first_eos = (tokens == eos_id).long().cumsum(-1) == 0  # True before the first EOS
    has_eos = ~first_eos[:, -1]
    return has_eos & ~((tokens == mask_id) & first_eos).any(-1)


@torch.no_grad()
def generate(predict: Callable, n_rows: int, config: DecodeConfig, mask_id: int, eos_id: int, device="cpu") -> Iterator[Step]:
    """Decode `n_rows` responses together; yields each step.

    `predict(tokens [B, R])` gives logits [B, R, V]; for classifier-free guidance it is also called with
    `conditional=False`. Every row draws the same noise from `config.seed`, so that a clip's answer does not depend on
    its neighbours.
    """
    generator = torch.Generator()

    def uniforms(*shape):  # float64, the same for every row
        return torch.rand(1, *shape, generator=generator, dtype=torch.float64).to(device).clamp_min(1e-300)

    tokens = torch.full((n_rows, config.gen_length), mask_id, device=device)
    n_blocks = config.gen_length // config.block_length
    steps = config.steps // n_blocks
    for start in range(0, config.gen_length, config.block_length):
        generator.manual_seed(config.seed * config.gen_length + start)  # rows may leave a block at different steps
        block = torch.zeros_like(tokens, dtype=torch.bool)
        block[:, start:start + config.block_length] = True
        done = finished(tokens, mask_id, eos_id)
        for i in range(steps if config.factor is None else config.block_length):
            candidates = (tokens == mask_id) & block & ~done[:, None]
            if not candidates.any():
                break
            logits = predict(tokens)
            if config.cfg > 0:
                unconditional = predict(tokens, conditional=False)
                logits = unconditional + (config.cfg + 1) * (logits - unconditional)
            is_mask = torch.arange(logits.shape[-1], device=device) == mask_id
            logits = logits.masked_fill(is_mask, -torch.inf)  # a mask is not an answer
            noise = uniforms(*logits.shape[1:]) if config.temperature > 0 else None
            predicted, confidence = choose(logits, config.temperature, noise)
            if config.factor is not None:
                committed = factor_based(confidence, candidates, config.factor)
            else:
                k = config.block_length // steps + (i < config.block_length % steps)  # the remainder goes first
                order = uniforms(config.gen_length).expand_as(confidence) if config.remasking == "random" else confidence
                committed = most_confident(order, candidates, k)
            tokens = torch.where(committed, predicted, tokens)
            yield Step(tokens, predicted, confidence, committed)
