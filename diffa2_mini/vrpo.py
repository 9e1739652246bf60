"""VRPO, stage 4: preference optimisation on noisy likelihoods (arXiv 2505.19223, 2601.23161).

For a chosen answer w, a rejected answer l, the policy and a frozen reference ref,

    loss = -log sigmoid(beta * ((ELBO(w) - ELBO_ref(w)) - (ELBO(l) - ELBO_ref(l))))

DPO (arXiv 2305.18290) has log p(answer) there; this has a Monte Carlo estimate of its evidence
lower bound. The sigmoid turns the estimate's variance into *bias* of the loss. Three things keep
the variance small: several samples; a freshly drawn number of masks k for each; and the *same*
masks for both (antithetic sampling, in the paper). Toy and small mask each answer wholly, once.

What differs: the release keeps two 8 B models; here the reference shares all frozen weights.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .diffusion import token_losses


def draw_masks(rng: np.random.Generator, n_response: int, n_samples: int) -> np.ndarray:
    """The masks of n samples, bool [n, R]. Each has exactly k tokens, k uniform in 1 ... R."""
    k = rng.integers(1, n_response + 1, size=(n_samples, 1))
    ranks = rng.random((n_samples, n_response)).argsort(axis=1)  # a random order per sample
    return ranks < k


def elbo(predict: Callable, response: Tensor, valid: Tensor, masks: Tensor, mask_id: int,
         losses_of: Callable = token_losses) -> Tensor:
    """Estimates [B] of the lower bounds on log p of the responses [B, R], in nats.

    A sample with k masks is -(R / k) * sum of their cross-entropies (arXiv 2502.09992, equation 6),
    where R counts valid tokens; without masks it is 0. The estimate is the mean of n samples.

    Args:
        predict: (noisy [B * n, R], valid, masked) -> logits [K, V] of masked tokens, in row order.
        valid: bool [B, R], False at padding.
        masks: bool [B, n, R], False at padding.
        losses_of: (what `predict` gives, targets [K]) -> cross-entropies [K].
    """
    B, n, R = masks.shape
    masked = masks.reshape(B * n, R)
    response = response.repeat_interleave(n, 0)  # [B, R] -> [B * n, R]
    valid = valid.repeat_interleave(n, 0)
    logits = predict(response.masked_fill(masked, mask_id), valid, masked)
    losses = losses_of(logits, response[masked])  # [K]
    sums = losses.new_zeros(B * n, R).masked_scatter(masked, losses).sum(1)  # [K] -> [B * n]
    samples = -sums * valid.sum(1) / masked.sum(1).clamp(min=1)
    return samples.view(B, n).mean(1)


def reference_of(model: nn.Module, tensors: dict[str, Tensor]) -> Callable:
    """The model as it was when stage 4 began, without gradient. `tensors` are copies of its trained
    ones from that time, by name; the frozen ones are shared."""
    @torch.no_grad()
    def call(*inputs):
        return functional_call(model, tensors, inputs)
    return call


def preference_margin(policy: Tensor, reference: Tensor) -> Tensor:
    """The margins [B] between chosen and rejected answers, from the bounds [B, 2] of both by policy
    and reference. A positive one means that the implicit reward ranks the pair right."""
    gain = policy - reference
    return gain[:, 0] - gain[:, 1]


def vrpo_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Mean of -log sigmoid(beta * margin): log 2 where policy and reference agree."""
    return -F.logsigmoid(beta * preference_margin(policy, reference)).mean()
