"""The signals that end a run, which saves first: remembered by the processes that train, kept from
those that load audio for them."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from ..command.script import UNREAD, unread

STOP_SIGNALS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                if hasattr(signal, name)}  # Windows has no SIGHUP


class Signals:
    """Remembers a signal that is to end the run: Ctrl-C, SIGTERM, SIGHUP (the terminal was closed),
    or that nobody reads the output any more (SIGPIPE, which Python leaves to whoever prints). A
    second one ends the run at once, unless `ignore_second`."""

    def __init__(self, ignore_second: bool):
        self.ignore_second, self.number = ignore_second, None

    def catch(self) -> None:
        """From now on signals are remembered; but not SIGHUP under `nohup`, which ignores it."""
        for number in STOP_SIGNALS:
            is_asked_for = number in (signal.SIGINT, signal.SIGTERM)
            if is_asked_for or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number: int, frame) -> None:
        if self.number and not self.ignore_second:
            sys.exit(128 + number)
        self.number = number

    @property
    def received(self) -> int | None:
        """The number of the signal that is to end the run; None if there is none."""
        return self.number or (UNREAD - 128 if unread() else None)


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
    send them: the training process that it works for still has to finish its step and save. It can
    still be terminated alone: it ends when that process does, however that ends."""
    if hasattr(os, "setpgrp"):  # Windows has no such groups
        os.setpgrp()
        while signal.sigpending() & STOP_SIGNALS:  # discard what has been delayed
            signal.sigwait(STOP_SIGNALS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
