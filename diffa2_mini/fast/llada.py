"""The mask predictor of llada.py, with less work and less memory for the same results.

* The last block has queries and a feed-forward for the response alone, from `first` on.
* Gradient checkpointing (arXiv 1604.06174): whole blocks, or only their feed-forward layers, are
  computed again in the backward pass instead of being kept: `recompute`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..llada import Block, Llada, rotate

RECOMPUTE = ("nothing", "feed-forward", "blocks")


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
        h = self.attn_norm(x)
        cos, sin = rotation
        q = self.heads(self.q_proj(h[:, first:]))  # [B, H, S - first, D/H]
        q = rotate(q, (cos[..., first:, :], sin[..., first:, :]))
        k, v = rotate(self.heads(self.k_proj(h)), rotation), self.heads(self.v_proj(h))
        if cache is not None:
            k, v = cache.update(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, S - first, D/H]
        return self.attn_out(y.transpose(1, 2).flatten(2))  # [B, S - first, D]


class FastLlada(Llada):
    """Llada with the same weights, names and results."""

    block = FastBlock
    recompute = "nothing"  # one of RECOMPUTE: what the backward pass computes again

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
