"""The reverse process: from a response of masks to an answer, many tokens at a time (arXiv
2502.09992, section 2.4).

Each step predicts every masked token at once, then commits some of the predictions and leaves the
rest masked. Which ones is the decoder's whole question. The *fixed schedule* of LLaDA commits
equally many in each step, the most confident first. The *threshold* of Fast-dLLM (arXiv 2505.22618,
section 3.3) commits what is more confident than, say, 0.9. Its *factor-based parallel decoding*
commits as many as their joint confidence allows: sorted c_1 >= c_2 >= ..., token n goes while (n +
1)(1 - c_n) <= f. Either way the most confident token always goes. The response is filled in block
by block, from left to right, and ends early once its EOS is settled.

`decode` below is all of it for a model that maps tokens to logits. `fast/generate.py` gives the
same tokens faster, and can do more: sampling, guidance, a cache, rows of several lengths.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .config import DecodeConfig

# ---------------------------------------------------------------------------------- what to commit


def most_confident(confidence: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Fixed schedule: the k candidates [B, R] of highest confidence (fewer if there are fewer), as
    bool [B, R]."""
    ranked = confidence.masked_fill(~candidates, -1).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(candidates).scatter(-1, ranked[:, :k], True)
    return chosen & candidates


def factor_based(confidence: Tensor, candidates: Tensor, factor: float) -> Tensor:
    """Factor-based parallel decoding: how many candidates go is decided by their confidence; bool
    [B, R]."""
    ordered, ranked = confidence.masked_fill(~candidates, -1).sort(dim=-1, descending=True,
                                                                   stable=True)
    n = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
    go = (n + 1) * (1 - ordered) <= factor
    go[:, 0] = True
    until_first_failure = go.long().cumprod(-1).bool()
    return torch.zeros_like(candidates).scatter(-1, ranked, until_first_failure) & candidates


def above_threshold(confidence: Tensor, candidates: Tensor, threshold: float) -> Tensor:
    """The candidates more confident than the threshold, and the most confident one in any case;
    bool [B, R]."""
    return candidates & (confidence > threshold) | most_confident(confidence, candidates, 1)


def finished(tokens: Tensor, mask_id: int, eos_id: int) -> Tensor:
    """bool [B]: the response has an EOS with no mask before it."""
    first_eos = (tokens == eos_id).long().cumsum(-1) == 0  # True before the first EOS
    has_eos = ~first_eos[:, -1]
    return has_eos & ~((tokens == mask_id) & first_eos).any(-1)


def tokens_in_step(config: DecodeConfig, step: int) -> int:
    """How many tokens a step of a block commits on a fixed schedule; the remainder goes first."""
    equal, remainder = divmod(config.block_length, config.steps_per_block)
    return equal + (step < remainder)


def commit(confidence: Tensor, candidates: Tensor, config: DecodeConfig, step: int) -> Tensor:
    """Which `candidates` a step commits, by their `confidence`; all of them bool or float [B,
    R]."""
    if config.factor is not None:
        return factor_based(confidence, candidates, config.factor)
    if config.threshold is not None:
        return above_threshold(confidence, candidates, config.threshold)
    return most_confident(confidence, candidates, tokens_in_step(config, step))


# -------------------------------------------------------------------------------------- the decoder


@torch.no_grad()
def decode(predict: Callable[[Tensor], Tensor], tokens: Tensor, config: DecodeConfig, mask_id: int,
           eos_id: int) -> Tensor:
    """Replace the masks of `tokens` [B, R] by what the model predicts. `predict` maps tokens [B, R]
    to logits [B, R, V]."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    for start in range(0, tokens.shape[1], config.block_length):
        in_block = (start <= position) & (position < start + config.block_length)  # [R]
        open_rows = ~finished(tokens, mask_id, eos_id)[:, None]  # [B, 1]
        for step in range(config.steps_per_block):
            candidates = (tokens == mask_id) & in_block & open_rows  # [B, R]
            if not candidates.any():
                break
            logits = predict(tokens)
            logits[..., mask_id] = -torch.inf  # a mask is not an answer
            confidence, predicted = logits.softmax(-1).max(-1)  # [B, R] each
            committed = commit(confidence, candidates, config, step)
            tokens = torch.where(committed, predicted, tokens)
    return tokens
