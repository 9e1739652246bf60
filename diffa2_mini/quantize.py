"""Quantisation: frozen weights in 8 or 4 bits, so that the model fits a small card.

Nearly all weights are in linear layers. They are kept as small codes and a few scales, and turned
back when a layer multiplies, a slice of rows at a time:

    int8   scale * code: whole numbers up to 127, a scale for each row         8 bits a weight
    nf4    scale * level[code]: 16 levels, a scale for each 64 weights      4.13
    fp8    as int8, in 8-bit floating point, and multiplied as it is           8

NF4 and training on it are QLoRA's (arXiv 2305.14314, section 3): the levels are quantiles of the
normal distribution, as weights are about normal, and scales are quantised again. Gradients pass,
but not through fp8; the backward pass turns the codes back once more, so that nothing is kept.
What differs: QLoRA's scales become 8-bit floating point, ours whole numbers.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIECE, ROWS = 2**22, 2**14  # weights turned into codes at once; rows turned back at once
BLOCK, GROUP = 64, 256  # of NF4: weights to a scale, and scales to a scale of theirs
TINY = torch.finfo(torch.float32).tiny  # what we divide by where a scale is 0


def nf4_levels() -> Tensor:
    """The levels of NF4, float32 [16], from -1 to 1: quantiles of the normal distribution, 8 above
    0, 7 below, and 0 itself, which zeros need (appendix E)."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2  # a probability; 1 would be infinitely far out

    def quantiles(n: int) -> Tensor:  # of n even steps from the outermost to the middle, without it
        return torch.special.ndtri(torch.linspace(outermost, 0.5, n + 1, dtype=torch.float64)[:-1])

    levels = torch.cat([-quantiles(7), torch.zeros(1), quantiles(8).flip(0)])
    return (levels / levels.max()).float()


def scaled(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [n, m] as scales float32 [n, 1] times codes [n, m] of `dtype`, int8 or float8 (e4m3):
    the largest absolute value of a row has the largest code."""
    is_whole = dtype == torch.int8
    scale = rows.float().abs().amax(dim=1, keepdim=True) / (127 if is_whole else 448)
    codes = rows / scale.clamp(min=TINY)  # float32
    return scale, (codes.round() if is_whole else codes).to(dtype)


def nearest_levels(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [n, 64] as scales float32 [n, 1] times levels of NF4, two codes to a byte [n, 32]."""
    scale, levels = blocks.abs().amax(dim=1, keepdim=True), nf4_levels().to(blocks.device)
    ratios, codes = blocks / scale.clamp(min=TINY), torch.zeros_like(blocks, dtype=torch.uint8)
    for middle in (levels[1:] + levels[:-1]) / 2:
        codes += ratios > middle  # [n, 64]
    return scale, codes[:, ::2] * 16 + codes[:, 1::2]


def in_pieces(function: Callable, matrix: Tensor) -> list[Tensor]:
    """What a function of rows returns for a matrix, of which little at once is in float32."""
    pieces = [function(piece.float()) for piece in matrix.split(max(1, PIECE // matrix.shape[1]))]
    return [torch.cat(tensors) for tensors in zip(*pieces)]


class Product(torch.autograd.Function):
    """x [..., in] times the weight of a layer, [..., out]. Only x has a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "QuantizedLinear") -> Tensor:
        ctx.layer = layer
        return torch.cat([F.linear(x, rows) for rows in layer.slices(x.dtype)], dim=-1)

    @staticmethod
    def backward(ctx, by_y: Tensor) -> tuple[Tensor, None]:
        slices = zip(by_y.split(ROWS, dim=-1), ctx.layer.slices(by_y.dtype))
        return sum(piece @ rows for piece, rows in slices), None  # [..., in]


class QuantizedLinear(nn.Module):
    """A frozen linear layer of a weight [out, in]. Each kind has codes, and `rows`, which turns
    those from `start` to `stop` back into [stop - start, in] of `dtype`."""
    multiple = 1  # of which both widths must be one

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None):
        super().__init__()
        (self.out_features, self.in_features), self.bias = weight.shape, bias

    def slices(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight in `dtype`, a slice of its rows at a time."""
        for start in range(0, self.out_features, ROWS):
            yield self.rows(start, min(start + ROWS, self.out_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = Product.apply(x, self)
        return y if self.bias is None else y + self.bias


class Int8Linear(QuantizedLinear):
    """Whole numbers of 8 bits, and a scale for each row."""
    dtype = torch.int8  # of the codes

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None):
        super().__init__(weight, bias)
        scale, codes = in_pieces(lambda rows: scaled(rows, self.dtype), weight)
        self.register_buffer("scale", scale)  # float32 [out, 1]
        self.register_buffer("codes", codes)  # [out, in]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.codes[start:stop].to(dtype).mul_(self.scale[start:stop])


def float8_product(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """x [..., in] times a weight of codes [out, in] and scales [out, 1]; a scale for each token."""
    scale, codes = scaled(x.flatten(0, -2), weight.dtype)  # [n, 1], [n, in]
    y = torch._scaled_mm(codes, weight.T, scale, weight_scale.T, out_dtype=torch.bfloat16,
                         use_fast_accum=True)  # [n, out]
    return y.view(*x.shape[:-1], -1).to(x.dtype)


class Float8Linear(Int8Linear):
    """8-bit floating point, multiplied as it is."""
    dtype, multiple = torch.float8_e4m3fn, 16

    def forward(self, x: Tensor) -> Tensor:
        y = float8_product(x, self.codes, self.scale)
        return y if self.bias is None else y + self.bias


class Nf4Linear(QuantizedLinear):
    """Two codes to a byte for the levels of NF4, and 8-bit scales."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None):
        super().__init__(weight, bias)
        blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        scale, codes = in_pieces(nearest_levels, blocks)
        self.register_buffer("mean", scale.mean())
        groups = F.pad((scale - self.mean).flatten(), (0, -len(scale) % GROUP)).view(-1, GROUP)
        scale, scale_codes = scaled(groups, torch.int8)
        pairs = torch.cartesian_prod(nf4_levels(), nf4_levels()).to(weight.device)
        self.register_buffer("scale", scale)  # of those, float32 [groups, 1]
        self.register_buffer("scale_codes", scale_codes)  # int8 [groups, 256]
        self.register_buffer("codes", codes)  # uint8 [blocks, 32]
        self.register_buffer("pairs", pairs, persistent=False)  # of levels, for a byte: [256, 2]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        n, first = (stop - start) * self.in_features, start * self.in_features // BLOCK
        blocks = slice(first, first + -(-n // BLOCK))  # as many as n weights take
        scale = (self.scale * self.scale_codes + self.mean).view(-1, 1)[blocks]  # [blocks, 1]
        values = F.embedding(self.codes[blocks].int(), self.pairs.to(dtype))  # [blocks, 32, 2]
        return values.flatten(1).mul_(scale).flatten()[:n].view(-1, self.in_features)


KINDS = {"int8": Int8Linear, "nf4": Nf4Linear, "fp8": Float8Linear}


def quantize_linears(module: nn.Module, kind: str, weight_of: Callable[[str], Tensor]) -> None:
    """Put a layer of `kind`, one of KINDS, in place of each linear layer of a module; `weight_of`
    gives the weights by name, so that no two need be in memory at once. Biases stay."""
    new = KINDS[kind]
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear and not any(n % new.multiple for n in layer.weight.shape):
            module.set_submodule(name, new(weight_of(f"{name}.weight").detach(), layer.bias))
