"""The state of decoding a batch: prompts with audio, responses, and cached keys and values.

There are three ways to compute the hidden states of a block: without a cache, with a *prefix cache*
of everything before the block, and with a *dual cache* of everything after it too (Fast-dLLM, arXiv
2505.22618, section 3.2). Attention is bidirectional, so the keys and values of a token change
whenever another token does. Kept ones are an approximation, which a `fresh` step renews.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..llada import Llada
from ..model import Diffa2Model, lay_out
from ..tokenizer import Prompt
from .compiling import Captured

CACHES = ("none", "prefix", "dual")


@dataclass
class KeyValueCache:
    """Keys and values of one transformer block for a whole sequence, of which it gets a slice."""

    keys: Tensor  # [B, H, S, D/H]
    values: Tensor  # [B, H, S, D/H]
    at: Tensor | None = None  # [n], the positions of the slice

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Renew the keys and values of the slice [B, H, n, D/H]; returns all, [B, H, S, D/H]."""
        return self.keys.index_copy_(2, self.at, k), self.values.index_copy_(2, self.at, v)


def empty_caches(llada: Llada, n_rows: int, n_positions: int) -> list[KeyValueCache]:
    """A cache for each block, for B = `n_rows` and S = `n_positions`, in the dtype of its keys."""
    block = llada.blocks[0]
    key = block.heads(block.k_proj(llada.wte.weight[None, :1]))  # [1, H, 1, D/H]
    shape = (n_rows, key.shape[1], n_positions, key.shape[3])
    return [KeyValueCache(key.new_zeros(shape), key.new_zeros(shape)) for _ in llada.blocks]


def place(caches: list[KeyValueCache], at: Tensor) -> list[KeyValueCache]:
    """The same caches, for the slice at the positions `at` [n]."""
    return [replace(cache, at=at) for cache in caches]


class DecodingState:
    """B responses of R tokens behind their prompts. Row b has `lengths[b]` tokens, then padding."""

    def __init__(self, model: Diffa2Model, audio_embeddings: list[Tensor], prompts: list[Prompt],
                 lengths: list[int], mask_id: int):
        self.model, self.audio_embeddings, self.prompts = model, audio_embeddings, prompts
        self.lengths, self.mask_id = lengths, mask_id
        self.before, n_before = model.splice(audio_embeddings, prompts)  # [B, P, D], [B]
        self.n_before = self.before.shape[1]  # P
        rows = [self.before.new_ones(n, dtype=torch.bool) for n in lengths]
        self.response = pad_sequence(rows, batch_first=True)  # bool [B, R], False at padding
        self.positions, self.valid = lay_out(n_before, self.n_before, self.response)  # [B, P + R]
        if self.valid.all():
            self.valid = None  # attention without a mask is faster
        self.caches: list[KeyValueCache] = []
        self.captured: Captured | None = None  # `forward_slice` as a CUDA graph

    def rows(self, keep: list[int]) -> "DecodingState":
        """The state of these rows alone, with an empty cache; with all rows, the state itself."""
        if len(keep) == len(self.lengths):
            return self
        batch = (self.audio_embeddings, self.prompts, self.lengths)
        kept = ([values[i] for i in keep] for values in batch)
        return DecodingState(self.model, *kept, self.mask_id)

    def unconditional(self) -> "DecodingState":
        """The state with the text of the prompts masked, for classifier-free guidance."""
        prompts = [Prompt([self.mask_id] * len(prompt.ids), prompt.audio_at)
                   for prompt in self.prompts]
        return DecodingState(self.model, self.audio_embeddings, prompts, self.lengths, self.mask_id)

    def forward_all(self, tokens: Tensor, keep: bool = False) -> Tensor:
        """Hidden states [B, R, D] of the tokens [B, R], computed with everything before them. With
        `keep`, all keys and values are put into the cache."""
        x = torch.cat([self.before, self.model.llada.wte(tokens)], dim=1)  # [B, P + R, D]
        caches = None
        if keep:
            self.caches = self.caches or empty_caches(self.model.llada, *x.shape[:2])
            caches = place(self.caches, torch.arange(x.shape[1], device=x.device))
        return self.model.llada(x, self.valid, self.positions, caches, self.n_before)

    def forward_block(self, tokens: Tensor, start: int, stop: int, capture: bool = False) -> Tensor:
        """Hidden states [B, n, D] of the n tokens from `start` to `stop`, with the cache. `capture`
        computes them as a CUDA graph, on CUDA."""
        at = torch.arange(self.n_before + start, self.n_before + stop, device=tokens.device)  # [n]
        x = self.model.llada.wte(tokens[:, start:stop])  # [B, n, D]
        run = self.forward_slice
        if capture and x.is_cuda:
            run = self.captured = self.captured or Captured(run)
        return run(x, self.positions[:, at], at)

    def forward_slice(self, x: Tensor, positions: Tensor, at: Tensor) -> Tensor:
        """Hidden states of x [B, n, D], at `at` [n] in the cache, which is renewed there, and at
        `positions` [B, n] for the rotary embedding."""
        return self.model.llada(x, self.valid, positions, place(self.caches, at))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.llada.logits(hidden)
