"""Masked diffusion: the forward process, which masks a response, and the loss of predicting what is
masked (arXiv 2502.09992, section 2).

At time t each response token is [MASK] with probability t: none at 0, all at 1. The model predicts
all masked tokens at once, and

    loss = E[(1/t) * sum of their cross-entropies],   t ~ U(0, 1)

is an upper bound on -log p(response) (equations 3 to 5). Prompt and audio are never masked. In
practice t begins at EPSILON, which keeps 1/t finite.

Near t = 0 one token weighs up to 1,000 times as much as near 1, so that the estimate is noisy.
`forward_exactly` and `stratified` estimate the same bound with less variance. `--masking` chooses;
`full` trains with the published noise, toy and small with a biased one (MASKED_WHOLLY, data.py).

What differs: the release divides by the tokens on each device, this by those of the whole batch.
`fast/token_losses.py` gives the same losses without all logits at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-3  # the smallest time


def forward_process(response: Tensor, t: Tensor, uniforms: Tensor, mask_id: int
                    ) -> tuple[Tensor, Tensor, Tensor]:
    """Mask each token of `response` [B, R] whose uniform number [B, R] is below t [B], after t is
    mapped from 0 ... 1 to EPSILON ... 1.

    Returns the noisy response [B, R], where it is masked (bool [B, R]), and the weights 1/t [B].
    """
    t = (1 - EPSILON) * t + EPSILON
    masked = uniforms < t[:, None]
    return response.masked_fill(masked, mask_id), masked, 1 / t


def stratified(t: Tensor, places: Tensor, n: int) -> Tensor:
    """Times [B] that are spread over a step: each of n equal parts of 0 ... 1 has one. `places` [B]
    are those of the examples among the step's n (training/loader.py), which are in random order, so
    that the time of each is still uniform; `t` [B], from 0 to 1, says where in its part it is."""
    return (places + t) / n


def forward_exactly(response: Tensor, t: Tensor, uniforms: Tensor, lengths: Tensor, mask_id: int,
                    power: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Mask exactly k tokens of each response [B, R]: of its `lengths` [B] tokens those with the
    smallest `uniforms` [B, R], which are above 1 at padding. k is 1, 2, ... or the length, with
    probabilities p(k) ~ k^power; the time t [B] says which quantile of them it is.

    Equation 5, integrated over t, is the sum over k of 1/k times the expected sum of the cross-
    entropies at k masks (equation 6; tutorials/04 derives it). So such a sum has the weight
    1 / (k p(k)): the length over k if all k are as likely, as in vrpo.py.

    Returns what `forward_process` does.
    """
    k = torch.arange(1, response.shape[1] + 1)  # [R]
    p = (k.double() ** power).where(k <= lengths[:, None], 0)  # [B, R]
    p = p / p.sum(1, keepdim=True)
    k = (1 + (p.cumsum(1) <= t[:, None]).sum(1)).minimum(lengths)  # [B], the quantile
    masked = uniforms.argsort(1).argsort(1) < k[:, None]  # ranks from 0 on
    weight = 1 / (k * p.gather(1, k[:, None] - 1).squeeze(1))  # [B]
    return response.masked_fill(masked, mask_id), masked, weight.float()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy [K] in nats, float32 or wider, of `logits` [K, V] with `targets` [K]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none")


def diffusion_loss(logits: Tensor, response: Tensor, masked: Tensor, weight: Tensor, n_tokens: int,
                   losses_of: Callable = token_losses) -> Tensor:
    """The bound on -log p of the responses, per token.

    Args:
        logits: of the K masked tokens, in row order [K, V]; or what `losses_of` takes instead.
        response: [B, R] without noise.
        masked, weight: bool [B, R] and [B], as of `forward_process`.
        n_tokens: response tokens of the whole batch, with the EOS that fill each (and not what pads
            the batch). The losses of a batch's micro-batches add up to its loss.
    """
    losses = losses_of(logits, response[masked])  # [K]
    weights = weight[:, None].expand(response.shape)[masked]  # [B] -> [B, R] -> [K]
    return (weights * losses).sum() / n_tokens
