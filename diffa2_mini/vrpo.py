"""VRPO, stage 4: direct preference optimisation on noisy likelihoods (arXiv 2505.19223; DIFFA-2,
section 3.3).

DPO needs log p(answer), which a diffusion model cannot compute; its place is taken by a Monte Carlo
estimate of the evidence lower bound. Noise in the estimate passes through a sigmoid and so *biases*
the loss. Three things make it small: several samples; each with a number of masks of its own; and
the *same* masks for the policy and for the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .diffusion import token_losses


@dataclass
class Pairs:
    """P preference pairs as 2P responses: chosen, rejected, chosen, ..."""

    response: Tensor  # [2P, R]
    valid: Tensor  # bool [2P, R], False at padding
    masks: Tensor  # bool [2P, n, R], False at padding: what n samples hide of each response


def draw_masks(rng: np.random.Generator, n_response: int, n_samples: int) -> np.ndarray:
    """Masks of `n_samples` estimates, bool [n, R]: each hides exactly k tokens, k uniform in
    1 ... R."""
    k = rng.integers(1, n_response + 1, size=(n_samples, 1))
    ranks = rng.random((n_samples, n_response)).argsort(axis=1)  # a random order per sample
    return ranks < k


def elbo(predict: Callable, response: Tensor, valid: Tensor, masks: Tensor, mask_id: int,
         losses_of: Callable = token_losses) -> Tensor:
    """Estimate of the lower bound on log p(response), in nats, for each row of `response` [B, R]:
    [B]. `valid` [B, R] is False at padding.

    `masks` [B, n, R] are the samples, False at padding. A sample with k masks among the L tokens of
    a row counts -(L / k) * sum of their cross-entropies, and nothing without masks; the estimate is
    the mean over samples. `predict(noisy [B * n, R], valid, masked)` gives the logits [K, V] of the
    masked tokens, in order.
    """
    B, n, R = masks.shape
    masked = masks.reshape(B * n, R)
    # [B * n, R]
    tiled, tiled_valid = response.repeat_interleave(n, 0), valid.repeat_interleave(n, 0)
    logits = predict(tiled.masked_fill(masked, mask_id), tiled_valid, masked)
    losses = losses_of(logits, tiled[masked])  # [K]
    by_sample = losses.new_zeros(B * n, R).masked_scatter(masked, losses).sum(1)  # [B * n]
    samples = -by_sample * tiled_valid.sum(1) / masked.sum(1).clamp(min=1)
    return samples.view(B, n).mean(1)


def pair_bounds(predict: Callable, pairs: Pairs, mask_id: int, losses_of: Callable = token_losses
                ) -> Tensor:
    """The bounds of chosen and rejected answers, [P, 2]. See `elbo`."""
    bounds = elbo(predict, pairs.response, pairs.valid, pairs.masks, mask_id, losses_of)
    return bounds.view(-1, 2)


def reference_of(model: nn.Module, tensors: dict[str, Tensor]) -> Callable:
    """The model as it was when stage 4 began: the same frozen weights, with the trained `tensors`
    of that time in the place of today's. It costs no second copy, and has no gradient."""
    def call(*inputs):
        with torch.no_grad():
            return functional_call(model, tensors, inputs)
    return call


def preference_margin(policy: Tensor, reference: Tensor) -> Tensor:
    """How much more than the reference the policy prefers the chosen answers: [P]. Both are
    estimates of the lower bounds of P pairs, [P, 2], the chosen answer first. Positive means that
    the implicit reward ranks the pair right."""
    gain = policy - reference
    return gain[:, 0] - gain[:, 1]


def vrpo_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Mean over pairs of -log sigmoid(beta * margin): log 2 where policy and reference agree."""
    return -F.logsigmoid(beta * preference_margin(policy, reference)).mean()
