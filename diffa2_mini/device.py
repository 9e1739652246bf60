"""Where to compute, in which precision, how fast it could be, and how much memory it took."""

import ctypes
import logging
import sys
import time
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn

from .config import require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def choose_device(device: str = "auto", dtype: str = "auto", large: bool = False
                  ) -> tuple[torch.device, torch.dtype, str]:
    """The device and the dtype of the frozen parts, and why. `auto` is CUDA if there, else the CPU; bfloat16 on CUDA and
    for models of billions of weights, else float32. What is trained is kept in float32, or float64. Raises UserError if the
    device asked for is not there, or has no such dtype."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    why = "as asked"
    if device == "auto":
        device = "cuda" if there["cuda"] else "cpu"
        why = "a CUDA device is there" if there["cuda"] else "no CUDA device is there"
    require(there[device], f"--device {device}: this machine has none; use one of {', '.join(d for d in there if there[d])}")
    require(device != "mps" or dtype != "float64",
            "--dtype float64: a Mac's GPU has no float64; use float32, or --device cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" or large else "float32"
    return torch.device(device), DTYPES[dtype], f"device {device} ({why}), {dtype}"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Has the frozen parts compute in their dtype, and what is trained with them; it is kept in float32 at least."""
    return torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)


def glibc() -> ctypes.CDLL | None:
    """The C library of Linux, which decides what becomes of freed memory; None elsewhere."""
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


def keep_freed_memory() -> None:
    """Have freed memory kept for the next tensor. Else a tensor above 32 MiB is mapped anew each time, and to touch its
    pages first can take longer than to compute it. For decoding; training needs more memory that way."""
    library = glibc()
    if library:
        library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


@lru_cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large linear layer on this machine, measured now: the best of five."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    times = []
    for _ in range(5):
        start = now(device)
        nn.functional.linear(a, a)  # the second matrix is transposed, for which some CPUs are far faster in bfloat16
        times.append(now(device) - start)
    return 2 * n**3 / min(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read or written, of copying a large tensor: the best of ten."""
    a = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    b, times = torch.empty_like(a), []
    for _ in range(10):
        start = now(device)
        b.copy_(a)
        times.append(now(device) - start)
    return 2 * a.nbytes / min(times)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


class Fused:
    """A block's forward pass, fused by torch.compile when it is first used. Where that fails it runs
    as it is from then on, and so do those among `all_fused` that have not been fused by then; others
    stay, since in a backward pass what is computed again must be computed as before."""

    def __init__(self, forward: Callable, all_fused: list["Fused"]):
        self.plain, self.fused, self.all_fused = forward, torch.compile(forward), all_fused
        self.has_run, self.fails = False, False

    def __call__(self, *inputs):
        if self.fails:
            return self.plain(*inputs)
        try:
            output = self.fused(*inputs)
            self.has_run = True
            return output
        except torch._dynamo.exc.TorchDynamoException as error:
            if not any(each.fails for each in self.all_fused):
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
                print(f"--compile: a block could not be compiled, goes on without ({reason})", file=sys.stderr)
            for each in self.all_fused:
                each.fails = each.fails or each is self or not each.has_run
        return self.plain(*inputs)


def compile_blocks(*stacks: nn.ModuleList) -> None:
    """Have torch.compile fuse the operations of each block when it is first used. Where it cannot,
    for want of a compiler say, one line says so, and the block runs as it is."""
    torch._logging.set_logs(all=logging.ERROR)  # else thousands of lines; TORCH_LOGS brings them back
    all_fused = []
    for blocks in stacks:
        for block in blocks:
            block.forward = Fused(block.forward, all_fused)
            all_fused.append(block.forward)


class Captured:
    """A function of tensors on CUDA. Its kernels are recorded once for each shape of its inputs, and then replayed without
    Python, and without a gap, between them. The output is overwritten by the next call. What cannot be recorded runs as it is,
    with a warning."""

    def __init__(self, function: Callable):
        self.function, self.recorded, self.fails = function, {}, False

    def record(self, inputs: list[Tensor]) -> tuple[list[Tensor], torch.cuda.CUDAGraph, Tensor]:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # whatever a kernel prepares on its first run must not be recorded
            self.function(*inputs)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.function(*inputs)
        return inputs, graph, output

    def __call__(self, *tensors: Tensor) -> Tensor:
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.recorded and not self.fails:
            try:
                self.recorded[shapes] = self.record([tensor.clone() for tensor in tensors])
            except RuntimeError as error:
                self.fails = True
                warnings.warn(f"--capture: not recorded, goes on without ({str(error).splitlines()[0]})")
        if shapes not in self.recorded:
            return self.function(*tensors)
        inputs, graph, output = self.recorded[shapes]
        for recorded, tensor in zip(inputs, tensors):
            recorded.copy_(tensor)
        graph.replay()
        return output


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has had so far: on CUDA that of tensors on the device, else all of it."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the device"
    if sys.platform == "win32":
        return "not known on Windows"
    import resource  # there is none on Windows
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def memory_above(function: Callable, device: torch.device, all_of_it: bool = False) -> int | None:
    """Bytes that a function needs at most, beyond what is there when it starts, or with that: on CUDA those of tensors, on
    Linux those of the process. None elsewhere."""
    status = Path("/proc/self/status")
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        peak = torch.cuda.max_memory_allocated()
    elif status.exists():
        def field(name):
            return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1]) * 1024
        if glibc():
            glibc().malloc_trim(0)  # gives back what is kept
        before = field("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        function()
        peak = field("VmHWM")
    else:
        return None
    return peak - (0 if all_of_it else before)
