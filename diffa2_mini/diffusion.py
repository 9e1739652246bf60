"""Masked diffusion: the forward process that hides a response, and the loss that teaches to restore
it.

At time t each response token is [MASK] with probability t: nothing is hidden at 0, everything at 1.
The model predicts all hidden tokens at once. The expected value of (1/t) * sum of their
cross-entropies is an upper bound on -log p(response): arXiv 2502.09992, equation 3. Prompt and
audio are never masked.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-3  # the smallest time


def draw_noise(rng: np.random.Generator, n_response: int) -> tuple[float, np.ndarray]:
    """A time t in (0, 1) and a uniform number per response token [R], float64."""
    return rng.random(), rng.random(n_response)


def forward_process(response: Tensor, t: Tensor, uniforms: Tensor, mask_id: int
                    ) -> tuple[Tensor, Tensor, Tensor]:
    """Hide each token of `response` [B, R] with probability t [B], squeezed from 0 ... 1 into
    EPSILON ... 1.

    Returns the noisy response [B, R], where it is masked (bool [B, R]), and the times used [B].
    """
    t = (1 - EPSILON) * t + EPSILON
    masked = uniforms < t[:, None]
    return response.masked_fill(masked, mask_id), masked, t


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, float32 at least, [K], of K tokens `targets` [K], from their `logits`
    [K, V]. `fast/token_losses.py` makes the same without all the logits at once."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none")


def diffusion_loss(logits: Tensor, response: Tensor, masked: Tensor, t: Tensor, n_tokens: int,
                   losses_of: Callable = token_losses) -> Tensor:
    """The bound on -log p of each `response` [B, R] at the times t [B], per token.

    `logits` [K, V] are those of the K `masked` tokens, in order. `n_tokens` counts the response
    tokens of the whole batch, the EOS padding that belongs to a response included: with the batch
    in pieces, their losses add up.
    """
    losses = losses_of(logits, response[masked])  # [K]
    weights = (1 / t)[:, None].expand(response.shape)[masked]  # [K]
    return (weights * losses).sum() / n_tokens
