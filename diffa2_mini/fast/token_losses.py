"""The cross-entropies of diffusion.py, without all logits at once.

With a vocabulary of 126,464, logits and their gradient would take most of the memory of a training
step. But the gradient of a loss with respect to its logits is simple, p - 1 at the target and p
elsewhere. So the forward pass computes it too, a few tokens at a time and in the logits' place, and
keeps only the gradient with respect to the hidden states: [K, D] instead of [K, V].
"""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 256  # tokens whose logits exist at once


class TokenLosses(torch.autograd.Function):
    """Losses [K] of hidden states [K, D] and targets [K]. `head`, frozen, maps states to logits."""

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, head: Callable) -> Tensor:
        losses, gradients = [], []
        chunks = zip(hidden.split(CHUNK), targets[:, None].split(CHUNK), strict=True)
        for states, tokens in chunks:  # [k, D], [k, 1]
            with torch.enable_grad():
                states = states.detach().clone().requires_grad_()
                logits = head(states)  # [k, V]
            scores = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
            highest = scores.max(-1, keepdim=True).values  # [k, 1]
            own = scores.gather(-1, tokens)  # [k, V] -> [k, 1]
            exp = scores.sub_(highest).exp_()  # [k, V], in the memory of `scores`
            total = exp.sum(-1, keepdim=True)  # [k, 1]
            losses.append((total.log() + highest - own).squeeze(-1))  # -log p of the targets
            if ctx.needs_input_grad[0]:
                p = exp.div_(total)  # [k, V]
                by_logits = p.scatter_add_(-1, tokens, -torch.ones_like(total))  # p - 1 at targets
                logits.backward(by_logits.to(logits.dtype), inputs=[states])
                gradients.append(states.grad)  # [k, D]
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))  # [K, D]
        return torch.cat(losses)  # [K]

    @staticmethod
    def backward(ctx, by_losses: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors  # [K, D]
        return by_losses[:, None].to(gradients.dtype) * gradients, None, None


def token_losses(head: Callable) -> Callable:
    """Like `diffusion.token_losses`, but a function of hidden states [K, D] instead of logits."""
    return lambda hidden, targets: TokenLosses.apply(hidden, targets, head)
