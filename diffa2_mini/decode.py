"""The reverse process: from masks to an answer (arXiv 2502.09992, section 2.4).

A step predicts all masked tokens at once, commits some of the predictions, and leaves the other
tokens masked. The rules differ in which it commits:

* the *fixed schedule* of LLaDA: equally many in each step, the most confident first;
* the *threshold* of Fast-dLLM (arXiv 2505.22618, section 3.3): all above, say, 0.9;
* its *factor-based parallel decoding*: as many as their confidence allows together. With
  c_1 >= c_2 >= ..., token n is committed while (n + 1)(1 - c_n) <= f.

Every rule commits at least the most confident token. The response is filled in block by block, from
left to right, until no mask is left before its first EOS; this is asked before each block.

What differs: the release also stops within a block, may predict a mask, and commits one token too
many when only the last one fails its test. `decode` is everything, for a function that maps tokens
to logits. `fast/generate.py` gives the same tokens faster, and has sampling, guidance and a cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .config import DecodeConfig


def most_confident(confidence: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Fixed schedule: the k most confident candidates, or all if there are fewer. bool [B, R]."""
    ranked = confidence.masked_fill(~candidates, -1).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(candidates).scatter(-1, ranked[:, :k], True)  # [B, k] -> [B, R]
    return chosen & candidates


def factor_based(confidence: Tensor, candidates: Tensor, factor: float) -> Tensor:
    """Factor-based parallel decoding: from the most confident on, until one fails. bool [B, R]."""
    c, ranked = confidence.masked_fill(~candidates, -1).sort(dim=-1, descending=True, stable=True)
    n = torch.arange(1, c.shape[1] + 1, device=c.device)  # [R]
    passes = (n + 1) * (1 - c) <= factor  # [B, R], in order of confidence
    passes[:, 0] = True
    until_first_failure = passes.long().cumprod(-1).bool()
    return torch.zeros_like(candidates).scatter(-1, ranked, until_first_failure) & candidates


def above_threshold(confidence: Tensor, candidates: Tensor, threshold: float) -> Tensor:
    """Threshold: all candidates of a higher confidence, or else the most confident. bool [B, R]."""
    return candidates & (confidence > threshold) | most_confident(confidence, candidates, 1)


def tokens_in_step(config: DecodeConfig, step: int) -> int:
    """How many tokens a step commits on the fixed schedule; the first ones share the remainder."""
    equal, remainder = divmod(config.block_length, config.steps_per_block)
    return equal + (step < remainder)


def commit(confidence: Tensor, candidates: Tensor, config: DecodeConfig, step: int) -> Tensor:
    """Which of the `candidates`, bool [B, R], a step commits, by their confidence [B, R]."""
    if config.factor is not None:
        return factor_based(confidence, candidates, config.factor)
    if config.threshold is not None:
        return above_threshold(confidence, candidates, config.threshold)
    return most_confident(confidence, candidates, tokens_in_step(config, step))


def finished(tokens: Tensor, mask_id: int, eos_id: int) -> Tensor:
    """Whether a response of `tokens` [B, R] has an EOS, and no mask before the first. bool [B]."""
    before_eos = (tokens == eos_id).long().cumsum(-1) == 0  # [B, R]
    has_eos = ~before_eos[:, -1]
    return has_eos & ~((tokens == mask_id) & before_eos).any(-1)


@torch.no_grad()
def decode(predict: Callable[[Tensor], Tensor], tokens: Tensor, config: DecodeConfig, mask_id: int,
           eos_id: int) -> Tensor:
    """Replace the masks of `tokens` [B, R] by what the model predicts. `predict` maps tokens [B, R]
    to logits [B, R, V]. Of `config` only the lengths and the rule count."""
    position = torch.arange(tokens.shape[1], device=tokens.device)  # [R]
    for start in range(0, tokens.shape[1], config.block_length):
        in_block = (start <= position) & (position < start + config.block_length)  # [R]
        is_open = ~finished(tokens, mask_id, eos_id)[:, None]  # [B, 1]
        for step in range(config.steps_per_block):
            candidates = (tokens == mask_id) & in_block & is_open  # [B, R]
            if not candidates.any():
                break
            logits = predict(tokens)  # [B, R, V]
            logits[..., mask_id] = -torch.inf  # a mask is not an answer
            confidence, predicted = logits.float().softmax(-1).max(-1)  # [B, R] each
            committed = commit(confidence, candidates, config, step)
            tokens = torch.where(committed, predicted, tokens)
    return tokens
