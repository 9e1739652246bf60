"""Whisper's encoder: log-mel in, hidden states out (arXiv 2212.04356, section 2.2).

Two convolutions, the second with stride 2, give 50 frames a second; fixed sinusoids encode the
position, and pre-norm transformer blocks follow. All of it is frozen in all four stages. The
semantic adapter takes the last hidden state, the acoustic adapter several (`taps`). Module names
are those of OpenAI's published weights, below `encoder`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import WhisperConfig


def sinusoids(n_positions: int, width: int) -> Tensor:
    """Position table, float32 [n_positions, width]: the sines of p / 10000^(i / (width/2 - 1)) for
    position p and i < width/2, then their cosines."""
    half = width // 2
    rates = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float32), rates)  # [T, width/2]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SelfAttention(nn.Module):
    """Multi-head attention of every frame to every frame. The key projection has no bias."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, E = x.shape
        q, k, v = (proj(x).view(B, T, self.n_heads, -1).transpose(1, 2)  # [B, H, T, E/H]
                   for proj in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, T, E))


class EncoderBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.attn_ln = nn.LayerNorm(width)
        self.attn = SelfAttention(width, n_heads)
        self.mlp_ln = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_ln(x))
        return x + self.mlp(self.mlp_ln(x))


class WhisperEncoder(nn.Module):
    """log-mel [B, n_mels, M] -> hidden states, M = 2T. T = `n_positions`: clips are padded."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.n_mels, config.width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, kernel_size=3, stride=2, padding=1)
        self.register_buffer("positional_embedding", sinusoids(config.n_positions, config.width))
        self.blocks = nn.ModuleList(
            EncoderBlock(config.width, config.n_heads) for _ in range(config.n_layers))
        self.ln_post = nn.LayerNorm(config.width)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the final hidden state [B, T, E], and those of the taps [B, N, T, E]."""
        x = F.gelu(self.conv1(mel))  # [B, E, M]
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # [B, E, T] -> [B, T, E]
        T = self.config.n_positions
        assert x.shape[1] == T, f"expected {T} frames, got {x.shape[1]}"
        x = x + self.positional_embedding.to(x.dtype)
        states = [x]
        for block in self.blocks:
            x = block(x)
            states.append(x)
        states[-1] = final = self.ln_post(x)  # Hugging Face's last one is normalised too
        return final, torch.stack([states[i] for i in self.config.taps], dim=1)
