"""Where to compute, and in which precision."""

import torch

from ..errors import require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float64": torch.float64}
FLOAT8 = (8, 9)  # the compute capability from which a GPU multiplies in 8-bit floating point


def choose_device(device: str = "auto", dtype: str = "auto", large: bool = False,
                  trains: bool = False, quantize: str | None = None
                  ) -> tuple[torch.device, torch.dtype, str]:
    """The device, the dtype of the frozen parts, and a line that says why.

    `auto` is CUDA if available, else the CPU; bfloat16 on CUDA and for `large` models, of billions
    of weights, else float32. GPUs without bfloat16 answer in float16, and train in float32: float16
    has no room for small gradients. Trained parts are float32, or float64. Raises UserError if the
    device is not available, or has no such dtype, or cannot `quantize` so.
    """
    has_cuda, why = torch.cuda.is_available(), "as asked"
    there = {"cpu": True, "cuda": has_cuda, "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device, why = ("cuda", "there is one") if has_cuda else ("cpu", "no CUDA device is there")
    available = [name for name in there if there[name]]
    require(device in available,
            f"--device {device}: this machine has none; use one of {', '.join(available)}")
    require(device != "mps" or dtype != "float64",
            "--dtype float64: a Mac's GPU has no float64; use float32, or --device cpu")
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    got = "{}.{}".format(*capability) if device == "cuda" else f"device {device}"
    require(quantize != "fp8" or capability >= FLOAT8, "--quantize fp8: expected a GPU of compute "
            f"capability 8.9 or above, got {got}; use int8 or nf4")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" or large else "float32"
        if device == "cuda" and capability < (8, 0):  # which has no bfloat16
            dtype = "float32" if trains else "float16"
    require(not trains or dtype != "float16",
            "--dtype float16: small gradients would become zero; train in bfloat16 or float32")
    require(dtype in DTYPES, f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    return torch.device(device), DTYPES[dtype], f"device {device} ({why}), {dtype}"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which trained parts, kept in float32, compute in the frozen parts' dtype."""
    return torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))
