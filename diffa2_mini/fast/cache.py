"""Keys and values that are kept between steps of decoding (Fast-dLLM, arXiv 2505.22618).

Attention is bidirectional, so the keys and values of a token change whenever another token does.
Kept ones are an approximation, which is renewed now and then; state.py says when.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from ..llada import Llada


@dataclass
class KeyValueCache:
    """Keys and values of one transformer block for a whole sequence. The block gets a slice of the
    sequence, the n embeddings at the positions `at`."""

    keys: Tensor  # [B, H, S, D/H]
    values: Tensor  # [B, H, S, D/H]
    at: Tensor | None = None  # [n]

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Renew the keys and values of the slice [B, H, n, D/H]; returns all, [B, H, S, D/H]."""
        return self.keys.index_copy_(2, self.at, k), self.values.index_copy_(2, self.at, v)


def empty_caches(llada: Llada, n_rows: int, n_positions: int) -> list[KeyValueCache]:
    """A cache for each block, for B = `n_rows` and S = `n_positions`, in the dtype of its keys."""
    key = llada.blocks[0].k_proj(llada.wte.weight[:1])
    n_heads, width = llada.config.n_heads, llada.config.width
    shape = (n_rows, n_heads, n_positions, width // n_heads)  # [B, H, S, D/H]
    return [KeyValueCache(key.new_zeros(shape), key.new_zeros(shape)) for _ in llada.blocks]


def place(caches: list[KeyValueCache], at: Tensor) -> list[KeyValueCache]:
    """The same caches, for the slice at the positions `at` [n]."""
    return [replace(cache, at=at) for cache in caches]
