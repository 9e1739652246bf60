"""Whether freed memory goes back to Linux or is kept for the next tensor."""

import ctypes


def glibc() -> ctypes.CDLL | None:
    """The C library of Linux, which decides about freed memory; None on other systems."""
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


def keep_freed_memory() -> None:
    """Keep freed memory for the next tensor. Else each tensor above 32 MiB gets new pages, whose
    first access can take longer than computing it. Not for training, which needs more memory that
    way."""
    library = glibc()
    if library:
        library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
