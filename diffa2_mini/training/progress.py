"""What a stage says while it trains: its size, its progress, how fast its steps are."""

import time

from torch import nn
from tqdm import tqdm

from ..command.script import progress
from ..config import StageConfig
from .dry_run import Shape, step_flops
from .loader import StageLoader
from .log import finite
from .run import Run


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
    """The progress bar of a stage, the speed of its steps, and a count of what it skips."""

    def __init__(self, run: Run, stage: StageConfig, loader: StageLoader, n_steps: int,
                 first_step: int):
        self.run, self.stage, self.loader, self.first_step = run, stage, loader, first_step
        self.bar: tqdm = progress(total=n_steps, initial=first_step, unit="step",
                                  desc=f"  stage {stage.number}", disable=not run.world.is_main)
        self.start = time.perf_counter()
        self.n_nonfinite, self.n_broken = 0, 0  # steps, clips

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
        """How fast a step was, on answers of these `lengths`, for the log: `mfu` is its share of
        the operations that the device can do in that time (model FLOPs utilisation). `row` is what
        else the log has of it; the bar shows some of both."""
        run, stage, seconds = self.run, self.stage, time.perf_counter() - self.step_start
        n_clips = 0 if run.features.keeps_features else stage.batch_size  # to be encoded
        shape = Shape(n_clips, lengths * (stage.vrpo_samples if stage.preference else 1), n_masked)
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
        self.n_broken += n_broken
        if not finite(row):
            self.n_nonfinite += 1
            speed["skipped"] = 1
        return speed

    def print_skipped(self) -> None:
        if self.n_nonfinite:
            print(f"  skipped {self.n_nonfinite} steps whose loss or gradient was not finite")
        if self.n_broken:
            print(f"  skipped {self.n_broken} clips that were broken")
