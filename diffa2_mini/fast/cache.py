"""Cached keys and values, and the memory and CUDA graph that one batch takes over from another.

A recorded step serves its own shape and memory alone. So rows are rounded up to a power of two and
lengths to a multiple of 64, nothing attends to what is behind, and a `Slot` of such a shape is
handed on from one batch to the next.
"""

import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..llada import Llada
from .compiling import Captured, compiled
from .llada import fuse, fused_block

MULTIPLE, N_SLOTS = 64, 4  # of a length; slots that are kept, of whatever shape


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


def addresses(llada: Llada) -> list[int]:
    """Where the weights of the first block, and of its LoRA, are in memory."""
    return [tensor.data_ptr() for tensor in llada.blocks[0].state_dict().values()]


class Slot:
    """Caches for batches of at most B rows and S positions, one after another."""

    def __init__(self, llada: Llada, n_rows: int, n_positions: int, compiles: bool = False):
        self.llada, self.caches = llada, empty_caches(llada, n_rows, n_positions)
        self.weights, self.addresses = [fuse(block) for block in llada.blocks], addresses(llada)
        self.block = compiled(fused_block) if compiles else fused_block
        keys, half = self.caches[0].keys, llada.config.width // llada.config.n_heads // 2
        self.mask = keys.new_zeros(n_rows, 1, 1, n_positions)  # added to scores: 0 or -inf
        self.rotation = torch.zeros(2, n_rows, 1, n_positions, half, device=keys.device)
        self.everywhere = torch.arange(n_positions, device=keys.device)  # [S]
        self.captured, self.shape = Captured(self.forward), (n_rows, n_positions)
        self.compiles = compiles

    def read_all(self, x: Tensor, valid: Tensor | None, positions: Tensor) -> Tensor:
        """Hidden states [b, s, D] of all x [b, s, D], whose keys and values it keeps. `valid` and
        `positions` [b, s] are as for Llada."""
        (B, S), (b, s, _) = self.shape, x.shape
        self.mask.zero_()  # rows without a clip attend to anything
        self.mask[:b, ..., s:] = -torch.inf
        if valid is not None:
            self.hide(valid)
        rotation, _ = self.llada.rotation_and_mask(x, None, positions)
        self.rotation[:, :b, :, :s] = torch.stack(rotation)
        x = torch.nn.functional.pad(x, (0, 0, 0, S - s, 0, B - b))
        return self.forward(x, self.everywhere)[:b, :s]

    def hide(self, valid: Tensor) -> None:
        """Have nothing attend to where `valid` is False, bool [b, s]."""
        self.mask[:len(valid), 0, 0, :valid.shape[1]].masked_fill_(~valid, -torch.inf)

    def read_slice(self, x: Tensor, at: Tensor) -> Tensor:
        """Hidden states [b, n, D] of x [b, n, D] at the positions `at` [n], until the next call."""
        missing = self.shape[0] - len(x)
        return self.captured(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)), at)[:len(x)]

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        """Hidden states of x [B, n, D] at the positions `at` [n]."""
        llada, sizes = self.llada, (self.llada.config.n_heads, self.llada.config.norm_eps)
        rotation = self.rotation.index_select(3, at).unbind()  # [B, 1, n, D/(2H)] each
        for block, weights, cache in zip(llada.blocks, self.weights, place(self.caches, at)):
            kept = cache.keys, cache.values, at
            x = (self.block(x, rotation, self.mask, kept, weights, sizes) if weights else
                 block(x, rotation, self.mask, cache))
        return llada.ln_f(x)


def slot_for(batch: object, llada: Llada, n_rows: int, n_positions: int, compiles: bool) -> Slot:
    """A slot that is free, or a new one: the batch's as long as that has it as `batch.slot`."""
    shape = 1 << (n_rows - 1).bit_length(), -(-n_positions // MULTIPLE) * MULTIPLE
    slots = [slot for slot in getattr(llada, "slots", []) if slot.addresses == addresses(llada)]
    free = [slot for slot in slots if getattr(slot.batch(), "slot", None) is not slot]
    slot = next((slot for slot in free if (slot.shape, slot.compiles) == (shape, compiles)), None)
    if slot is None:
        for old in free[:max(0, len(slots) - N_SLOTS + 1)]:
            slots.remove(old)
        slot = Slot(llada, *shape, compiles)
    slot.batch = weakref.ref(batch)
    llada.slots = [each for each in slots if each is not slot] + [slot]  # the last used is last
    return slot
