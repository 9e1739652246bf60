"""Errors that a user can mend: one line that says what was expected, what came, and what to do."""

from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class UserError(Exception):
    """Something the user can mend. The scripts print it as one line and exit with code 2."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def require_contents(path: Path, what: str) -> None:
    """Raise UserError if there is no such file, or a pointer of Git LFS, which a clone left."""
    require(Path(path).is_file(),
            f"{path}: expected {what}, got no such file or a folder; check the path")
    with open(path, "rb") as file:
        require(file.read(len(LFS_POINTER)) != LFS_POINTER,
                f"{path}: expected {what}, got a pointer of Git LFS; git lfs pull gets its file")


def read_text(path: Path, what: str) -> str:
    """The text of a file. Raises UserError unless it is there, is no pointer, and is in UTF-8."""
    require_contents(path, what)
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # Windows may put a mark first
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected {what} in UTF-8, got other bytes") from None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is for want of memory, of this machine or of its GPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory")  # of each system
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or isinstance(error, RuntimeError) and any(word in str(error) for word in words))
