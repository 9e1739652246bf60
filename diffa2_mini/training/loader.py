"""Which examples belong to which step, and the processes that load them ahead of time."""

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..data import Batch, Collate
from ..errors import UserError
from ..noise import stream
from .processes import World


def count_workers(asked: int | None, loads: bool, n_beside: int) -> int:
    """How many processes load audio: `asked`, or by default, if any is to be loaded, the cores that
    each of the `n_beside` training processes on this machine has, and 8 at most."""
    if asked is not None:
        return asked
    return min(8, (os.cpu_count() or 1) // n_beside) if loads else 0


STOP_SIGNALS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                if hasattr(signal, name)}


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Delay signals that end a run until the block ends. Processes started within it do not get
    them before they call `leave_process_group`: those that are not forked first import torch, for
    seconds."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        # started now, as starting it would let signals through
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_process_group(worker: int) -> None:
    """Protect a loading process from signals to the whole process group, as torchrun and a terminal
    send them: the training process that it works for still has to finish its step and save. The
    loading process ends when that one does, however it ends."""
    if hasattr(os, "setpgrp"):  # Windows has no such groups
        os.setpgrp()
        while signal.sigpending() & STOP_SIGNALS:  # discard what has been delayed
            signal.sigwait(STOP_SIGNALS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def worker_has_died(error: BaseException | None) -> bool:
    """Whether an error says that a loading process has ended: torch's own message, or a broken
    connection to it."""
    said = ("DataLoader worker (pid", "received 0 items of ancdata",
            "got end of file during message")
    if isinstance(error, (ConnectionError, EOFError)):
        return True
    is_torch = isinstance(error, (RuntimeError, OSError))
    return is_torch and any(words in str(error) for words in said)


class Loader:
    """The batches of `pieces`, in order, loaded ahead of time by `n_workers` processes, which the
    end of `with loader` ends. Raises UserError there if one of them was killed."""

    def __init__(self, collate: Collate, pieces: Iterable[list[tuple[int, int]]], n_workers: int):
        loader = DataLoader(collate, sampler=pieces, batch_size=None, num_workers=n_workers,
                            generator=torch.Generator(),
                            worker_init_fn=leave_process_group if n_workers else None)
        with signals_blocked() if n_workers else nullcontext():
            self.batches = iter(loader)
        self.waited = 0.0  # total seconds of waiting for batches

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.batches = None  # ends them
        if worker_has_died(error):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
            raise UserError(f"a process that loads audio has ended ({reason}), perhaps for want of "
                            "memory; go on with --resume, and with fewer of them or none: "
                            "--workers 0") from None

    def take(self, n: int) -> Iterator[Batch]:
        """The next n batches."""
        for _ in range(n):
            start = time.perf_counter()
            batch = next(self.batches)
            self.waited += time.perf_counter() - start
            if isinstance(batch, UserError):
                raise batch
            yield batch


class StageLoader(Loader):
    """The steps of a stage, each with this process's batches for it. `order` gives the steps as
    `batches` does; each is cut into pieces of `micro_batch` (see `Collate.cut`)."""

    def __init__(self, collate: Collate, order: Iterable[tuple[int, list]], micro_batch: int,
                 world: World, n_workers: int):
        steps = ((step, pairs, collate.cut(pairs, micro_batch, world.rank, world.size))
                 for step, pairs in order)
        self.steps, ahead = itertools.tee(steps)
        super().__init__(collate, (piece for *_, pieces in ahead for piece in pieces), n_workers)

    def __iter__(self) -> Iterator[tuple[int, list, Iterator[Batch]]]:
        """Each step: its number, its (epoch, example) pairs, and this process's batches."""
        for step, pairs, pieces in self.steps:
            yield step, pairs, self.take(len(pieces))


def epoch_order(n_examples: int, epoch: int, seed: int, stage: int) -> np.ndarray:
    """The order in which an epoch of a stage goes through the examples."""
    return stream("order", seed, stage, epoch).permutation(n_examples)


def batches(n_examples: int, batch_size: int, n_steps: int, first_step: int, seed: int, stage: int
            ) -> Iterator[tuple[int, list]]:
    """For each step from `first_step` on: the step, and its (epoch, example) pairs, as numbers.
    Epochs follow each other without a gap: each example comes exactly once per epoch, whatever the
    batch size."""
    orders = {}
    for step in range(first_step, n_steps):
        pairs = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, at = divmod(position, n_examples)
            if epoch not in orders:  # the order of an earlier epoch is not needed again
                orders = {epoch: epoch_order(n_examples, epoch, seed, stage)}
            pairs.append((epoch, int(orders[epoch][at])))
        yield step, pairs
