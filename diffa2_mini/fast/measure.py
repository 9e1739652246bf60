"""How fast a device can be, how much memory a function needs, and what becomes of freed memory."""

import ctypes
import re
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn


def shortest(function: Callable, device: torch.device, n_runs: int) -> float:
    """Seconds that a function takes on a device: the shortest of several runs."""
    seconds = []
    for _ in range(n_runs):
        start = now(device)
        function()
        seconds.append(now(device) - start)
    return min(seconds)


@lru_cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large linear layer on this device."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    # a @ a.T, the form of linear layers: some CPUs are far faster with it in bfloat16
    return 2 * n**3 / shortest(lambda: nn.functional.linear(a, a), device, 5)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying a large tensor."""
    a = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / shortest(lambda: b.copy_(a), device, 10)


def now(device: torch.device) -> float:
    """The time in seconds, after waiting for the device."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has used: on CUDA that of its tensors, else all of it."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the device"
    if sys.platform == "win32":
        return "not known on Windows"
    import resource  # there is none on Windows
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def memory_above(function: Callable, device: torch.device, all_of_it: bool = False) -> int | None:
    """The most bytes in use while `function` runs, less those before it unless `all_of_it`: on CUDA
    of tensors, on Linux of the process. None on other systems."""
    def bytes_of(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024

    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        peak = torch.cuda.max_memory_allocated()
    elif sys.platform == "linux":
        if library := glibc():
            library.malloc_trim(0)  # gives back what is kept
        before = bytes_of("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        function()
        peak = bytes_of("VmHWM")
    else:
        return None
    return peak - (0 if all_of_it else before)


def glibc() -> ctypes.CDLL | None:
    """The C library of Linux, which decides about freed memory; None on other systems."""
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


def keep_freed_memory() -> None:
    """Keep freed memory for the next tensor: else those above 32 MiB get new pages, whose first
    access can take longer than computing them. Training would need more memory that way."""
    if library := glibc():
        library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
