"""Checkpoints: one safetensors file with what was trained, its config, and all that resuming needs.
They can be exported: in the published names, or as a smaller copy.

Such a file holds named tensors and a few strings, and no code. Tensors of the model keep their
names; those of the optimiser have a prefix. It knows what it belongs to: the settings that decide
its run, and fingerprints of the weights and the manifest that it was trained on. Where these differ
from what it is used with, `require_same` names them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..command.script import Parser
from ..config import PROMPTS_AND_SEMANTIC, Config, StageConfig, from_dict
from ..errors import require
from ..model import part_of
from ..published.sources import moved
from ..weights import read_part, read_tensors, translate
from .files import save_tensors, write_whole

FORMAT = "diffa2_mini 3"  # of a checkpoint
ENDS = 2**16  # bytes at each end of a tensor that its fingerprint reads
ORIGINS = {  # what a checkpoint has fingerprints of, and what to say of others
    "whisper": "another encoder (--whisper)", "llada": "another backbone (--llada)",
    "start": "another start (--init, --diffa2 or the stage before)",
    "manifest": "another manifest (--data)"}
TO_PUBLISHED = [  # from our names to those of DIFFA-2
    (r"^acoustic_connector\.qformer\.", "acoustic_connector.qformer.layer."),
    (r"attention\.(query|key|value)\.", r"attention.self.\1."),
    (r"attention\.(dense|LayerNorm)\.", r"attention.output.\1."),
    (r"(layer\.\d+\.intermediate)\.", r"\1.dense."), (r"(layer\.\d+\.output)\.", r"\1.dense."),
    (r"(layer\.\d+)\.LayerNorm\.", r"\1.output.LayerNorm."),
    (r"^llada\.", "llm_model.base_model.model.model.transformer."),
    (r"\.(lora_[AB])$", r".\1.default.weight")]


@dataclass
class Checkpoint:
    """What a file holds. `stage` is the stage that it belongs to and `step` how many of its steps
    are done. `settings` and `fingerprints` are empty where nothing is known."""

    config: Config
    stage: int
    step: int
    done: bool
    model: dict[str, Tensor]
    audio: tuple[str, ...] = ()  # what the stage splices into the prompt
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)  # what else decides the run, as JSON gives it back
    fingerprints: dict[str, str] = field(default_factory=dict)  # by the keys of ORIGINS


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Tells weights apart: SHA-256 in hexadecimal over each tensor's name, shape, and first and
    last 64 KiB, by name, so that of 16 GB in mapped files little is read. Float32 weights that are
    all float16 numbers, as some are published, have the fingerprint of these."""
    found = hashlib.sha256()
    is_half = all(w.dtype == torch.float32 and (w == w.half()).all() for w in tensors.values())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, list(tensor.shape)]).encode())
        numbers = (tensor.half() if is_half else tensor).detach().reshape(-1)
        n = max(1, ENDS // numbers.element_size())
        for end in (numbers[:n], numbers[-n:]):
            found.update(end.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def fingerprints_of(paths: dict[str, Path]) -> dict[str, str]:
    """The fingerprint of each part's files, whatever the layout."""
    return {part: fingerprint(read_part(path, part)) for part, path in paths.items()}


def digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 in hexadecimal over metadata and, by name, all names, dtypes, shapes and bytes."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def save_checkpoint(path: Path, checkpoint: Checkpoint, keep: Callable | None = None) -> None:
    """Write a checkpoint, or nothing, as `write_whole` does."""
    fields = dataclasses.asdict(dataclasses.replace(checkpoint, model={}, optimizer={}))
    del fields["model"], fields["optimizer"]  # which are tensors of the file
    tensors = checkpoint.model | {f"optimizer.{name}": tensor
                                  for name, tensor in checkpoint.optimizer.items()}
    metadata = {"format": FORMAT, "checkpoint": json.dumps(fields)}
    save_tensors(path, tensors, metadata | {"sha256": digest(tensors, metadata)}, keep)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint into memory: Windows replaces no file that is mapped, and the next save is
    to replace this one. Raises UserError if the file is missing, cut, or not one of ours."""
    what = "a folder; name a stage's file" if path.is_dir() else "no such file"
    require(path.is_file(), f"{path}: expected a checkpoint, found {what}"
                            f"{moved(path) or '; python train.py makes one'}")
    tensors, metadata = read_tensors(path, "a checkpoint")
    found = metadata.get("format", "another safetensors file")
    require(found == FORMAT, f"{path}: expected a checkpoint of '{FORMAT}', got {found!r}; choose "
                             "or train another")
    require(metadata.pop("sha256", None) == digest(tensors, metadata),
            f"{path}: expected a whole checkpoint, got one that is damaged (its checksum differs); "
            "copy or train it anew")
    model = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer = {name.removeprefix("optimizer."): model.pop(name)
                 for name in tensors if name.startswith("optimizer.")}
    fields = json.loads(metadata["checkpoint"])
    config, audio = from_dict(fields.pop("config")), tuple(fields.pop("audio"))
    return Checkpoint(config, **fields, model=model, audio=audio, optimizer=optimizer)


def differences(was, now) -> list[str]:
    """What differs, in words, of the names that two dataclasses or dictionaries both have. How a
    model decodes decides nothing of its training."""
    was, now = (each if isinstance(each, dict) else vars(each) for each in (was, now))
    found = []
    for name in sorted(was.keys() & now.keys() - {"decode"}):
        if dataclasses.is_dataclass(was[name]):
            found += [f"{name}.{line}" for line in differences(was[name], now[name])]
        elif was[name] != now[name]:
            words = f"{name.replace('_', ' ')} {was[name]}, got {now[name]}".replace("None", "none")
            found.append(ORIGINS.get(name, words))
    return found


def require_same(path: Path, found: Checkpoint, advice: str, **now) -> None:
    """Raise UserError unless a checkpoint agrees with `now`, which has a config, settings or
    fingerprints, in all that both know."""
    wrong = [line for name, values in now.items()
             for line in differences(getattr(found, name), values)]
    require(not wrong, f"{path}: was trained with {'; '.join(wrong)}; {advice}")


def require_same_parts(path: Path, found: Checkpoint, fingerprints: dict[str, str]) -> None:
    """Raise UserError unless a checkpoint was trained on the frozen parts of `fingerprints`."""
    require_same(path, found, "name those that it was trained on, or take these all the same: "
                 "--other-parts", fingerprints=fingerprints)


def begin(config: Config, stage: StageConfig, seed: int) -> Checkpoint:
    """A checkpoint of a stage before its first step: no tensors, and the settings that decide its
    run. In which pieces a batch is computed is none of them, nor are epochs beside steps."""
    settings = {"seed": seed} | dataclasses.asdict(stage)
    for name in ("title", "data", "micro_batch", *(["epochs"] if stage.steps else [])):
        del settings[name]
    return Checkpoint(config, stage.number, 0, False, {}, stage.audio,
                      settings=json.loads(json.dumps(settings)))


def load_start(path: Path, config: Config, is_named: bool) -> Checkpoint:
    """Read what a stage starts from. Raises UserError unless it is of a model that computes as one
    of `config` does, and done; one that the user named need not be done."""
    found = load_checkpoint(path)
    require_same(path, found, "start from a checkpoint of this model", config=config)
    require(found.done or is_named,
            f"{path}: expected a stage that is done, got {found.step} steps of one; finish it "
            "with --resume, or name it with --init")
    return found


def optimizer_tensors(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state, as tensors by their own name and that of the model's parameter."""
    return {f"{key}.{name}": tensor for name, parameter in model.named_parameters()
            for key, tensor in optimizer.state.get(parameter, {}).items()}


def restore_optimizer(optimizer: torch.optim.AdamW, model: nn.Module,
                      tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. AdamW counts its steps on the CPU unless it is fused."""
    fused = optimizer.defaults["fused"]
    for full_name, tensor in tensors.items():
        key, name = full_name.split(".", 1)
        parameter = model.get_parameter(name)
        device = parameter.device if fused or key != "step" else "cpu"
        optimizer.state[parameter][key] = tensor.to(device)


def save_diffa2(trained: dict[str, Tensor], path: Path) -> None:
    """Write the `trained_tensors` of a model under the authors' names: a .bin, which their code
    reads, or safetensors. Reading it again gives the same bits."""
    tensors = {translate(name, TO_PUBLISHED): tensor.cpu().clone()
               for name, tensor in trained.items()}
    if path.suffix == ".safetensors":
        save_tensors(path, tensors, {"format": "pt"})
    else:
        write_whole(path, partial(torch.save, tensors))


def export(checkpoint: Path, to: Path, half: bool = False) -> None:
    """Write what a checkpoint of ours trained in the authors' names; or with `half`, a copy of it
    in float16 and without the optimiser's state."""
    found = load_checkpoint(checkpoint)
    if half:
        require(found.done, f"{checkpoint}: expected a stage that is done, got {found.step} steps")
        model = {name: tensor.half() for name, tensor in found.model.items()}
        save_checkpoint(to, dataclasses.replace(found, model=model, optimizer={}))
        return
    # stage 1, which trains these two alone; but what is fitted stays with what it was fitted to
    is_first = found.audio == PROMPTS_AND_SEMANTIC and not found.config.adapter.fitted
    save_diffa2({name: tensor for name, tensor in found.model.items()
                 if not is_first or part_of(name) in PROMPTS_AND_SEMANTIC}, to)


def main(argv: list[str]) -> None:
    """`python -m diffa2_mini.weights`"""
    from .. import weights

    parser = Parser(weights.__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="FROM", help="what train.py wrote")
    parser.add_argument("to", type=Path, metavar="TO", help="a .bin, or .safetensors")
    parser.add_argument("--half", action="store_true", help="a copy of FROM in float16 instead")
    export(**vars(parser.parse_args(argv)))
