"""The signals that end a run, noted so that it can save before."""

import signal
import sys

from ..command.script import UNREAD, unread


class Signals:
    """What ends a run, noted so that it can save before: Ctrl-C, SIGTERM, SIGHUP (the terminal is
    closed), and SIGPIPE, which Python leaves to whoever prints. The second signal ends the run at
    once, unless it is `patient`."""

    def __init__(self, patient: bool):
        self.patient, self.noted = patient, None

    def catch(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none; under `nohup` it is ignored
        if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:
            signal.signal(hangup, self.note)

    def note(self, number: int, frame) -> None:
        if self.noted and not self.patient:
            sys.exit(128 + number)
        self.noted = number

    @property
    def came(self) -> int | None:
        """The number of the signal that is to end the run; None if there is none."""
        return self.noted or (UNREAD - 128 if unread() else None)
