"""The two adapters between encoder and backbone (arXiv 2601.23161, section 3.2).

The semantic adapter keeps the order in time, for *what was said*: convolutions reduce 50 frames a
second to 12.5 embeddings. The acoustic adapter is for *how it sounded*: a Q-Former (arXiv
2301.12597), whose learned queries attend to several depths of the encoder; it always gives the same
number of embeddings. Module names are those of the published weights.

What differs: in a batch, the release keeps embeddings of short clips' padding, this does not. Of
`small` the acoustic adapter standardises taps (`fitted`), and passes over padding (`only_sound`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import AdapterConfig, WhisperConfig


class SemanticAdapter(nn.Module):
    """Final hidden state [B, T, E] -> embeddings [B, A, D] of its own, A = max(n_frames) // 4.

    A clip with sound in n frames has n // 4 valid embeddings. Embedding j depends on the frames
    4j - 2 to 4j + 2, so valid ones read no frame of padding, and are the same in every batch.
    """

    def __init__(self, config: AdapterConfig, width: int, out_width: int):
        super().__init__()
        self.stride = config.semantic_stride
        wide = width * self.stride
        self.conv = nn.Sequential(
            nn.Conv1d(width, width, kernel_size=3, padding=1), nn.GELU(),
            nn.Conv1d(width, wide, kernel_size=3, stride=self.stride, padding=1))
        self.linear_connector = nn.Sequential(nn.Linear(wide, width), nn.ReLU(),
                                              nn.Linear(width, out_width), nn.ReLU())
        self.layernorm = nn.LayerNorm(out_width)

    def forward(self, final: Tensor, n_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Returns embeddings [B, A, D], up to the longest clip's, and how many are valid [B]."""
        n_valid = n_frames // self.stride
        T = int(n_valid.max()) * self.stride
        if T == 0:
            return final.new_zeros(len(final), 0, self.layernorm.weight.numel()), n_valid
        x = self.conv(final[:, :T].transpose(1, 2)).transpose(1, 2)  # [B, T, E] -> [B, A, 4E]
        return self.layernorm(self.linear_connector(x)), n_valid


class Attention(nn.Module):
    """Attention from x [B, Q, E] to `memory` [B, T, E], added to x and then normalised (post-norm,
    as in BERT); self-attention if memory is x. Weights and what is added have BERT's dropout."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.0)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, memory: Tensor, valid: Tensor | None = None) -> Tensor:
        """`valid`, bool [B, 1, 1, T], is False where `memory` is not to be attended to."""
        def heads(y):  # [B, Q or T, E] -> [B, H, Q or T, E/H]
            return y.view(y.shape[0], y.shape[1], self.n_heads, -1).transpose(1, 2)

        q, k, v = heads(self.query(x)), heads(self.key(memory)), heads(self.value(memory))
        p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, valid, dropout_p=p)  # [B, H, Q, E/H]
        y = y.transpose(1, 2).reshape(x.shape)  # [B, Q, E]
        return self.LayerNorm(x + self.dropout(self.dense(y)))


class QFormerLayer(nn.Module):
    """Queries [B, Q, E] attend to each other, then to frames [B, T, E]; a feed-forward follows."""

    def __init__(self, config: AdapterConfig, width: int, n_heads: int):
        super().__init__()
        self.attention = Attention(width, n_heads)
        self.crossattention = Attention(width, n_heads)
        self.intermediate = nn.Linear(width, config.qformer_hidden)
        self.output = nn.Linear(config.qformer_hidden, width)
        self.dropout = nn.Dropout(0.0)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, queries: Tensor, frames: Tensor, valid: Tensor | None = None) -> Tensor:
        x = self.crossattention(self.attention(queries, queries), frames, valid)
        return self.LayerNorm(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))


class AcousticAdapter(nn.Module):
    """Hidden states of N taps [B, N, T, E] -> Q embeddings [B, Q, D].

    Each tap has its own queries. All taps share one decoder. It attends to all T frames, those of
    padding too; with `only_sound`, to the `n_frames` [B] of each clip that hold sound. If `fitted`,
    each channel of a tap first gets mean 0 and variance 1 (data/pretraining/fit.py). The outputs
    are averaged over taps with learned weights per query. The queries get no dropout: the release
    bypasses BERT's embeddings, which have it.
    """

    def __init__(self, config: AdapterConfig, whisper: WhisperConfig, out_width: int):
        super().__init__()
        n_taps, width, self.config = len(whisper.taps), whisper.width, config
        if config.fitted:
            self.register_buffer("mean", torch.zeros(n_taps, 1, width))
            self.register_buffer("std", torch.ones(n_taps, 1, width))
        self.layer_prompts = nn.ParameterList(
            nn.Parameter(torch.randn(1, config.n_queries, width)) for _ in range(n_taps))
        self.layer_weights = nn.Parameter(torch.zeros(config.n_queries, n_taps))
        self.qformer = nn.ModuleList(
            QFormerLayer(config, width, whisper.n_heads) for _ in range(config.qformer_layers))
        self.proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out_width))

    def forward(self, taps: Tensor, n_frames: Tensor | None = None) -> Tensor:
        valid = None  # or bool [B * N, 1, 1, T], for all heads and queries
        if self.config.only_sound:
            taps = taps[:, :, :int(n_frames.max())]
            columns = torch.arange(taps.shape[2], device=taps.device)
            valid = columns < n_frames.repeat_interleave(taps.shape[1])[:, None, None, None]
        if self.config.fitted:
            taps = (taps - self.mean) / self.std
        B, N, T, E = taps.shape
        x = torch.cat(list(self.layer_prompts)).repeat(B, 1, 1)  # [N, Q, E] -> [B * N, Q, E]
        for layer in self.qformer:
            x = layer(x, taps.reshape(B * N, T, E), valid)  # [B * N, Q, E]
        weights = self.layer_weights.softmax(dim=-1)  # [Q, N], sums to 1 over the taps
        mixed = torch.einsum("bnqe,qn->bqe", x.view(B, N, -1, E), weights)  # [B, Q, E]
        return self.proj(mixed)  # [B, Q, D]
