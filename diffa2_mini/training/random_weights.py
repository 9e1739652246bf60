"""Random weights in place of a download: to try a machine, or to measure its speed."""

import torch
from torch import nn


def fill_at_random(device: torch.device, dtype: torch.dtype, *modules: nn.Module) -> None:
    """Norms become the identity, biases zero, and the rest has a deviation of 0.02. The same few
    million numbers serve everywhere: drawing billions would take minutes."""
    pool = torch.empty(4_194_301, device=device, dtype=dtype)  # a prime, so that rows differ
    pool.normal_(0, 0.02)
    for module in modules:
        module.to(dtype).to_empty(device=device)
        for name, tensor in module.state_dict().items():
            if tensor.dim() == 1:
                tensor.fill_(0 if name.endswith("bias") else 1)
            else:
                for piece in tensor.view(-1).split(len(pool)):
                    piece.copy_(pool[:len(piece)])
