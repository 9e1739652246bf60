"""The folder of a run: locked while one writes there, with checkpoints of this run and no other."""

import json
from contextlib import ExitStack
from pathlib import Path

import torch

from .. import weights
from ..errors import require
from ..model import Diffa2Model
from . import checkpoint, files
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .files import write_whole
from .objective import names_of
from .processes import World


class RunFolder:
    """The folder `out` of a run that trains the stages of `begun`: these are checkpoints before
    their first step, which tell what a saved stage must agree with. `saved` has those that are
    there, if the run is to `resume`. Raises UserError if the folder is another run's.

    The lock is kept until `stack` closes. A new folder is made when the run `claim`s it: a run that
    is refused before leaves none behind."""

    def __init__(self, out: Path, begun: dict[int, Checkpoint], resume: bool, world: World,
                 stack: ExitStack):
        self.out, self.begun, self.resume, self.world, self.stack = out, begun, resume, world, stack
        self.saved: dict[int, Checkpoint] = {}
        self.is_new = not out.exists()
        with world.main_first():
            if world.is_main:
                if not self.is_new:
                    stack.enter_context(files.lock(out))
                self.require_unused()
            for number in begun:
                if resume and self.path(number).exists():
                    self.saved[number] = files.load_last(self.path(number),
                                                          load_checkpoint)
        states = [(number, state.step, state.done) for number, state in self.saved.items()]
        world.require_equal(states, f"{out}: the processes see different checkpoints; give an "
                                    "--out that all machines share")
        self.require_same_run()

    def path(self, number: int) -> Path:
        """Where the checkpoint of a stage is."""
        return self.out / f"stage{number}.safetensors"

    @property
    def unfinished(self) -> list[int]:
        """The stages that are still to be trained, or to be trained to their end."""
        return [number for number in self.begun
                if number not in self.saved or not self.saved[number].done]

    def require_unused(self) -> None:
        """Raise UserError if there are checkpoints and the run is not to resume."""
        require(self.resume or not any(self.path(number).exists() for number in self.begun),
                f"{self.out}: holds a run already; go on with --resume, or choose another --out")

    def require_same_run(self) -> None:
        """Raise UserError unless each saved stage was begun as this run begins it, as far as is
        known by now."""
        for number, state in self.saved.items():
            checkpoint.same_run(self.path(number), state, self.begun[number])

    def note_origins(self, model: Diffa2Model, dtype: torch.dtype, manifests: dict[int, Path]
                     ) -> None:
        """Note what the stages are trained on: the frozen parts, their dtype, the manifests."""
        for number, state in self.begun.items():
            state.settings["dtype"] = str(dtype).removeprefix("torch.")
            state.fingerprints |= {part: model.fingerprints[part] for part in ("whisper", "llada")}
            if manifests[number].is_file():  # that of a finished stage may be gone
                state.fingerprints["manifest"] = files.digest_of(manifests[number])

    def note_start(self, number: int, init: Checkpoint | None, model: Diffa2Model) -> None:
        """Note the weights that a stage starts from, and check them against those of the saved
        stage: of `init`, or else what `model` was built with."""
        start = weights.fingerprint(init.model) if init else model.fingerprints.get("diffa2",
                                                                                    "random")
        self.begun[number].fingerprints["start"] = start
        if number in self.saved:
            checkpoint.same_run(self.path(number), self.saved[number], self.begun[number])

    def note_examples(self, number: int, n_examples: int) -> None:
        """Note how many examples a stage has, and check that against the saved stage."""
        self.begun[number].settings["examples"] = n_examples
        if number in self.saved:
            checkpoint.same_run(self.path(number), self.saved[number], self.begun[number])

    def claim(self, about: dict) -> None:
        """Make the folder, if it is new, and lock it; write `about` the run to config.json."""
        if not self.world.is_main:
            return
        if self.is_new:
            self.stack.enter_context(files.lock(self.out))
        self.require_unused()
        if self.unfinished:
            text = json.dumps(about, indent=2) + "\n"
            write_whole(self.out / "config.json", lambda path: path.write_text(text))

    def save(self, number: int, step: int, model: Diffa2Model,
             optimizer: torch.optim.AdamW | None = None) -> Checkpoint:
        """Save a stage after `step` steps: with the `optimizer`, to go on; without, as done."""
        begun = self.begun[number]
        state = Checkpoint(begun.config, number, step, optimizer is None,
                           weights.trained_tensors(model), begun.audio,
                           settings=begun.settings, fingerprints=begun.fingerprints)
        if optimizer:
            state.optimizer = checkpoint.optimizer_tensors(optimizer, names_of(optimizer))
        if self.world.is_main:
            save_checkpoint(self.path(number), state, keep=files.keep_previous)
        self.world.wait()
        return state
