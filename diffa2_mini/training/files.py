"""What keeps a run whole when something breaks: whole files or none, the save before the last, one
run to a folder."""

import glob
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError, out_of_memory

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


def digest_of(path: Path) -> str:
    """SHA-256 in hexadecimal of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def previous(path: Path) -> Path:
    """Where the save before the last is kept: stage1.previous.safetensors."""
    return path.with_suffix(f".previous{path.suffix}")


def keep_previous(path: Path) -> None:
    """Give a save a second name, or on a disk without these a copy, before the next replaces it."""
    previous(path).unlink(missing_ok=True)
    try:
        os.link(path, previous(path))
    except OSError:
        shutil.copyfile(path, previous(path))


class WriteError(UserError):
    """A file could not be written."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folder of a file written in this block. WriteError if that fails (a full disk)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch's
        if out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise WriteError(f"{path}: could not be written ({reason}); free some space or choose "
                         "another place") from None


def write_whole(path: Path, write_to: Callable[[Path], None], keep: Callable | None = None) -> None:
    """Have `write_to` write a file under a temporary name and then rename it, so that either all of
    it is there or nothing. `keep` is called with the path of a file that is about to be replaced.
    Raises UserError when the disk is full."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            write_to(temporary)
            with open(temporary, "r+b") as file:  # Windows cannot sync what is open for reading
                os.fsync(file.fileno())
            if keep and path.exists():
                keep(path)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str],
                 keep: Callable | None = None) -> None:
    """Write a safetensors file, or nothing, as `write_whole` does."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata), keep)


def append(path: Path, text: str) -> None:
    """Write at the end of a file, at once; half a pair of surrogates as \\ud800, as JSON spells it.
    Raises UserError when the disk is full."""
    with writing(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def load_last(path: Path, load: Callable):
    """`load` the last save; or if it is damaged the one before, which then takes its place."""
    try:
        return load(path)
    except UserError as error:
        if not previous(path).exists():
            raise
        found = load(previous(path))
        print(f"{error}; going on from the save before, step {found.step}")
        os.replace(previous(path), path)
        return found


def lock(out: Path, name: str = ""):
    """Hold a run's folder, or the file of this name in it, until the returned file is closed or
    this process ends. Raises UserError if another run holds it."""
    path = out / (f".{name}.lock" if name else ".lock")
    with writing(path):
        file = open(path, "w")
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out / name}: another run is writing here; wait for it, or choose "
                            "another --out") from None
    for path in out.glob(f".{glob.escape(name) or '*'}.[0-9]*.tmp"):  # what a killed run wrote
        path.unlink()
    return file
