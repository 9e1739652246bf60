"""LLaDA, the mask predictor: a LLaMA-style transformer that looks both ways (arXiv 2502.09992, section 2.1).

It takes a sequence in which some tokens are [MASK] and predicts, for each of them at once, the token that was there.
There is no causal mask, and no time embedding: the number of masks tells the model the time. Module names are those of
the published weights, below `model.transformer`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .config import LladaConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean of squares taken in float32 at least (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [..., head_width/2], of the angles position / theta^(2i / head_width) for `positions` [...]
    (arXiv 2104.09864)."""
    frequencies = theta ** -(torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i + width/2}) by its angle, in float32 at least. x: [B, H, S, head_width]; cosine and sine: [S,
    head_width/2] or [B, 1, S, head_width/2]."""
    cos, sin = rotation
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU feed-forward, each added to the residual stream. No biases."""

    def __init__(self, config: LladaConfig):
        super().__init__()
        width, hidden, self.n_heads = config.width, config.hidden, config.n_heads
        self.attn_norm = RMSNorm(width, config.norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, config.norm_eps)
        self.ff_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: Tensor | None = None,
                columns: Tensor | None = None, first: int = 0, recompute: bool = False) -> Tensor:
        x = x[:, first:] + self.attention(self.attn_norm(x), rotation, mask, cache, columns, first)
        return x + (checkpoint(self.feed_forward, x, use_reentrant=False) if recompute else self.feed_forward(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        h = self.ff_norm(x)
        return self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))

    def attention(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: Tensor | None,
                  columns: Tensor | None, first: int) -> Tensor:
        B, S, D = x.shape
        k, v = (proj(x).view(B, S, self.n_heads, -1).transpose(1, 2) for proj in (self.k_proj, self.v_proj))  # [B, H, S, D/H]
        q = self.q_proj(x[:, first:]).view(B, S - first, self.n_heads, -1).transpose(1, 2)
        q, k = rotate(q, [part[..., first:, :] for part in rotation]), rotate(k, rotation)
        if cache is not None:  # keys and values of the whole sequence, [2, B, H, all, D/H]: renew ours, attend to all
            k, v = cache[0].index_copy_(2, columns, k), cache[1].index_copy_(2, columns, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.attn_out(y.transpose(1, 2).reshape(B, S - first, D))


class Llada(nn.Module):
    """Embeddings in, predictions out. `forward` stops before the head: only masked positions need logits, and with a
    vocabulary of 126,464 the rest would be most of the memory."""

    def __init__(self, config: LladaConfig):
        super().__init__()
        self.config = config
        self.recompute = "nothing"  # gradient checkpointing: what the backward pass computes again, or "feed-forward", "blocks"
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.width, config.norm_eps)
        self.ff_out = nn.Linear(config.width, config.vocab_size, bias=False)

    def empty_cache(self, n_rows: int, n_columns: int) -> list[Tensor]:
        """Room for the keys and values of each block, [2, B, H, S, D/H], in the dtype in which they are computed."""
        key = self.blocks[0].k_proj(self.wte.weight[:1])
        shape = (2, n_rows, self.config.n_heads, n_columns, self.config.width // self.config.n_heads)
        return [key.new_zeros(shape) for _ in self.blocks]

    def forward(self, x: Tensor, real: Tensor | None = None, positions: Tensor | None = None,
                cache: list[Tensor] | None = None, columns: Tensor | None = None, first: int = 0) -> Tensor:
        """Final hidden states of embeddings x [B, S, D]; those from column `first` on, [B, S - first, D].

        `real` [B, S] is False at padding, which nothing attends to ([B, S, S]: what each may attend to); None means no
        padding. `positions` [B, S] says where each embedding stands; None means 0, 1, 2, ... With a `cache`, x may be a slice
        of the sequence, its `columns` [S]: their keys and values are renewed, and the others, to which x also attends, are as
        they were left. `real` is then that of the whole sequence.
        """
        mask = None if real is None else real.reshape(len(real), 1, -1, real.shape[-1])  # [B, 1, 1 or S, S]
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        rotation = rotary(positions[:, None], self.config.width // self.config.n_heads, self.config.rope_theta)
        recompute = self.recompute if torch.is_grad_enabled() else "nothing"
        for i, block in enumerate(self.blocks):
            from_here = first if i + 1 == len(self.blocks) else 0  # the last block need not give more
            if recompute == "blocks":
                x = checkpoint(block, x, rotation, mask, None, None, from_here, use_reentrant=False)
            else:
                x = block(x, rotation, mask, cache and cache[i], columns, from_here, recompute == "feed-forward")
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.ff_out(hidden)
