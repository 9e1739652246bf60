"""How fast a device can be, how much memory was used, and what becomes of freed memory."""

import ctypes
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

import torch
from torch import nn


def time_runs(function: Callable, device: torch.device, n_runs: int) -> list[float]:
    """Seconds that each of several runs of a function takes on a device."""
    seconds = []
    for _ in range(n_runs):
        start = now(device)
        function()
        seconds.append(now(device) - start)
    return seconds


@lru_cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large linear layer on this device."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    # a @ a.T, the form of linear layers: some CPUs are far faster with it in bfloat16
    return 2 * n**3 / min(time_runs(lambda: nn.functional.linear(a, a), device, 5))


@lru_cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying a large tensor."""
    a = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(time_runs(lambda: b.copy_(a), device, 10))


def now(device: torch.device) -> float:
    """The time in seconds, after waiting for the device."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> float | None:
    """The most memory that this process has used, in GiB, on CUDA for tensors; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    import resource  # there is none on Windows
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def keep_freed_memory() -> None:
    """Keep freed memory for the next tensor: else those above 32 MiB get new pages, whose first
    access can take longer than computing them. Training would need more memory that way."""
    with suppress(OSError):  # only Linux has such a library
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
