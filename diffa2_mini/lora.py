"""LoRA: learn a low-rank change of a frozen weight, here from stage 3 on (arXiv 2106.09685).

y = W x + (alpha / r) B A x, with A [r, in] random and B [out, r] zero: at first nothing changes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import LoraConfig


class LoraLinear(nn.Module):
    """A linear layer without bias, quantised or not, plus a low-rank change."""

    def __init__(self, linear: nn.Module, config: LoraConfig):
        super().__init__()
        self.linear = linear
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(0.0)
        first = next(iter(linear.state_dict().values()))  # the weight, or a scale in float32
        like = dict(device=first.device, dtype=torch.promote_types(first.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(config.rank, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, config.rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = self.scale * F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # [..., r]
        return self.linear(x) + F.linear(low, self.lora_B.to(x.dtype))

    @property
    def weight(self) -> nn.Parameter:
        """W, of a layer that is not quantised."""
        return self.linear.weight

    def merged(self) -> nn.Linear:
        """A plain layer with the weight W + (alpha / r) B A."""
        linear = nn.Linear(*self.weight.shape[::-1], bias=False, device="meta")
        change = self.scale * self.lora_B @ self.lora_A  # [out, in]
        weight = (self.weight + change).to(self.weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Put a LoraLinear in place of each linear layer whose name is one of `config.targets`."""
    for name, module in list(model.named_modules()):
        if name.split(".")[-1] in config.targets and not isinstance(module, LoraLinear):
            model.set_submodule(name, LoraLinear(module, config))


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Fold every LoraLinear into a plain linear layer, for inference."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            model.set_submodule(name, module.merged())
