"""Random weights in place of a download: to try a machine, or to measure its speed."""

import torch
from torch import nn


def fill_at_random(device: torch.device, dtype: torch.dtype, *modules: nn.Module) -> None:
    """Norms become the identity, biases zero, and the rest has a deviation of 0.02. The same few
    million numbers serve all of a module: drawing billions would take minutes."""
    for module in modules:
        pool = torch.empty(4_194_301, device=device, dtype=dtype)  # a prime, so that rows differ
        pool.normal_(0, 0.02)
        filled = {}
        for name, tensor in module.state_dict().items():
            if tensor.dim() == 1:
                value = 0.0 if name.endswith("bias") else 1.0
                filled[name] = torch.full(tensor.shape, value, device=device, dtype=dtype)
            else:
                n, times = tensor.numel(), tensor.numel() // len(pool) + 1
                filled[name] = pool.repeat(times)[:n].clone().view(tensor.shape)
        module.load_state_dict(filled, assign=True)
