"""How a command runs and ends: its flags, what it prints, its errors, Ctrl-C, and its exit code.

    2    after one line that says what the user can mend
    130  after Ctrl-C; training has saved before
    141  where what read the output has gone (`| head -1`); results have been written

Printing never ends a run, whatever the console can show and whatever has become of it.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from types import SimpleNamespace
from typing import TextIO

from ..errors import UserError, out_of_memory, require
from ..ranges import out_of_range

INTERRUPTED, UNREAD = 128 + 2, 128 + 13  # as a shell tells SIGINT and SIGPIPE
EVERY = 60  # seconds between the lines of a progress bar that does not go to a terminal


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors, with the script's docstring as its help. Each
    number is in the range that ranges.py has for its name."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        if self.prog == "__main__.py":  # python -m
            self.prog = f"python -m {sys.modules['__main__'].__spec__.parent}"

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        args = super().parse_args(argv)
        for action in self._actions:
            flag = (action.option_strings or [action.dest])[0]
            found = getattr(args, action.dest, None)
            if found == [] and action.nargs is None:  # what argparse makes of --flag=--
                self.error(f"{flag}: expected a value, got --")
            values = found if isinstance(found, list) else [found]
            for value in values if action.type in (int, float) else []:
                wrong = value is not None and out_of_range(action.dest, value, action.type is int)
                require(not wrong, f"{flag} must be {wrong}")
        return args

    def error(self, message: str):
        raise UserError(f"{message}; --help lists what there is")


def shown(text: str, encoding: str | None) -> str:
    """The text with what an encoding does not have escaped, as in \\u4e2d."""
    return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


class Console:
    """A stream that never fails and shows text at once, with what it cannot show escaped; once
    nothing more can be written, nothing more is, and `error` tells why."""

    def __init__(self, stream: TextIO):
        self.stream, self.error = stream, None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(shown(text, self.stream.encoding))
            self.stream.flush()
        except OSError as error:
            self.error = self.error or error
            with suppress(OSError):  # what is still in its buffer would fail again, at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)


def unread() -> bool:
    """Whether what reads our output has gone: a run may save, and end."""
    return any(isinstance(getattr(stream, "error", None), BrokenPipeError)
               for stream in (sys.stdout, sys.stderr))


def require_printed() -> None:
    """Raise UserError if what a command prints, and writes nowhere else, could not be printed."""
    error = getattr(sys.stdout, "error", None)
    require(not error or unread(), f"expected to print it all, got '{error}'; send it elsewhere")


def progress(*args, **options):
    """A progress bar of `tqdm` on stderr; where that is no terminal, a line now and then."""
    from tqdm import tqdm  # here, as `begin` is to come before it

    if sys.stderr.isatty():
        return tqdm(*args, dynamic_ncols=True, **options)
    lines = SimpleNamespace(flush=lambda: None, write=lambda text: text.strip() and print(
        text.strip(), file=sys.stderr))
    return tqdm(*args, file=lines, delay=EVERY, mininterval=EVERY, maxinterval=EVERY, **options)


def end_at_once(number: int, frame) -> None:
    """What Ctrl-C does while there is nothing to save."""
    with suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)


def begin(name: str) -> None:
    """Have Ctrl-C end this process with one line, if the file whose `__name__` this is runs as a
    script. It calls this before its slow imports: an exception could break one in the middle."""
    if name == "__main__":
        signal.signal(signal.SIGINT, end_at_once)


def explain(error: Exception) -> str | None:
    """One line on an error that a user can mend; None for any other."""
    if out_of_memory(error):
        said = (str(error).strip() or "MemoryError").splitlines()[0][:200]
        return (f"error: expected memory enough, got '{said}'; in training take a larger "
                "--grad-accum or --recompute blocks, else a smaller --batch-size or --gen-length")
    if isinstance(error, OSError) and error.filename is not None:
        name = repr(os.fsdecode(error.filename))[:200]
        return f"error: {name}: expected a file that can be used, got '{error.strerror}'; check it"
    return f"error: {error}" if isinstance(error, (UserError, OSError, UnicodeError)) else None


def run_script(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a script's `main`; returns the exit code, 0 or one that this file begins with."""
    is_script = signal.getsignal(signal.SIGINT) is end_at_once  # else inside another program
    out, err = (Console(stream or open(os.devnull, "w", encoding="utf-8"))
                for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        code, last = 0, ""  # the line is printed once all that `main` began has been closed
        if is_script:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            main(argv)
        except KeyboardInterrupt as stop:
            code, last = INTERRUPTED, str(stop) or "stopped"
        except Exception as error:
            code, last = 2, explain(error)
            if last is None:
                raise
        if is_script:  # all is done, and not to be told as a failure
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if last:
            print(last.replace("\n", "\\n"), file=sys.stderr)
        return UNREAD if code == 0 and unread() else code
