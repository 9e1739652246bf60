"""What the stages of a run share, how a run is stopped, and one step of the optimiser."""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..command.script import progress
from ..config import StageConfig
from ..data import Batch, Example
from ..errors import require
from ..fast.device import autocast
from ..model import Diffa2Model
from ..tokenizer import Tokenizer
from .features import FeatureCache
from .folder import RunFolder
from .log import Log, finite
from .manifests import RunData
from .objective import piece_loss
from .processes import World
from .signals import Signals


class Stopped(Exception):
    """A signal ends the run. Raised between two steps, or between two batches of a measurement."""


@dataclass
class Run:
    """What all stages of a run share. Each process of `world` has one."""

    world: World
    device: torch.device
    dtype: torch.dtype  # of the frozen parts
    data: RunData
    tokenizer: Tokenizer
    model: Diffa2Model
    features: FeatureCache
    folder: RunFolder
    log: Log
    signals: Signals
    peak_flops: float  # of all processes together, a second
    is_stopping: bool = field(default=False, init=False)

    def raise_if_stopped(self) -> None:
        """Raise Stopped in all processes if one of them has received a signal."""
        self.is_stopping = any(self.world.gather([self.signals.received is not None]))
        if self.is_stopping:
            raise Stopped

    def cache_features(self, number: int, skip_broken: bool) -> list[Example]:
        """Encode the clips of a stage ahead of time, if they are to be cached. Returns the stage's
        examples whose clips can be read. Raises UserError if there are none, or Stopped."""
        data, manifest = self.data, self.data.manifests[number]

        def until_stopped(paths: list) -> Iterator:
            bar = progress(paths, desc="  encoding clips", leave=False,
                           disable=not self.world.is_main)
            return itertools.takewhile(lambda path: self.signals.received is None, bar)

        paths = [example.path for example in data.examples[number] + data.validation]
        unreadable = self.features.prepare(paths, until_stopped, skip_broken, self.world)
        self.raise_if_stopped()
        for complaint in unreadable.values():
            print(f"  left out: {complaint}")
        examples = [each for each in data.examples[number] if each.path not in unreadable]
        data.validation = [each for each in data.validation if each.path not in unreadable]
        require(examples, f"{manifest}: not one of its clips can be read")
        self.world.require_equal(len(examples), f"{manifest}: the processes see different "
                                 "examples; give all machines the same data")
        return examples


@dataclass
class StageParameters:
    """What a stage trains, and with what: `trained` by name; their `reference` values from before
    the first step, if it is a preference stage; the optimiser."""

    stage: StageConfig
    trained: dict[str, nn.Parameter]
    reference: dict[str, Tensor]
    optimizer: torch.optim.AdamW


def optimizer_step(run: Run, parameters: StageParameters, n_tokens: int, batches: Iterator[Batch]
                   ) -> dict[str, float]:
    """One step of the optimiser. `batches` are this process's part of the step's batch, which has
    `n_tokens` tokens in its answers. Returns figures of the whole batch: loss and others to log,
    and `masked` (tokens predicted), `broken` (clips), `signals` (processes that received one)."""
    figures = {"masked": 0, "broken": 0, "signals": run.signals.received is not None}
    for batch in batches:
        batch = batch.encoded(run.features, run.device)
        with autocast(run.device, run.dtype):
            piece = piece_loss(run.model, parameters.reference, batch, parameters.stage,
                               run.tokenizer, n_tokens)
        piece["loss"].backward()
        for name, value in piece.items():
            figures[name] = figures.get(name, 0) + value.detach()
        figures["masked"] += int(batch.masked.sum())
        figures["broken"] += len(batch.broken)
        run.features.incomplete |= batch.incomplete
        for complaint in batch.broken.values():
            tqdm.write(f"  left out: {complaint}", file=sys.stderr)
    figures = run.world.sum_figures({name: float(value) for name, value in figures.items()})
    trained = list(parameters.trained.values())
    run.world.sum_gradients(trained)
    grad_norm = nn.utils.clip_grad_norm_(trained, parameters.stage.grad_clip)
    figures["grad_norm"] = float(grad_norm)
    if finite(figures):
        parameters.optimizer.step()
    parameters.optimizer.zero_grad(set_to_none=True)
    return figures
