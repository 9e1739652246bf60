"""Our own checkpoints: one safetensors file with what was trained, its config, and all that resuming needs.

A safetensors file holds named tensors and a few strings, and no code. Tensors of the model keep their names; those of
the optimiser have a prefix. It is written to a temporary name and then renamed, so that a crash leaves the old one.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import Config, UserError, from_dict, require, run_script, to_dict
from .faults import digest, write
from .model import Diffa2, part_of

FORMAT = "diffa2_mini 2"


@dataclass
class Checkpoint:
    """What a file holds. `stage` is the stage that it belongs to and `step` how many of its steps are done."""

    config: Config
    stage: int
    step: int
    done: bool
    model: dict[str, Tensor]
    audio: tuple[str, ...] = ()  # what the stage splices into the prompt
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    seed: int | None = None  # of the run, and
    batch_size: int | None = None  # which decide the order of the examples


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], keep: bool = False) -> None:
    """Write a safetensors file, or nothing; with `keep`, the one before stays. Raises UserError when the disk is full."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write(path, lambda temporary: save_file(tensors, temporary, metadata), keep)


def save(path: Path, checkpoint: Checkpoint, keep: bool = False) -> None:
    """Write a checkpoint; with `keep`, the one before stays."""
    tensors = dict(checkpoint.model) | {f"optimizer.{name}": tensor for name, tensor in checkpoint.optimizer.items()}
    fields = {"config": to_dict(checkpoint.config), "stage": checkpoint.stage, "step": checkpoint.step,
              "done": checkpoint.done, "audio": checkpoint.audio, "seed": checkpoint.seed, "batch_size": checkpoint.batch_size}
    metadata = {"format": FORMAT, "checkpoint": json.dumps(fields)}
    save_tensors(path, tensors, metadata | {"sha256": digest(tensors, metadata)}, keep)


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata. Raises UserError if it is missing or damaged; `what` names
    what was expected."""
    require(Path(path).is_file(), f"{path}: expected {what}, found no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: expected {what}, got a file that is cut off or damaged ({error})") from None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises UserError if the file is missing, cut, or not one of ours."""
    tensors, metadata = read_tensors(path, "a checkpoint (python train.py makes one)")
    require(metadata.get("format") == FORMAT,
            f"{path}: expected a checkpoint of '{FORMAT}', got {metadata.get('format', 'another safetensors file')!r}")
    require(metadata.pop("sha256", None) == digest(tensors, metadata),
            f"{path}: expected a whole checkpoint, got one that is damaged (its checksum differs); copy or train it anew")
    prefix = "optimizer."
    try:
        fields = json.loads(metadata["checkpoint"])
        config, audio = from_dict(fields.pop("config")), tuple(fields.pop("audio"))
        return Checkpoint(
            config, audio=audio, **fields,
            optimizer={name[len(prefix):]: tensor for name, tensor in tensors.items() if name.startswith(prefix)},
            model={name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)},
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: expected a checkpoint of '{FORMAT}', got one without {error}") from None


def trained_tensors(model: Diffa2) -> dict[str, Tensor]:
    """All that the four stages train: adapters, prompts and LoRA, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if part_of(name) not in ("whisper", "llada")}


def restore(model: Diffa2, tensors: dict[str, Tensor], source: str) -> None:
    """Copy trained tensors into the model, which gets a LoRA if they have one. Raises UserError that lists every name
    that is missing, unexpected or of another shape."""
    has_lora = any("lora_" in name for name in tensors)
    if has_lora:
        model.add_lora()
    targets = {name: p for name, p in trained_tensors(model).items() if has_lora or part_of(name) != "lora"}
    strictly(targets, tensors, source)


def complain(targets: dict[str, Tensor], tensors: dict[str, Tensor], source: str) -> None:
    """Raise UserError unless both have the same names and shapes; it lists what is wrong."""
    wrong = [f"missing {name}" for name in targets if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in targets]
    wrong += [f"{name} has shape {list(tensors[name].shape)}, expected {list(target.shape)}"
              for name, target in targets.items() if name in tensors and tensors[name].shape != target.shape]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(f"{source}: the weights do not fit this model: {'; '.join(wrong[:8])}{more}")


@torch.no_grad()
def strictly(targets: dict[str, Tensor], tensors: dict[str, Tensor], source: str) -> None:
    """Copy `tensors` into `targets` of the same names and shapes, or raise UserError and copy nothing."""
    complain(targets, tensors, source)
    for name, target in targets.items():
        target.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.AdamW, names: list[str]) -> dict[str, Tensor]:
    """The optimiser's state as tensors by name; `names` are those of its parameters, in order."""
    state = optimizer.state_dict()["state"]
    return {f"{key}.{names[i]}": torch.as_tensor(value) for i, values in state.items() for key, value in values.items()}


def restore_optimizer(optimizer: torch.optim.AdamW, names: list[str], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    state = {}
    for full_name, tensor in tensors.items():
        key, name = full_name.split(".", 1)
        require(name in names, f"the checkpoint trains {name}, which this stage does not; choose another --out")
        state.setdefault(names.index(name), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def share(argv: list[str]) -> None:
    """`python -m diffa2_mini.checkpoint FROM TO`: write the model of a checkpoint alone, in float16, to be shared."""
    require(len(argv) == 2, f"expected a checkpoint and where to write its float16 copy, got {len(argv)} arguments")
    found = load(Path(argv[0]))
    half = {name: tensor.half() for name, tensor in found.model.items()}
    save(Path(argv[1]), Checkpoint(found.config, found.stage, found.step, True, half, found.audio))


if __name__ == "__main__":
    sys.exit(run_script(share, sys.argv[1:]))
