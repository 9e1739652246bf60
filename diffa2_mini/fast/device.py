"""Where to compute, in which precision, how fast it could be, and how much memory it took."""


import torch

from ..errors import require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def choose_device(device: str = "auto", dtype: str = "auto", large: bool = False
                  ) -> tuple[torch.device, torch.dtype, str]:
    """The device and the dtype of the frozen parts, and why. `auto` is CUDA if there, else the CPU;
    bfloat16 on CUDA and for models of billions of weights, else float32. What is trained is kept in
    float32, or float64. Raises UserError if the device asked for is not there, or has no such
    dtype."""
    there = {
        "cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    why = "as asked"
    if device == "auto":
        device = "cuda" if there["cuda"] else "cpu"
        why = "a CUDA device is there" if there["cuda"] else "no CUDA device is there"
    require(
        there[device],
        f"--device {device}: this machine has none; use one of {', '.join(d for d in there if there[d])}"
    )
    require(device != "mps" or dtype != "float64",
            "--dtype float64: a Mac's GPU has no float64; use float32, or --device cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" or large else "float32"
    return torch.device(device), DTYPES[dtype], f"device {device} ({why}), {dtype}"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Has the frozen parts compute in their dtype, and what is trained with them; it is kept in
    float32 at least."""
    return torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
