"""What a stage says while it trains: its size, its progress, how fast its steps are."""

import time
from collections.abc import Callable

from torch import nn
from tqdm import tqdm

from ..command.script import progress
from ..config import Config, StageConfig
from .dry_run import Shape, throughput
from .files import finite


def print_stage(stage: StageConfig, model: nn.Module, data: str, n_steps: int, cut: str,
                first_step: int = 0) -> None:
    """Print what a stage trains, how much of the model that is, on which data; what of it is too
    long, as `what_is_cut` says; and after which step a resumed one goes on."""
    n_all = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\nstage {stage.number}, {stage.title}: trains {' + '.join(stage.trains)}\n"
          f"  trainable parameters: {n_trained:,} of {n_all:,} ({n_trained / n_all:.2%})\n"
          f"  {data}, {n_steps:,} steps of {stage.batch_size} ({stage.micro_batch} at once), "
          f"learning rate {stage.lr:g}, {stage.warmup} steps of warm-up, {stage.schedule}")
    if cut:
        print(f"  not learnt whole: {cut}")
    if first_step:
        print(f"  goes on after step {first_step:,}")


class StageProgress:
    """The progress bar of a stage, the speed of its steps, and a count of what it skips. `waited`
    gives the seconds that the stage has waited for data so far. It ends with the `with` block."""

    def __init__(self, stage: StageConfig, n_steps: int, first_step: int, visible: bool,
                 waited: Callable[[], float]):
        self.stage, self.first_step, self.waited = stage, first_step, waited
        self.bar: tqdm = progress(total=n_steps, initial=first_step, unit="step",
                                  desc=f"  stage {stage.number}", disable=not visible)
        self.start = time.perf_counter()
        self.skipped = {"steps whose loss or gradient was not finite": 0,
                        "clips that were broken": 0}

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.bar.close()

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.perf_counter() - self.start

    def begin_step(self) -> None:
        self.step_start, self.waited_before = time.perf_counter(), self.waited()

    def end_step(self, row: dict, shape: Shape, config: Config, peak_flops: float
                 ) -> dict[str, float]:
        """How fast a step of this `shape` was, for the log. `row` is what else the log has of it;
        the bar shows some of both."""
        speed = throughput(config, self.stage, shape, time.perf_counter() - self.step_start,
                           peak_flops)
        speed["data_wait"] = self.waited() - self.waited_before
        n_examples = self.stage.batch_size * (row["step"] - self.first_step)
        speed["examples_per_second"] = n_examples / self.seconds
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{row['lr']:.1e}",
                             examples_s=f"{speed['examples_per_second']:.0f}",
                             tokens_s=f"{speed['tokens_per_second']:.0f}",
                             mfu=f"{speed['mfu']:.0%}", refresh=False)
        self.bar.update()
        return speed if finite(row) else speed | {"skipped": 1}

    def count_skipped(self, is_skipped: bool, n_broken: int) -> None:
        """Count a step that `is_skipped`, and its broken clips."""
        self.skipped["steps whose loss or gradient was not finite"] += is_skipped
        self.skipped["clips that were broken"] += n_broken

    def print_skipped(self) -> None:
        for what, n in self.skipped.items():
            if n:
                print(f"  skipped {n} {what}")
