"""Which examples belong to which step, and the processes that load them ahead of time."""

import itertools
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from multiprocessing import resource_tracker

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..data import Batch, BatchDataset, Entry
from ..errors import UserError
from ..noise import stream
from .processes import World

STOP_SIGNALS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                if hasattr(signal, name)}  # that end a run; Windows has no SIGHUP


def batches(n_examples: int, batch_size: int, n_steps: int, first_step: int, seed: int, stage: int
            ) -> Iterator[tuple[int, list]]:
    """Each step from `first_step` on, with its entries. Epochs follow each other without a gap:
    each example comes exactly once per epoch, whatever the batch size."""
    @lru_cache(maxsize=1)
    def order_of(epoch: int) -> np.ndarray:
        return stream("order", seed, stage, epoch).permutation(n_examples)

    for step in range(first_step, n_steps):
        positions = [divmod(step * batch_size + place, n_examples) for place in range(batch_size)]
        yield step, [Entry(epoch, int(order_of(epoch)[at]), place)
                     for place, (epoch, at) in enumerate(positions)]


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Delay the signals until the block ends. Processes started within it do not get them before
    they call `leave_process_group`: those that are not forked first import torch, for seconds."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # started later, it would let signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_process_group(worker: int) -> None:
    """Protect a loading process from signals to the whole process group, as torchrun and a terminal
    send them: the training process needs it to finish its step. One to it alone still ends it."""
    if hasattr(os, "setpgrp"):  # Windows has no such groups
        os.setpgrp()
        while signal.sigpending() & STOP_SIGNALS:  # discard what has been delayed
            signal.sigwait(STOP_SIGNALS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def worker_has_died(error: BaseException | None) -> bool:
    """Whether it is a broken connection to a loading process, or torch's message of its end."""
    said = "DataLoader worker .pid|received 0 items of ancdata|got end of file during message"
    return isinstance(error, (ConnectionError, EOFError)) or bool(re.search(said, str(error)))


class StageLoader(AbstractContextManager):
    """The steps of `order`, from `batches`, each with this process's micro-batches of `size`, which
    `n_workers` processes load ahead of time: by default one for each core, 8 at most, or none
    without audio. They end with the block `with loader`, which raises UserError if one died."""

    def __init__(self, dataset: BatchDataset, order: Iterable[tuple[int, list]], size: int,
                 world: World, n_workers: int | None):
        if n_workers is None:
            n_workers = min(8, (os.cpu_count() or 1) // world.local_size) if dataset.load else 0
        steps = ((step, entries, dataset.micro_batches(entries, size, world.rank, world.size))
                 for step, entries in order)
        self.steps, ahead = itertools.tee(steps)
        loader = DataLoader(dataset, sampler=(piece for *_, pieces in ahead for piece in pieces),
                            batch_size=None, num_workers=n_workers, generator=torch.Generator(),
                            worker_init_fn=leave_process_group if n_workers else None)
        with signals_blocked():
            self.batches = iter(loader)
        self.waited = 0.0  # total seconds of waiting for batches

    def __exit__(self, kind, error, trace) -> None:
        self.batches = None  # ends them
        if worker_has_died(error):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
            raise UserError(f"a process that loads audio has ended ({reason}), perhaps for want of "
                            "memory; go on with --resume, and fewer of them or none: --workers 0"
                            ) from None

    def __iter__(self) -> Iterator[tuple[int, list, Iterator[Batch]]]:
        """Each step: its number, its entries, and this process's batches."""
        for step, entries, pieces in self.steps:
            yield step, entries, (self.next_batch() for _ in pieces)

    def next_batch(self) -> Batch:
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        if isinstance(batch, UserError):
            raise batch
        return batch
