"""What the stages of a run share, how a run is stopped, what a stage says, and one step of it."""

import itertools
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..command.script import UNREAD, progress, unread
from ..config import StageConfig
from ..data import Batch, Example
from ..errors import require
from ..fast.device import autocast
from ..model import Diffa2Model
from ..quantize import QuantizedLinear
from ..tokenizer import Tokenizer
from .dry_run import Shape, step_flops
from .features import FeatureCache
from .folder import Log, RunFolder, finite
from .loader import STOP_SIGNALS, StageLoader
from .manifests import RunData, what_is_cut
from .objective import piece_loss
from .processes import World


class Stopped(Exception):
    """A signal ends the run. Raised between two steps, or between two batches of a measurement."""


class Signals:
    """Remembers what is to end the run: Ctrl-C, SIGTERM, SIGHUP (the terminal was closed), or that
    nobody reads the output any more. A second signal ends it at once, unless `ignore_second`."""

    def __init__(self, ignore_second: bool):
        self.ignore_second, self.number = ignore_second, None

    def catch(self) -> None:
        """From now on signals are remembered; but not SIGHUP under `nohup`, which ignores it."""
        for number in STOP_SIGNALS:
            always = number in (signal.SIGINT, signal.SIGTERM)
            if always or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number: int, frame) -> None:
        if self.number and not self.ignore_second:
            sys.exit(128 + number)
        self.number = number

    @property
    def received(self) -> int | None:
        """The number of the signal that is to end the run, or None (SIGPIPE: output unread)."""
        return self.number or (UNREAD - 128 if unread() else None)


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
    peak_flops: float  # of all processes together, a second

    def __post_init__(self):
        self.log = Log(self.folder.out / "log.jsonl", self.world.is_main)
        self.signals = Signals(ignore_second=self.world.size > 1)  # torchrun repeats a signal
        self.is_stopping = False

    def raise_if_stopped(self) -> None:
        """Raise Stopped in all processes if one of them has received a signal."""
        self.is_stopping = any(self.world.gather([self.signals.received is not None]))
        if self.is_stopping:
            raise Stopped

    def cache_features(self, number: int, skip_broken: bool) -> list[Example]:
        """Encode the clips of a stage that are to be cached. Returns its examples whose clips can
        be read. Raises UserError if there are none, or Stopped."""
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
        require(examples, f"{manifest}: not one of its clips can be read")
        self.world.require_equal(len(examples), f"{manifest}: the processes see different "
                                 "examples; give all machines the same data")
        return examples

    def print_stage(self, stage: StageConfig, examples: list[Example], n_steps: int,
                    first_step: int) -> None:
        """Print what a stage trains, on which data, and after which step a resumed one goes on."""
        n_all = sum(p.numel() for p in self.model.parameters())
        n_all += sum(layer.out_features * layer.in_features for layer in self.model.modules()
                     if isinstance(layer, QuantizedLinear))
        n_trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        print(f"\nstage {stage.number}, {stage.title}: trains {' + '.join(stage.trains)}\n"
              f"  trainable parameters: {n_trained:,} of {n_all:,} ({n_trained / n_all:.2%})\n"
              f"  {len(examples):,} examples of {self.data.manifests[stage.number]}, {n_steps:,} "
              f"steps of {stage.batch_size} ({stage.micro_batch} at once), learning rate "
              f"{stage.lr:g}, {stage.warmup} steps of warm-up, {stage.schedule}")
        if cut := what_is_cut(examples, stage, self.model.config, self.tokenizer):
            print(f"  not learnt whole: {cut}")
        if first_step:
            print(f"  goes on after step {first_step:,}")


class StageProgress:
    """The progress bar of a stage, the speed of its steps, and a count of what it skips."""

    def __init__(self, run: Run, stage: StageConfig, loader: StageLoader, n_steps: int,
                 first_step: int):
        self.run, self.stage, self.loader, self.first_step = run, stage, loader, first_step
        self.bar: tqdm = progress(total=n_steps, initial=first_step, unit="step",
                                  desc=f"  stage {stage.number}", disable=not run.world.is_main)
        self.start = time.perf_counter()
        self.skipped = Counter()

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.perf_counter() - self.start

    @property
    def waited(self) -> float:
        """Seconds that the stage has waited for data so far."""
        return self.loader.waited + self.run.features.waited

    def begin_step(self) -> None:
        self.step_start, self.waited_before = time.perf_counter(), self.waited

    def end_step(self, row: dict, lengths: list[tuple[int, int]], n_masked: int, n_broken: int
                 ) -> dict[str, float]:
        """How fast a step was, for the log that has its `row`: on responses of `lengths` (tokens
        before, own). `mfu`, model FLOPs utilisation, is of what the device can do in that time."""
        run, stage, seconds = self.run, self.stage, time.perf_counter() - self.step_start
        n_clips = 0 if run.features.keeps_features else stage.batch_size  # to be encoded
        if stage.preference:  # masked wholly, both answers of a pair are read as one
            once = stage.masking == "all-masked"
            lengths = lengths[::2] if once else lengths * stage.vrpo_samples
        shape = Shape(n_clips, lengths, n_masked)
        flops = step_flops(run.model.config, stage, shape)
        n_examples = stage.batch_size * (row["step"] - self.first_step)
        speed = {"tokens_per_second": shape.tokens / seconds,  # padding is not counted
                 "mfu": flops / seconds / run.peak_flops,
                 "data_wait": self.waited - self.waited_before,
                 "examples_per_second": n_examples / self.seconds}
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{row['lr']:.1e}",
                             examples_s=f"{speed['examples_per_second']:.0f}",
                             tokens_s=f"{speed['tokens_per_second']:.0f}",
                             mfu=f"{speed['mfu']:.0%}", refresh=False)
        self.bar.update()
        self.skipped["steps whose loss or gradient was not finite"] += not finite(row)
        self.skipped["clips that were broken"] += n_broken
        return speed if finite(row) else speed | {"skipped": 1}

    def print_skipped(self) -> None:
        for what, n in self.skipped.items():
            if n:
                print(f"  skipped {n} {what}")


@dataclass
class StageParameters:
    """What a stage trains, and with what."""

    stage: StageConfig
    trained: dict[str, nn.Parameter]  # by name
    reference: dict[str, Tensor]  # their values before the first step, in a preference stage
    optimizer: torch.optim.AdamW


def optimizer_step(run: Run, parameters: StageParameters, n_tokens: int, batches: Iterator[Batch]
                   ) -> dict[str, float]:
    """One step of the optimiser, on a batch with `n_tokens` tokens in its answers; `batches` are
    this process's part. Returns figures of the whole batch: loss and others to log, and `masked`
    (tokens predicted), `broken` (clips), `signals` (processes that received one)."""
    figures = Counter(masked=0, broken=0, signals=run.signals.received is not None)
    for batch in batches:
        batch = batch.encoded(run.features, run.device)
        with autocast(run.device, run.dtype):
            piece = piece_loss(run.model, parameters.reference, batch, parameters.stage,
                               run.tokenizer, n_tokens)
        piece["loss"].backward()
        for name, value in piece.items():
            figures[name] += value.detach()
        figures["masked"] += int(batch.masked.sum())
        figures["broken"] += len(batch.broken)
        run.features.incomplete |= batch.incomplete
        for complaint in batch.broken.values():
            tqdm.write(f"  left out: {complaint}", file=sys.stderr)
    figures = run.world.sum_figures({name: float(value) for name, value in figures.items()})
    trained = list(parameters.trained.values())
    run.world.sum_gradients(trained)
    figures["grad_norm"] = float(nn.utils.clip_grad_norm_(trained, parameters.stage.grad_clip))
    if finite(figures):
        parameters.optimizer.step()
    parameters.optimizer.zero_grad()
    return figures
