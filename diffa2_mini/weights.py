"""The frozen parts: reading the weights of the encoder and of the backbone under their published names.

The toy parts that this repository ships (stage 0 made them) use the same names as the real ones: OpenAI's for Whisper,
below `encoder.`, and LLaDA's, below `model.transformer.`.
"""

from pathlib import Path

import torch
from torch import nn

from .checkpoint import read_tensors, save_tensors, strictly
from .config import ASSETS, Config, require
from .model import Diffa2
from .tokenizer import Tokenizer

PUBLISHED_PREFIX = {"whisper": "encoder.", "llada": "model.transformer."}
SHIPPED = {"whisper": ASSETS / "toy_whisper.safetensors", "llada": ASSETS / "toy_llada.safetensors"}
SHIPPED_DIFFA2 = ASSETS / "toy_diffa2.safetensors"


def load_part(module: nn.Module, part: str, path: Path) -> None:
    """Fill the encoder (`whisper`) or the backbone (`llada`) from a file with published names. Raises UserError that
    lists every name that is missing, unexpected or of another shape."""
    prefix = PUBLISHED_PREFIX[part]
    targets = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    strictly(targets, read_tensors(path, "weights (safetensors)")[0], str(path))


def save_part(module: nn.Module, part: str, path: Path, made_by: str) -> None:
    """Write a part in float16 under its published names, with the command that made it."""
    prefix = PUBLISHED_PREFIX[part]
    save_tensors(path, {prefix + name: tensor.half() for name, tensor in module.state_dict().items()},
                 {"format": "pt", "made_by": made_by})


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a size."""
    return Tokenizer.from_ranks(ASSETS / config.text.tokenizer)


def build(config: Config, whisper: Path | None, llada: Path | None, device: torch.device, dtype: torch.dtype) -> Diffa2:
    """The model with its frozen parts loaded, in `dtype`; adapters and prompts are new, and in float32.

    Paths default to the shipped toy parts. Raises UserError if a size has none.
    """
    paths = {"whisper": whisper, "llada": llada}
    for part, path in paths.items():
        require(path is not None or config.size == "toy",
                f"--size {config.size} needs published weights: name them with --{part} FILE, or use --size toy")
    model = Diffa2(config)
    for part, path in paths.items():
        load_part(getattr(model, part), part, path or SHIPPED[part])
        getattr(model, part).to(dtype)
    return model.to(device)
