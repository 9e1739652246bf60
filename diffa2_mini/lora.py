"""LoRA: learn a low-rank change of a frozen weight, here from stage 3 on (arXiv 2106.09685).

y = W x + (alpha / r) B A x, with A [r, in] random and B [out, r] zero: at first nothing changes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import LoraConfig


class LoraLinear(nn.Linear):
    """A linear layer without bias, whose weight keeps its name, plus a low-rank change. If it is
    quantised, there is no weight, and the layer as it was is `quantized`."""

    def __init__(self, linear: nn.Module, config: LoraConfig):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        is_plain = isinstance(linear, nn.Linear)
        self.weight = linear.weight if is_plain else None  # the one on `meta` took no memory
        self.quantized = None if is_plain else linear
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(0.0)
        first = next(iter(linear.state_dict().values()))  # the weight, or a scale in float32
        like = dict(device=first.device, dtype=torch.promote_types(first.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(config.rank, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, config.rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = self.scale * F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # [..., r]
        y = self.quantized(x) if self.quantized else F.linear(x, self.weight)
        return y + F.linear(low, self.lora_B.to(x.dtype))

    def merged(self) -> nn.Linear:
        """A plain layer with the weight W + (alpha / r) B A."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
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
