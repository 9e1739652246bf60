"""What becomes of freed memory, on Linux."""

import ctypes


def glibc() -> ctypes.CDLL | None:
    """The C library of Linux, which decides what becomes of freed memory; None elsewhere."""
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


def keep_freed_memory() -> None:
    """Have freed memory kept for the next tensor. Else a tensor above 32 MiB is mapped anew each
    time, and to touch its pages first can take longer than to compute it. For decoding; training
    needs more memory that way."""
    library = glibc()
    if library:
        library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
