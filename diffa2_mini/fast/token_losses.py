"""The cross-entropies of diffusion.py without all logits at once.

With a vocabulary of 126,464, logits and their gradient would be most of the memory of a training
step. The gradient of a loss with respect to its logits is p - 1 at the token and p elsewhere: it
can be made with the loss, where the logits were, a few tokens at a time. So memory does not grow
with K * V.
"""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 256  # tokens whose logits exist at once


class TokenLosses(torch.autograd.Function):
    """The losses [K] of K tokens `targets` [K] from their hidden states [K, D]. `head` gives logits
    [..., V] and gets no gradient itself."""

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, head: Callable) -> Tensor:
        losses, gradients = [], []
        chunks = zip(hidden.split(CHUNK), targets[:, None].split(CHUNK), strict=True)
        for states, tokens in chunks:  # [k, D], [k, 1]
            with torch.enable_grad():
                states = states.detach().clone().requires_grad_()
                logits = head(states)  # [k, V], to be written over: their memory is needed once
            scores = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
            highest = scores.max(-1, keepdim=True).values  # [k, 1]
            own = scores.gather(-1, tokens)  # [k, 1]
            total = scores.sub_(highest).exp_().sum(-1, keepdim=True)  # [k, 1]
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


def token_losses(head: Callable) -> Callable:
    """What takes the place of `diffusion.token_losses`, for hidden states instead of logits."""
    return lambda hidden, targets: TokenLosses.apply(hidden, targets, head)
