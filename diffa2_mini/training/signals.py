"""The signals that end a run, which saves first."""

import signal
import sys

from ..command.script import UNREAD, unread


class Signals:
    """Remembers a signal that is to end the run: Ctrl-C, SIGTERM, SIGHUP (the terminal was closed),
    or that nobody reads the output any more (SIGPIPE, which Python leaves to whoever prints). A
    second one ends the run at once, unless `ignore_second`."""

    def __init__(self, ignore_second: bool):
        self.ignore_second, self.number = ignore_second, None

    def catch(self) -> None:
        """From now on signals are remembered."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none; under `nohup` it is ignored
        if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:
            signal.signal(hangup, self.handle)

    def handle(self, number: int, frame) -> None:
        if self.number and not self.ignore_second:
            sys.exit(128 + number)
        self.number = number

    @property
    def received(self) -> int | None:
        """The number of the signal that is to end the run; None if there is none."""
        return self.number or (UNREAD - 128 if unread() else None)
