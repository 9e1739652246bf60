"""Which examples make which step, and the processes that load them ahead of time."""

import time
from typing import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from .config import UserError
from .data import Batch, Collate


class Loader:
    """The batches of `pieces`, in order, made ahead of time by `n_workers` processes. Raises UserError."""

    def __init__(self, collate: Collate, pieces: Iterable[list[tuple[int, int]]], n_workers: int):
        self.batches = iter(DataLoader(collate, sampler=pieces, batch_size=None, num_workers=n_workers,
                                       generator=torch.Generator()))
        self.waited = 0.0  # seconds, in all

    def take(self, n: int) -> Iterator[Batch]:
        """The next n batches."""
        for _ in range(n):
            start = time.perf_counter()
            batch = next(self.batches)
            self.waited += time.perf_counter() - start
            if isinstance(batch, UserError):
                raise batch
            yield batch


def epoch_order(n_examples: int, epoch: int, seed: int) -> np.ndarray:
    """The order in which an epoch goes through the examples."""
    return np.random.default_rng([seed, epoch]).permutation(n_examples)


def batches(n_examples: int, batch_size: int, n_steps: int, first_step: int, seed: int) -> Iterator[tuple[int, list]]:
    """For each step from `first_step` on: the step, and its (epoch, number of the example) pairs. One epoch follows the
    other without a gap, so that every example is seen exactly once per epoch, whatever the batch size."""
    orders = {}
    for step in range(first_step, n_steps):
        pairs = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, at = divmod(position, n_examples)
            if epoch not in orders:
                orders = {epoch: epoch_order(n_examples, epoch, seed)}  # epochs only ever go up
            pairs.append((epoch, int(orders[epoch][at])))
        yield step, pairs
