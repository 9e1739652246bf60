"""LLaDA, the mask predictor: LLaMA with bidirectional attention (arXiv 2502.09992, section 2.2).

Some tokens of its input are [MASK]; for all of these at once it predicts the token that was there.
There is no causal mask, and no time embedding: the number of masks tells the time. Module names are
those of the published weights, below `model.transformer`.

What differs: nothing in the numbers. `fast/llada.py` computes the same with less work and memory.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import LladaConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 or wider (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [..., head_width/2], of position / theta^(2i / head_width) for each
    of `positions` [...] and i < head_width/2 (arXiv 2104.09864)."""
    even = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    frequencies = theta ** -(even / head_width)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x_i, x_{i + width/2}) by its angle, in float32 or wider. x is [B, H, S,
    D/H]; cosine and sine are [B or 1, 1, S, D/(2H)]."""
    cos, sin = rotation
    left, right = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU feed-forward (arXiv 2002.05202), each added to x. No biases."""

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

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None = None,
                cache=None) -> Tensor:
        """x [B, S, D] -> [B, S, D]. The attention mask, bool [B, 1, 1 or S, S], is True where a
        token may attend. With a `cache`, x is only a slice of the sequence: `cache.update(k, v)`
        gives the keys and values of all of it."""
        x = x + self.attention(x, rotation, mask, cache)
        return x + self.feed_forward(x)

    def attention(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None,
                  cache) -> Tensor:
        h = self.attn_norm(x)
        q, k, v = (self.heads(proj(h)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.update(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, S, D/H]
        return self.attn_out(y.transpose(1, 2).reshape(x.shape))  # [B, S, D]

    def heads(self, y: Tensor) -> Tensor:
        """[B, S, D] -> [B, H, S, D/H]"""
        return y.view(*y.shape[:2], self.n_heads, -1).transpose(1, 2)

    def feed_forward(self, x: Tensor) -> Tensor:
        h = self.ff_norm(x)
        return self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class Llada(nn.Module):
    """Embeddings in, hidden states out. The head is separate, `logits`: only masked positions need
    it, and with a vocabulary of 126,464 the other logits would take most of the memory."""

    block = Block  # fast/llada.py has another

    def __init__(self, config: LladaConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.width, config.norm_eps)
        self.ff_out = nn.Linear(config.width, config.vocab_size, bias=False)  # the head

    def forward(self, x: Tensor, valid: Tensor | None = None, positions: Tensor | None = None,
                caches: list | None = None, first: int = 0) -> Tensor:
        """Final hidden states [B, S - first, D] of the embeddings x [B, S, D] from `first` on.

        Args:
            valid: bool [B, S], False at padding, which nothing attends to; or an attention mask,
                bool [B, S, S], True where row may attend to column. None means no padding.
            positions: of each embedding, for the rotary embedding [B, S]. None means 0, 1, 2, ...
            caches: one per block. x is then a slice of the sequence, and `valid` is of all of it.
        """
        rotation, mask = self.rotation_and_mask(x, valid, positions)
        for i, block in enumerate(self.blocks):
            x = block(x, rotation, mask, caches and caches[i])
        return self.ln_f(x[:, first:])

    def rotation_and_mask(self, x: Tensor, valid: Tensor | None, positions: Tensor | None
                          ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """What all blocks share: the rotary embedding's cosine and sine, and the attention mask."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        head_width = self.config.width // self.config.n_heads
        # [B, 1, S, D/(2H)] each
        rotation = rotary(positions[:, None], head_width, self.config.rope_theta)
        if valid is not None:
            valid = valid.reshape(len(valid), 1, -1, valid.shape[-1])  # [B, 1, 1 or S, S]
        return rotation, valid

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.ff_out(hidden)
