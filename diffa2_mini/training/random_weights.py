"""Random weights in place of a download: to try a machine, or to measure its speed."""

import torch
from torch import Tensor, nn

from ..quantize import quantize_linears


def fill_at_random(device: torch.device, dtype: torch.dtype, *modules: nn.Module,
                   quantize: str | None = None) -> None:
    """Norms become the identity, biases zero, and the rest has a deviation of 0.02, with linear
    layers quantised as in `load_part`. The same few million numbers serve everywhere: drawing
    billions would take minutes."""
    # a prime, so that rows differ
    pool = torch.empty(4_194_301, device=device, dtype=dtype).normal_(0, 0.02)

    def filled(name: str, like: Tensor) -> Tensor:
        tensor = torch.empty(like.shape, device=device, dtype=dtype)
        if tensor.dim() == 1:
            return tensor.fill_(0 if name.endswith("bias") else 1)
        for piece in tensor.view(-1).split(len(pool)):
            piece.copy_(pool[:len(piece)])
        return tensor

    for module in modules:
        empty = module.state_dict()
        if quantize:
            quantize_linears(module, quantize, lambda name, of=empty: filled(name, of.pop(name)))
        module.load_state_dict({name: filled(name, like) for name, like in empty.items()},
                               strict=not quantize, assign=True)
