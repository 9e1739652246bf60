"""The flags of train.py, and what they change in the table of stages."""

import argparse
import dataclasses
import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from ..command.script import Parser
from ..config import SIZES, StageConfig
from ..errors import require
from ..fast.device import DTYPES

# the part of the model that each belongs to
DROPOUTS = {"lora_dropout": "lora", "adapter_dropout": "acoustic"}


def add_data_flags(add: Callable) -> None:
    """Which stages, on which data, into which folder."""
    add("--stage", default="all", choices=["0", "1", "2", "3", "4", "all"])
    add("--size", default="toy", choices=list(SIZES))
    add("--data", type=Path,
        help="a manifest, or a folder of them (default: the toy world, made if missing)")
    add("--validation", type=Path,
        help="a manifest to measure on (default: validation.json beside the data)")
    add("--test", type=Path, nargs="+", default=[], metavar="MANIFEST",
        help="measure on these too, once all is done")
    add("--parts", default="both", choices=["whisper", "llada", "both"],
        help="of stage 0: what to pretrain")
    add("--skip-broken", action="store_true",
        help="go on without entries of a manifest or clips that are broken, and name them")
    add("--skip-nonfinite", action="store_true",
        help="go on without steps whose loss or gradient is not finite, and count them")
    add("--out", type=Path, help="where checkpoints and logs go (default: runs/SIZE)")


def add_start_flags(add: Callable) -> None:
    """What training starts from."""
    add("--init", type=Path, metavar="CHECKPOINT",
        help="start from this (default: the stage before, in --out)")
    add("--other-parts", action="store_true",
        help="start from a checkpoint that was trained on another --whisper or --llada")
    add("--resume", action="store_true", help="go on where the run in --out was stopped")
    add("--whisper", help="weights of the encoder: a file, a folder or a hub name (default: the "
                          "size's; in stage 0: none)")
    add("--llada",
        help="weights of the backbone (likewise; with them, stage 0 goes on to its last part)")
    add("--diffa2", help="start from published adapters and LoRA, likewise, instead of --init")
    add("--random-weights", action="store_true", help="instead of downloads: to try a machine")
    add("--dry-run", action="store_true",
        help="build without memory, and print what the stages would take")


def add_step_flags(add: Callable) -> None:
    """How the stages are trained, measured and saved."""
    add("--steps", type=int, help="steps of each stage")
    add("--epochs", type=int, help="instead of --steps: passes over the data")
    add("--batch-size", type=int, help="examples per step")
    add("--grad-accum", type=int,
        help="pieces that a process's part of a batch is cut into, to save memory")
    add("--lr", type=float, help="peak learning rate")
    add("--warmup", type=int, help="steps")
    add("--lora-dropout", type=float, help="of LoRA's inputs in stage 3, from 0 to 0.99")
    add("--adapter-dropout", type=float, help="of the acoustic adapter in stages 2 and 3, likewise")
    add("--eval-every", type=int, default=0,
        help="steps between measurements (default: at the end of a stage alone)")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add("--sample-every", type=int, default=200, help="steps between decoded samples")


def add_machine_flags(add: Callable) -> None:
    """On which machine, and how its memory and time are used."""
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="auto", choices=["auto", *DTYPES],
        help="of the frozen parts (auto: bfloat16 on CUDA)")
    add("--recompute", choices=["nothing", "feed-forward", "blocks"],
        help="of the backbone, in the backward pass: less memory, more time (default: blocks, for "
             "downloaded weights)")
    add("--threads", type=int, help="CPU threads (default: one per core)")
    add("--seed", type=int, default=42)
    add("--workers", type=int,
        help="processes that load audio (default: none where it is kept, else up to 8)")
    add("--no-cache-audio", action="store_true",
        help="do not keep what the encoder makes of toy clips in memory")
    add("--cache-audio", type=Path, metavar="DIR",
        help="keep what the encoder makes of each clip on disk")
    add("--compile", action="store_true",
        help="have torch.compile fuse operations: slow to start, then faster")
    add("--shard", action="store_true",
        help="under torchrun: split the frozen backbone among the processes")
    add("--processes", type=int, help="of --dry-run: as if torchrun started so many")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError where flags contradict each other."""
    require(not (args.init and args.diffa2), "--init and --diffa2 exclude each other; choose one")
    require(not args.shard or args.stage != "0",
            "--shard splits the backbone of stages 1 to 4; leave it out")
    require(not args.shard or args.processes > 1,
            "--shard splits among processes; start them with: torchrun --nproc_per_node=N")
    require(not (args.shard and args.compile),
            "--shard and --compile exclude each other; choose one")
    require(not args.shard or args.stage != "all" or args.dry_run,
            "--shard takes one stage at a time; name it: --stage 1")
    require(not args.dry_run or args.stage != "0",
            "--dry-run plans stages 1 to 4; leave out --stage 0")
    stages = SIZES[args.size][1]
    require(args.stage == "0" or args.stages[0] in stages,
            f"--size {args.size} has stages {', '.join(map(str, stages))}")


def count_processes(args: argparse.Namespace) -> int:
    """How many processes torchrun has started; for a dry run, those of --processes. Raises
    UserError."""
    started = os.environ.get("WORLD_SIZE", "1")
    require(started.isdecimal() and int(started),
            f"expected WORLD_SIZE, a number of processes, from torchrun, got {started!r}; unset it")
    require(args.processes in (None, int(started)) or args.dry_run,
            f"--processes {args.processes}: got {int(started)}; start them with: "
            f"torchrun --nproc_per_node={args.processes} train.py")
    return args.processes or int(started)


def parse_arguments(argv: list[str], description: str) -> argparse.Namespace:
    """The flags of train.py, with `stages`, the numbers of the stages to train. Raises UserError
    where they contradict each other."""
    parser = Parser(description)
    for add_flags in (add_data_flags, add_start_flags, add_step_flags, add_machine_flags):
        add_flags(parser.add_argument)
    args = parser.parse_args(argv)
    args.processes = count_processes(args)
    args.out = args.out or Path("runs") / args.size
    if args.stage == "all":
        args.stages = list(SIZES[args.size][1])
    else:
        args.stages = [] if args.stage == "0" else [int(args.stage)]
    check_arguments(args)
    for number in args.stages:
        stage_config(args, number)  # which refuses what cannot be
    return args


def stage_config(args: argparse.Namespace, number: int) -> StageConfig:
    """The stage's row of the table, with what the command line changes. Raises UserError."""
    row = SIZES[args.size][1][number]
    names = ("lr", "warmup", "batch_size", "steps", "epochs", *DROPOUTS)
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, part in DROPOUTS.items():
        if name in changes and (row.preference or part not in row.trains):
            why = f"does not train the {part} part"
            if row.preference:
                why = "compares with a reference that has none"
            require(args.stage == "all" or not changes[name],
                    f"--{name.replace('_', '-')}: stage {number} {why}; leave it out")
            del changes[name]
    if "epochs" in changes:
        changes.setdefault("steps", None)
    stage = dataclasses.replace(row, **changes)
    return dataclasses.replace(stage, micro_batch=micro_batch(args, stage))


def micro_batch(args: argparse.Namespace, stage: StageConfig) -> int:
    """How many examples a process computes at once. Raises UserError if the batch cannot be divided
    as the flags want it."""
    size, n = stage.batch_size, args.processes
    require(size >= n, f"--batch-size {size}: expected an example for each of {n} processes; raise "
                       "it")
    require(not args.shard or size % n == 0,
            "--batch-size must be a multiple of the number of processes with --shard, got "
            f"{size} and {n}")
    per_process = math.ceil(size / n)
    n_pieces = args.grad_accum or math.ceil(per_process / (stage.micro_batch or per_process))
    require(args.grad_accum is None or size % (n_pieces * n) == 0,
            f"--batch-size must be a multiple of --grad-accum, for each process, got {size} and "
            f"{n_pieces}")
    return math.ceil(per_process / n_pieces)


# ------------------------------------------------------------------------- commands that go on here


def resume_command(args: argparse.Namespace, argv: list[str]) -> str:
    """How to go on with a run that was started with the flags `argv`."""
    if args.processes > 1:
        return "the same torchrun command and --resume"
    return shlex.join(["python", "train.py", *argv, *([] if args.resume else ["--resume"])])


def ask_command(args: argparse.Namespace, path: Path) -> str:
    """How to ask the checkpoint at `path`, on the frozen parts that it was trained on."""
    parts = {"--checkpoint": str(path), "--whisper": args.whisper, "--llada": args.llada}
    words = [word for flag, value in parts.items() if value for word in (flag, value)]
    return shlex.join(["python", "sample.py", "data/clips/three_one_four.wav", *words])
