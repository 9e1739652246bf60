"""Which examples make which step, and the processes that load them ahead of time."""

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


def count_workers(asked: int | None, loads: bool, n_beside: int) -> int:
    """How many processes load audio: as many as asked for, or else, if there is any to load, up to
    8 of a core each for each of the `n_beside` processes that train on this machine."""
    return asked or 0 if asked is not None or not loads else min(8,
                                                                 (os.cpu_count() or 1) // n_beside)


STOPS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


@contextmanager
def held_back() -> Iterator[None]:
    """Signals that end a run come after this. The processes started meanwhile do not get them
    either, until they `leave_group`: where they are not forked, they first import torch, for
    seconds."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        # else it is started below, and Python lets signals through
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_group(worker: int) -> None:
    """Have a signal to the whole process group, as torchrun and a terminal send it, pass this
    process by: the one that it works for is to finish its step and save. It ends when that one
    does, however it ends."""
    if hasattr(os, "setpgrp"):  # Windows has no such groups
        os.setpgrp()
        while signal.sigpending() & STOPS:  # what was held back is not for this process
            signal.sigwait(STOPS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def has_ended(error: BaseException | None) -> bool:
    """Whether an error tells that a process that loads audio has ended: what torch raises wherever
    we are; or that what came from it, batches or the files they share, breaks off."""
    said = ("DataLoader worker (pid", "received 0 items of ancdata",
            "got end of file during message")
    broken = isinstance(error,
                        (RuntimeError, OSError)) and any(words in str(error) for words in said)
    return broken or isinstance(error, (ConnectionError, EOFError))


class Loader:
    """The batches of `pieces`, in order, made ahead of time by `n_workers` processes. They end with
    `with loader`; if one is killed before, a UserError says so."""

    def __init__(self, collate: Collate, pieces: Iterable[list[tuple[int, int]]], n_workers: int):
        loader = DataLoader(collate, sampler=pieces, batch_size=None, num_workers=n_workers,
                            generator=torch.Generator(),
                            worker_init_fn=leave_group if n_workers else None)
        with held_back() if n_workers else nullcontext():
            self.batches = iter(loader)
        self.waited = 0.0  # seconds, in all

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.batches = None  # ends them
        if has_ended(error):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
            raise UserError(
                f"a process that loads audio has ended ({reason}), perhaps for want of "
                "memory; go on with --resume, and with fewer of them or none: --workers 0"
            ) from None

    def take(self, n: int) -> Iterator[Batch]:
        """The next n batches."""
        for _ in range(n):
            start = time.perf_counter()
            batch = next(self.batches)
            self.waited += time.perf_counter() - start
            if isinstance(batch, UserError):
                raise batch
            yield batch


def epoch_order(n_examples: int, epoch: int, seed: int, stage: int) -> np.ndarray:
    """The order in which an epoch of a stage goes through the examples."""
    return stream("order", seed, stage, epoch).permutation(n_examples)


def batches(n_examples: int, batch_size: int, n_steps: int, first_step: int, seed: int, stage: int
            ) -> Iterator[tuple[int, list]]:
    """For each step from `first_step` on: the step, and its (epoch, number of the example) pairs.
    One epoch follows the other without a gap, so that every example is seen exactly once per epoch,
    whatever the batch size."""
    orders = {}
    for step in range(first_step, n_steps):
        pairs = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, at = divmod(position, n_examples)
            if epoch not in orders:
                # epochs only ever go up
                orders = {epoch: epoch_order(n_examples, epoch, seed, stage)}
            pairs.append((epoch, int(orders[epoch][at])))
        yield step, pairs
