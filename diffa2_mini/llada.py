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
    """x / rms(x) * weight, the mean of squares taken in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary(n_positions: int, head_width: int, theta: float, device=None) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [S, head_width/2], of the angles position / theta^(2i / head_width) (arXiv 2104.09864)."""
    frequencies = theta ** -(torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angles = torch.outer(torch.arange(n_positions, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i + width/2}) by its angle, in float32. x: [B, H, S, head_width]."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
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

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attn_norm(x), rotation, mask)
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))

    def attention(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        B, S, D = x.shape
        q, k, v = (proj(x).view(B, S, self.n_heads, -1).transpose(1, 2)  # [B, H, S, D/H]
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v, attn_mask=mask)
        return self.attn_out(y.transpose(1, 2).reshape(B, S, D))


class Llada(nn.Module):
    """Embeddings in, predictions out. `forward` stops before the head: only masked positions need logits, and with a
    vocabulary of 126,464 the rest would be most of the memory."""

    def __init__(self, config: LladaConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # gradient checkpointing: keep only the blocks' inputs for the backward pass
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.width, config.norm_eps)
        self.ff_out = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Final hidden states [B, S, D] of embeddings x [B, S, D]. `real` [B, S] is False at padding, which nothing
        attends to; None means no padding."""
        mask = None if real is None else real[:, None, None, :]  # [B, 1, 1, S]: every query sees the real keys
        rotation = rotary(x.shape[1], self.config.width // self.config.n_heads, self.config.rope_theta, x.device)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, mask, use_reentrant=False)
            else:
                x = block(x, rotation, mask)
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.ff_out(hidden)
