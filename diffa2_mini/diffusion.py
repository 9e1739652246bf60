"""Masked diffusion: the forward process that hides a response, and the loss that teaches to restore it.

At time t each response token is [MASK] with probability t: nothing is hidden at 0, everything at 1. The model predicts
all hidden tokens at once. The expected value of (1/t) * sum of their cross-entropies is an upper bound on
-log p(response): arXiv 2502.09992, equation 3. Prompt and audio are never masked.
"""

from typing import Callable

import numpy as np
import torch
from torch import Tensor

EPSILON = 1e-3  # the smallest time
AT_ONCE = 256  # tokens whose logits exist at once


def draw_noise(rng: np.random.Generator, n_response: int) -> tuple[float, np.ndarray]:
    """A time t in (0, 1) and a uniform number per response token [R], float64."""
    return rng.random(), rng.random(n_response)


def forward_process(response: Tensor, t: Tensor, uniforms: Tensor, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hide each token of `response` [B, R] with probability t [B], squeezed from 0 ... 1 into EPSILON ... 1.

    Returns the noisy response [B, R], where it is masked (bool [B, R]), and the times used [B].
    """
    t = (1 - EPSILON) * t + EPSILON
    masked = uniforms < t[:, None]
    return response.masked_fill(masked, mask_id), masked, t


class TokenLosses(torch.autograd.Function):
    """Cross-entropy in nats of each of K tokens, [K], from its hidden state [K, D] and the token that it is. `head` gives
    logits [..., V], which are compared in float32 at least, and gets no gradient itself. The gradient of a loss with respect to
    its logits is p - 1 at the token and p elsewhere, so that it is made with the loss, where the logits were, a few tokens at a
    time: memory does not grow with K * V."""

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, head: Callable) -> Tensor:
        losses, gradients = [], []
        for states, tokens in zip(hidden.split(AT_ONCE), targets[:, None].split(AT_ONCE)):
            with torch.enable_grad():
                states = states.detach().clone().requires_grad_()
                logits = head(states)  # to be written over, so that their memory is needed once
            scores = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
            highest, own = scores.max(-1, keepdim=True).values, scores.gather(-1, tokens)
            total = scores.sub_(highest).exp_().sum(-1, keepdim=True)
            losses.append((total.log() + highest - own).squeeze(-1))
            if ctx.needs_input_grad[0]:
                by_logits = scores.div_(total).scatter_add_(-1, tokens, -torch.ones_like(total))
                logits.backward(by_logits.to(logits.dtype), inputs=[states])
                gradients.append(states.grad)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, by_losses: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return by_losses[:, None].to(gradients.dtype) * gradients, None, None


def masked_cross_entropy(head: Callable, hidden: Tensor, response: Tensor, masked: Tensor) -> Tensor:
    """Cross-entropy in nats at each masked token, zero elsewhere: [B, R]. `hidden` [K, D] are the states of the K masked
    tokens, in order."""
    losses = TokenLosses.apply(hidden, response[masked], head)
    return losses.new_zeros(response.shape).masked_scatter(masked, losses)


def diffusion_loss(losses: Tensor, t: Tensor, n_tokens: int) -> Tensor:
    """Sum of the masked cross-entropies [B, R] divided by their times [B], per token: `n_tokens` are the response tokens of
    the whole batch, the EOS padding that belongs to a response included. With the batch in pieces, their losses add up."""
    return (losses / t[:, None]).sum() / n_tokens
