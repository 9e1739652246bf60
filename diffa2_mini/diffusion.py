"""Masked diffusion: the forward process, which masks a response, and the loss of predicting what is
masked (arXiv 2502.09992, section 2).

At time t each response token is [MASK] with probability t: none at 0, all at 1. The model predicts
all masked tokens at once, and

    loss = E[(1/t) * sum of their cross-entropies],   t ~ U(0, 1)

is an upper bound on -log p(response) (equation 3). Prompt and audio are never masked. In practice t
begins at EPSILON, which keeps 1/t finite.

Near t = 0 one token weighs up to 1,000 times as much as near 1, so that the estimate is noisy.
`forward_exactly` and `stratified` estimate the same bound with less variance; `full` trains with
the published loss, and `--loss low-variance` chooses the other.

What differs: the release divides by the tokens on each device, this by those of the whole batch.
`fast/token_losses.py` gives the same losses without all logits at once.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-3  # the smallest time


def draw_noise(rng: np.random.Generator, n_response: int) -> tuple[float, np.ndarray]:
    """A time t in [0, 1) and a uniform number per response token [R], float64."""
    return rng.random(), rng.random(n_response)


def forward_process(response: Tensor, t: Tensor, uniforms: Tensor, mask_id: int
                    ) -> tuple[Tensor, Tensor, Tensor]:
    """Mask each token of `response` [B, R] whose uniform number [B, R] is below t [B], after t is
    mapped from 0 ... 1 to EPSILON ... 1.

    Returns the noisy response [B, R], where it is masked (bool [B, R]), and the times used [B].
    """
    t = (1 - EPSILON) * t + EPSILON
    masked = uniforms < t[:, None]
    return response.masked_fill(masked, mask_id), masked, t


def stratified(t: Tensor, places: Tensor, n: int) -> Tensor:
    """Times [B] spread over a step of n examples: each of n equal parts of 0 ... 1 has one, as the
    `places` [B] of the examples in the step say. `t` [B] is where in its part each is. A place is
    a random one, so the time of an example is uniform as before."""
    return (places + t) / n


def forward_exactly(response: Tensor, t: Tensor, uniforms: Tensor, n_tokens: Tensor, mask_id: int,
                    power: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Mask exactly k of the R = `n_tokens` [B] tokens of each response [B, R], those of the
    smallest `uniforms` [B, R], which are above 1 at padding. k is 1 ... R, with a probability p(k)
    in proportion to k^power; t [B], from 0 to 1, says which quantile of it.

    The bound is the sum over k of E[sum of cross-entropies at k masks] / k. So such a sum has the
    weight 1 / (k p(k)), which is R / k for power 0: the estimate that vrpo.py uses too.

    Returns what `forward_process` does, with k p(k) for the times.
    """
    k = torch.arange(1, response.shape[1] + 1)  # [R]
    p = (k.double() ** power).where(k <= n_tokens[:, None], 0)  # [B, R]
    p = p / p.sum(1, keepdim=True)
    below = (p.cumsum(1) <= t[:, None]).sum(1)  # how many values of k are below the quantile
    k = (below + 1).minimum(n_tokens)  # [B]
    masked = uniforms.argsort(1).argsort(1) < k[:, None]
    times = k * p.gather(1, k[:, None] - 1).squeeze(1)  # [B]
    return response.masked_fill(masked, mask_id), masked, times.float()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy [K] in nats, float32 or wider, of `logits` [K, V] with `targets` [K]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none")


def diffusion_loss(logits: Tensor, response: Tensor, masked: Tensor, t: Tensor, n_tokens: int,
                   losses_of: Callable = token_losses) -> Tensor:
    """The bound on -log p of the responses, per token.

    Args:
        logits: of the K masked tokens, in row order [K, V]; or what `losses_of` takes instead.
        response, masked, t: [B, R] without noise, bool [B, R] and [B], as of `forward_process`.
        n_tokens: response tokens of the whole batch, padding EOS included. The losses of a batch's
            micro-batches add up to its loss.
    """
    losses = losses_of(logits, response[masked])  # [K]
    weights = (1 / t)[:, None].expand(response.shape)[masked]  # [B] -> [B, R] -> [K]
    return (weights * losses).sum() / n_tokens
