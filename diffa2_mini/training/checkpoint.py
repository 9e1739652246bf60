"""What only training needs of checkpoints: the optimiser's state, and what a run may go on from.

A checkpoint (weights.py) knows what it belongs to: the settings that decide its run, and
fingerprints of the weights and the manifest that it was trained on. What differs is refused by name
(`same_run`, `load_start`).
"""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from ..config import Config, DecodeConfig, StageConfig, to_dict
from ..errors import require
from ..weights import BELONGS, Checkpoint, differences, load_checkpoint


def optimizer_tensors(optimizer: torch.optim.AdamW, names: list[str]) -> dict[str, Tensor]:
    """The optimiser's state as tensors by name; `names` are those of its parameters, in order."""
    state = optimizer.state_dict()["state"]
    return {
        f"{key}.{names[i]}": torch.as_tensor(value)
        for i, values in state.items()
        for key, value in values.items()}


def restore_optimizer(optimizer: torch.optim.AdamW, names: list[str],
                      tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    state = {}
    for full_name, tensor in tensors.items():
        key, name = full_name.split(".", 1)
        require(name in names,
                f"the checkpoint trains {name}, which this stage does not; choose another --out")
        state.setdefault(names.index(name), {})[key] = tensor
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def begin(config: Config, number: int, stage: StageConfig, seed: int) -> Checkpoint:
    """A checkpoint of a stage before its first step: no tensors, and the settings that its flags
    decide. In which pieces a batch is computed is none of them, nor are epochs beside steps."""
    idle = {"title", "data", "micro_batch"} | ({"epochs"} if stage.steps else set())
    settings = dataclasses.asdict(stage)
    settings = {name: value for name, value in settings.items() if name not in idle}
    return Checkpoint(config, number, 0, False, {}, stage.audio,
                      settings=json.loads(json.dumps({"seed": seed} | settings)))


def config_differences(was: Config, now: Config) -> list[str]:
    """What differs of two models that train, in words; how they decode decides nothing of it."""
    both = [to_dict(dataclasses.replace(config, decode=DecodeConfig())) for config in (was, now)]
    return [f"{name} {had}, got {has}" for name, had, has in differences(*both)]


def same_run(path: Path, found: Checkpoint, now: Checkpoint) -> None:
    """Raise UserError unless the stage that was begun in `path` is that of `now`, as far as both
    know: a stage goes on with what it was begun with, and one that is done is not another."""
    require(found.done or found.settings,
            f"{path}: was begun by an earlier version, whose noise was another; finish it with "
            "that one, or choose another --out")
    wrong = config_differences(found.config, now.config)
    wrong += [f"{name.replace('_', ' ')} {was}, got {got}"
              for name, was, got in differences(found.settings, now.settings)]
    wrong += [BELONGS[name] for name, *_ in differences(found.fingerprints, now.fingerprints)]
    require(not wrong, f"{path}: was begun with {'; '.join(wrong)}; give it what it was begun "
                       "with, or choose another --out")


def load_start(path: Path, config: Config, is_named: bool) -> Checkpoint:
    """Read what a stage starts from. Raises UserError unless it is of a model that computes as one
    of `config` does, and done; one that the user named need not be done."""
    found = load_checkpoint(path)
    wrong = config_differences(found.config, config)
    require(not wrong, f"{path}: was trained with {'; '.join(wrong)}; start from a checkpoint of "
                       "this model")
    require(found.done or is_named,
            f"{path}: expected a stage that is done, got {found.step} steps of one; finish it "
            "with --resume, or name it with --init")
    return found
