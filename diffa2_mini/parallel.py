"""Where to compute, in which precision, and how much memory it took."""

import sys

import torch

from .config import require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(device: str = "auto", dtype: str = "auto", large: bool = False
                  ) -> tuple[torch.device, torch.dtype, str]:
    """The device and the dtype of the frozen parts, and why. `auto` is CUDA if there, else the CPU; bfloat16 on CUDA and
    for models of billions of weights, else float32. What is trained is always kept in float32. Raises UserError if the
    device asked for is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    why = "as asked"
    if device == "auto":
        device = "cuda" if there["cuda"] else "cpu"
        why = "a CUDA device is there" if there["cuda"] else "no CUDA device is there"
    require(there[device], f"--device {device}: this machine has none; use one of {', '.join(d for d in there if there[d])}")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" or large else "float32"
    return torch.device(device), DTYPES[dtype], f"device {device} ({why}), {dtype}"


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has had so far: on CUDA that of tensors on the device, else all of it."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the device"
    if sys.platform == "win32":
        return "not known on Windows"
    import resource  # there is none on Windows
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"
