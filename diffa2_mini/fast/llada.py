"""The mask predictor of llada.py, with less work and less memory for the same results.

* The last block has queries and a feed-forward for the response alone, from `first` on.
* Gradient checkpointing (arXiv 1604.06174): whole blocks, or only their feed-forward layers, are
  computed again in the backward pass instead of being kept: `recompute`.
* Decoding: query, key and value as one product, and both into the feed-forward: `fused_block`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..llada import Block, Llada, rotate
from ..lora import LoraLinear
from ..quantize import Float8Linear, float8_product

# a matrix, or codes of 8 bits and their scales; and LoRA's A, B and scale of each layer in it
Weight = tuple[tuple[Tensor, ...], list[tuple[Tensor, Tensor, float]]]


class FastBlock(Block):
    """A block whose output begins at token `first`, and which can recompute its feed-forward."""

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None = None,
                cache=None, first: int = 0, recompute: bool = False) -> Tensor:
        x = x[:, first:] + self.attention(x, rotation, mask, cache, first)
        if recompute:
            return x + checkpoint(self.feed_forward, x, use_reentrant=False)
        return x + self.feed_forward(x)

    def attention(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache,
                  first: int = 0) -> Tensor:
        h, (cos, sin) = self.attn_norm(x), rotation
        q = self.heads(self.q_proj(h[:, first:]))  # [B, H, S - first, D/H]
        q = rotate(q, (cos[..., first:, :], sin[..., first:, :]))
        k, v = rotate(self.heads(self.k_proj(h)), rotation), self.heads(self.v_proj(h))
        if cache is not None:
            k, v = cache.update(k, v)
        mask = mask if mask is None else mask[:, :, -q.shape[2]:]  # if it has a row for each token
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, S - first, D/H]
        return self.attn_out(y.transpose(1, 2).flatten(2))  # [B, S - first, D]


def join(*parts: Tensor) -> Tensor:
    """Matrices of one shape as one, of which they become slices, so that none is there twice."""
    first, n = parts[0], len(parts)
    at = [(part.untyped_storage().data_ptr(), part.data_ptr()) for part in parts]
    if at != [(at[0][0], at[0][1] + i * first.nbytes) for i in range(n)]:
        for part, joined in zip(parts, torch.cat([part.data for part in parts]).chunk(n)):
            part.data = joined
    return first.data.as_strided((n * len(first), first.shape[1]), first.stride()).data


def weight_of(*layers: nn.Module) -> Weight | None:
    """The weights of layers of one kind as one; None if they are in int8 or nf4."""
    frozen = [getattr(layer, "quantized", None) or layer for layer in layers]
    if len({*map(type, layers)}) > 1 or not isinstance(frozen[0], (nn.Linear, Float8Linear)):
        return None
    names = ("codes", "scale") if isinstance(frozen[0], Float8Linear) else ("weight",)
    loras = (layer for layer in layers if isinstance(layer, LoraLinear))
    return (tuple(join(*(getattr(each, name) for each in frozen)) for name in names),
            [(layer.lora_A.data, layer.lora_B.data, layer.scale) for layer in loras])


def fuse(block: Block) -> tuple | None:
    """The weights of a block for `fused_block`; None if it is in int8 or nf4."""
    weights = (weight_of(block.q_proj, block.k_proj, block.v_proj), weight_of(block.attn_out),
               weight_of(block.ff_proj, block.up_proj), weight_of(block.ff_out))
    return None if None in weights else (
        block.attn_norm.weight.data, block.ff_norm.weight.data, *weights)


def product(x: Tensor, weight: Weight) -> Tensor:
    """x [..., in] times a weight [out, in], [..., out]."""
    matrix, loras = weight
    y = F.linear(x, *matrix) if len(matrix) == 1 else float8_product(x, *matrix)
    changes = [F.linear(scale * F.linear(x, A.to(x.dtype)), B.to(x.dtype)) for A, B, scale in loras]
    return y + torch.cat(changes, dim=-1) if changes else y


def fused_block(x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor,
                cache: tuple[Tensor, Tensor, Tensor], weights: tuple, sizes: tuple[int, float]
                ) -> Tensor:
    """A block, x [B, n, D] -> [B, n, D]. `cache`: keys and values [B, H, S, D/H], which are renewed
    at the positions [n]. `sizes`: the number of heads, and the norms' eps."""
    def norm(x: Tensor, weight: Tensor) -> Tensor:  # as RMSNorm
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    (n_heads, eps), (keys, values, at) = sizes, cache
    attn_norm, ff_norm, qkv, attn_out, inner, ff_out = weights
    heads = product(norm(x, attn_norm), qkv).unflatten(2, (3, n_heads, -1))  # [B, n, 3, H, D/H]
    q, k, v = heads.permute(2, 0, 3, 1, 4)  # [B, H, n, D/H] each
    keys.index_copy_(2, at, rotate(k, rotation))
    values.index_copy_(2, at, v)
    y = F.scaled_dot_product_attention(rotate(q, rotation), keys, values, attn_mask=mask)
    x = x + product(y.transpose(1, 2).flatten(2), attn_out)  # [B, H, n, D/H] -> [B, n, D]
    gate, up = product(norm(x, ff_norm), inner).chunk(2, dim=-1)
    return x + product(F.silu(gate) * up, ff_out)


class FastLlada(Llada):
    """Llada with the same weights, names and results."""

    block = FastBlock
    recompute = "nothing"  # or "feed-forward" or "blocks": what the backward pass repeats

    def forward(self, x: Tensor, valid: Tensor | None = None, positions: Tensor | None = None,
                caches: list | None = None, first: int = 0) -> Tensor:
        rotation, mask = self.rotation_and_mask(x, valid, positions)
        recompute = self.recompute if torch.is_grad_enabled() else "nothing"
        for i, block in enumerate(self.blocks):
            begin = first if i + 1 == len(self.blocks) else 0  # in the last block alone
            if recompute == "blocks":
                x = checkpoint(block, x, rotation, mask, None, begin, use_reentrant=False)
            else:
                cache = caches and caches[i]
                x = block(x, rotation, mask, cache, begin, recompute == "feed-forward")
        return self.ln_f(x)
