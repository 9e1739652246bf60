"""Steps of the optimiser, as both halves of stage 0 take them."""

import math

import torch
from torch import Tensor

REPORT_EVERY = 500  # steps

def learning_rate(step: int, n_steps: int, warmup: int) -> float:
    """Factor of the learning rate: up in a line, then down along a half cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def update(optimizer: torch.optim.Optimizer, parameters: list, loss: Tensor, lr: float) -> None:
    """One step of the optimiser, gradients clipped to a norm of 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def running_mean(mean: float | Tensor, value: float | Tensor) -> float | Tensor:
    """The mean of about the last 50 values, to be printed. A tensor stays where it is."""
    return 0.98 * mean + 0.02 * value
