"""Stage 0 takes an hour on a CPU: what it has made of a backbone is saved now and then, so that it
can be stopped and go on. It gives the same weights then, bit for bit."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from diffa2_mini.config import Config
from diffa2_mini.llada import Llada
from diffa2_mini.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    optimizer_tensors,
    require_same,
    restore_optimizer,
    save_checkpoint,
)


@dataclass(frozen=True)
class Saves:
    """Where a backbone is saved on its way, and the settings that decide it. `resume`: whether to
    go on from there. Without a path nothing is saved."""

    path: Path | None = None
    every: int = 100  # steps
    resume: bool = False
    config: Config | None = None
    settings: dict = field(default_factory=dict)

    def save(self, step: int, llada: Llada, optimizer: torch.optim.AdamW, means: Tensor,
             generator: torch.Generator) -> None:
        """Save what `step` steps on texts have made, if it is time to: weights, what the optimiser
        keeps, the `means` of the losses [2], and the state of the `generator`. Raises UserError."""
        if self.path and step % self.every == 0:
            tensors = llada.state_dict() | {"means": means, "generator": generator.get_state()}
            save_checkpoint(self.path, Checkpoint(
                self.config, 0, step, False, tensors, settings=self.settings,
                optimizer=optimizer_tensors(optimizer, llada)))

    def restore(self, llada: Llada, optimizer: torch.optim.AdamW, means: Tensor,
                generator: torch.Generator) -> int:
        """Fill all that `save` was given; returns how many steps had been made, 0 if there is
        nothing to go on from. Raises UserError if that was made with other settings."""
        if not (self.resume and self.path and self.path.is_file()):
            return 0
        found = load_checkpoint(self.path)
        require_same(self.path, found, "leave out --resume to begin anew", config=self.config,
                     settings=self.settings)
        means.copy_(found.model.pop("means"))
        generator.set_state(found.model.pop("generator"))
        llada.load_state_dict(found.model)
        restore_optimizer(optimizer, llada, found.optimizer)
        return found.step

    def remove(self) -> None:
        """Delete the file: the backbone is done."""
        self.path.unlink(missing_ok=True)


NOT_SAVED = Saves()
