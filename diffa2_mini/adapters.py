"""The two adapters between encoder and backbone (arXiv 2601.23161, section 3.2), and all that stage
1 and 2 train.

The semantic adapter keeps the order of time and says *what was said*: convolutions from 50 to 12.5
embeddings a second. The acoustic adapter says *how it sounded*: a Q-Former whose learned queries
read several depths of the encoder, and which always gives the same number of embeddings.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import AdapterConfig, WhisperConfig


class SemanticAdapter(nn.Module):
    """Final hidden state [B, T, E] -> embeddings [B, T // 4, D], of which example b keeps
    n_frames[b] // 4.

    Embedding j reads the frames 4j - 2 to 4j + 2, so those kept never see the padding behind a
    clip: a batch gives exactly what its clips give alone.
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
        """Returns embeddings [B, A, D] and how many of them are real [B]."""
        n_out = n_frames // self.stride
        x = final[:, :int(n_out.max()) * self.stride].transpose(1, 2)  # [B, E, T]
        if x.shape[2] == 0:
            return final.new_zeros(len(final), 0, self.layernorm.weight.numel()), n_out
        x = self.conv(x).transpose(1, 2)  # [B, T // 4, 4E]
        return self.layernorm(self.linear_connector(x)), n_out


class CrossAttention(nn.Module):
    """Attention from x to memory, added to x and normalised after (post-norm, as in BERT).
    Self-attention if memory is x. Dropout acts where BERT has it: on the attention weights, and on
    what is added to x."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.0)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        def heads(y):  # [B, positions, E] -> [B, H, positions, E/H]
            return y.view(y.shape[0], y.shape[1], self.n_heads, -1).transpose(1, 2)

        q, k, v = heads(self.query(x)), heads(self.key(memory)), heads(self.value(memory))
        p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        y = y.transpose(1, 2).reshape(x.shape)
        return self.LayerNorm(x + self.dropout(self.dense(y)))


class QFormerLayer(nn.Module):
    """The queries [B, Q, E] look at each other, then at the frames [B, T, E], then pass a
    feed-forward."""

    def __init__(self, config: AdapterConfig, width: int, n_heads: int):
        super().__init__()
        self.attention = CrossAttention(width, n_heads)
        self.crossattention = CrossAttention(width, n_heads)
        self.intermediate = nn.Linear(width, config.qformer_hidden)
        self.output = nn.Linear(config.qformer_hidden, width)
        self.dropout = nn.Dropout(0.0)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, queries: Tensor, frames: Tensor) -> Tensor:
        x = self.crossattention(self.attention(queries, queries), frames)
        return self.LayerNorm(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))


class AcousticAdapter(nn.Module):
    """Hidden states of N taps [B, N, T, E] -> Q embeddings [B, Q, D].

    Each tap has its own queries; one decoder serves all taps, and sees all T frames, those of
    padding too. The outputs are averaged over taps with weights learned per query. The queries
    themselves are not dropped: the released code gives them to BERT's encoder directly, past the
    dropout of its embeddings.
    """

    def __init__(self, config: AdapterConfig, whisper: WhisperConfig, out_width: int):
        super().__init__()
        n_taps, width = len(whisper.taps), whisper.width
        self.layer_prompts = nn.ParameterList(
            nn.Parameter(torch.randn(1, config.n_queries, width)) for _ in range(n_taps))
        self.layer_weights = nn.Parameter(torch.zeros(config.n_queries, n_taps))
        self.qformer = nn.ModuleList(
            QFormerLayer(config, width, whisper.n_heads) for _ in range(config.qformer_layers))
        self.proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out_width))

    def forward(self, taps: Tensor) -> Tensor:
        B, N, T, E = taps.shape
        frames = taps.reshape(B * N, T, E)
        queries = torch.cat(list(self.layer_prompts)).repeat(B, 1, 1)  # [N, Q, E] -> [B * N, Q, E]
        for layer in self.qformer:
            queries = layer(queries, frames)
        weights = self.layer_weights.softmax(dim=-1)  # [Q, N], sums to 1 over the taps
        mixed = torch.einsum("bnqe,qn->bqe", queries.view(B, N, -1, E), weights)
        return self.proj(mixed)
