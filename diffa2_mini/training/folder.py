"""The folder of a run: locked while one writes there, with checkpoints of this run and no other;
its log.jsonl, and which clips gave a loss that is not finite."""

import dataclasses
import json
import math
from contextlib import ExitStack
from pathlib import Path

import torch

from ..errors import require
from ..model import Diffa2Model
from ..weights import trained_tensors
from . import checkpoint, files
from .checkpoint import Checkpoint
from .processes import World


def finite(row: dict) -> bool:
    """Are the loss and the norm of its gradient numbers that a step can be made with?"""
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def read_row(line: bytes) -> dict | None:
    """A line of log.jsonl as `Log` writes it, or None: others may have written there too."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no text, a number too long, or depth
        return None
    ours = isinstance(row, dict) and all(type(row.get(name)) is int for name in ("stage", "step"))
    return row if ours and max(abs(row["stage"]), abs(row["step"])) < 2**53 else None


class Log:
    """A run's log.jsonl: a line of JSON for each step and measurement. One process `writes` it."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes

    def add(self, **row) -> None:
        if self.writes:
            row = {name: str(value) if isinstance(value, float) and not math.isfinite(value)
                   else value for name, value in row.items()}  # JSON has no nan
            files.append(self.path, json.dumps(row) + "\n")

    def note_nonfinite(self, row: dict, clips: list[str], skip: bool) -> None:
        """Write the clips of a step whose loss or gradient is not finite to nonfinite.jsonl. `row`
        is the log's, before it has it. Raises UserError unless `skip`."""
        path, loss, norm = self.path.with_name("nonfinite.jsonl"), row["loss"], row["grad_norm"]
        Log(path, self.writes).add(stage=row["stage"], step=row["step"], loss=loss, grad_norm=norm,
                                   clips=clips)
        require(skip, f"stage {row['stage']}, step {row['step']}: expected a finite loss and "
                f"gradient, got {loss} and {norm}; {path} names the clips. Begin again with a "
                "lower --lr, or go on without such steps: --resume --skip-nonfinite")

    def forget_after(self, stage: int, step: int) -> None:
        """Drop a stage's entries after a checkpoint: the resumed run logs these steps again. Those
        of later stages stay, which may be done although this one goes back to an earlier save."""
        *lines, half = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        lines += [half] if read_row(half) else []  # or what a killed run wrote half of
        kept = [line + b"\n" for line in lines if not (row := read_row(line))
                or row["stage"] != stage or row["step"] <= step]
        files.write_whole(self.path, lambda temporary: temporary.write_bytes(b"".join(kept)))


class RunFolder:
    """The folder `out` of a run that trains the stages of `begun`: these are checkpoints before
    their first step, which tell what a saved stage must agree with. `saved` has those that are
    there, if the run is to `resume`. Raises UserError if the folder is another run's.

    It is locked until `stack` closes, and if it is new made by `claim`, to which no run that is
    refused comes."""

    def __init__(self, out: Path, begun: dict[int, Checkpoint], resume: bool, world: World,
                 stack: ExitStack):
        self.out, self.begun, self.resume, self.world, self.stack = out, begun, resume, world, stack
        self.saved: dict[int, Checkpoint] = {}
        self.is_new = not out.exists()
        with world.main_first():
            if not self.is_new:
                self.lock()
            for number in begun:
                if resume and self.path(number).exists():
                    self.saved[number] = files.load_last(self.path(number),
                                                         checkpoint.load_checkpoint)
        states = [(number, state.step, state.done) for number, state in self.saved.items()]
        world.require_equal(states, f"{out}: the processes see different checkpoints; give an "
                                    "--out that all machines share")
        for number in self.saved:
            self.note(number, {})

    def path(self, number: int) -> Path:
        """Where the checkpoint of a stage is."""
        return self.out / f"stage{number}.safetensors"

    @property
    def unfinished(self) -> list[int]:
        """The stages that are still to be trained, or to be trained to their end."""
        return [number for number in self.begun
                if number not in self.saved or not self.saved[number].done]

    def lock(self) -> None:
        """Keep other runs out. Raises UserError if one is here, or was and is not resumed."""
        if self.world.is_main:
            self.stack.enter_context(files.lock(self.out))
            require(self.resume or not any(self.path(number).exists() for number in self.begun),
                    f"{self.out}: holds a run already; go on with --resume, or choose another "
                    "--out")

    def note(self, number: int, settings: dict, **fingerprints: str) -> None:
        """Note what else a stage is begun with. Raises UserError if the saved one had another."""
        begun = self.begun[number]
        begun.settings |= settings
        begun.fingerprints |= fingerprints
        if number in self.saved:
            checkpoint.require_same(
                self.path(number), self.saved[number], "give it what it was begun with, or choose "
                "another --out", config=begun.config, settings=begun.settings,
                fingerprints=begun.fingerprints)

    def note_origins(self, fingerprints: dict[str, str], dtype: torch.dtype,
                     manifests: dict[int, Path], quantize: str | None = None) -> None:
        """Note what the stages are trained on: the files of the model's parts (without, these are
        random), the dtype of those that are frozen, how they are quantised, and the manifests."""
        self.fingerprints = dict.fromkeys(("whisper", "llada", "diffa2"), "random") | fingerprints
        for number, path in manifests.items():
            origins = {part: self.fingerprints[part] for part in ("whisper", "llada")}
            if path.is_file():  # that of a finished stage may be gone
                origins["manifest"] = files.digest_of(path)
            how = {"dtype": str(dtype).removeprefix("torch."), "quantize": quantize}
            self.note(number, how, **origins)

    def note_start(self, number: int, init: Checkpoint | None) -> None:
        """Note the weights that a stage starts from: of `init`, or else of the model's parts."""
        start = checkpoint.fingerprint(init.model) if init else self.fingerprints["diffa2"]
        self.note(number, {}, start=start)

    def claim(self, about: dict) -> None:
        """Make the folder, if it is new, and lock it; write `about` the run to config.json."""
        if self.is_new:
            self.lock()
        if self.world.is_main and self.unfinished:
            text = json.dumps(about, indent=2) + "\n"
            files.write_whole(self.out / "config.json", lambda path: path.write_text(text))

    def save(self, number: int, step: int, model: Diffa2Model,
             optimizer: torch.optim.AdamW | None = None) -> Checkpoint:
        """Save a stage after `step` steps: with the `optimizer`, to go on; without, as done."""
        state = dataclasses.replace(
            self.begun[number], step=step, done=optimizer is None, model=trained_tensors(model),
            optimizer=checkpoint.optimizer_tensors(optimizer, model) if optimizer else {})
        if self.world.is_main:
            checkpoint.save_checkpoint(self.path(number), state, keep=files.keep_previous)
        self.world.wait()
        return state
