"""Keys and values that are kept from one step of decoding to the next (Fast-dLLM, arXiv
2505.22618).

As every token looks both ways, those of a token change whenever another one is committed. What is
kept is an approximation, renewed now and then; decoding says when.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from ..llada import Llada


@dataclass
class KeyValueCache:
    """Keys and values of one block for a whole sequence, [B, H, S, D/H] each. The block is given a
    slice of the sequence, the embeddings at the cache positions `at` [n]."""

    keys: Tensor
    values: Tensor
    at: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Renew those of the slice, k and v [B, H, n, D/H]; returns those of the whole sequence."""
        return self.keys.index_copy_(2, self.at, k), self.values.index_copy_(2, self.at, v)


def empty_caches(llada: Llada, n_rows: int, n_positions: int) -> list[KeyValueCache]:
    """Room for a cache per block, in the dtype in which keys are computed."""
    key = llada.blocks[0].k_proj(llada.wte.weight[:1])
    n_heads, width = llada.config.n_heads, llada.config.width
    shape = (n_rows, n_heads, n_positions, width // n_heads)
    return [KeyValueCache(key.new_zeros(shape), key.new_zeros(shape)) for _ in llada.blocks]


def place(caches: list[KeyValueCache], at: Tensor) -> list[KeyValueCache]:
    """The same caches, to be given the slice at the cache positions `at` [n]."""
    return [replace(cache, at=at) for cache in caches]
