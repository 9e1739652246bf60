"""Where to compute, and in which precision."""

import torch

from .config import require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype, str]:
    """The device and the dtype of the frozen parts, and why. `auto` is CUDA if there, else the CPU; bfloat16 on CUDA,
    else float32. What is trained is always kept in float32. Raises UserError if the device asked for is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    why = "as asked"
    if device == "auto":
        device = "cuda" if there["cuda"] else "cpu"
        why = "a CUDA device is there" if there["cuda"] else "no CUDA device is there"
    require(there[device], f"--device {device}: this machine has none; use one of {', '.join(d for d in there if there[d])}")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return torch.device(device), DTYPES[dtype], f"device {device} ({why}), {dtype}"
