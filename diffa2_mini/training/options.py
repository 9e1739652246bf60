"""The flags of train.py, and what they change in the table of stages."""

import argparse
import dataclasses
import math
import os
from pathlib import Path

from ..command.script import Parser
from ..config import SIZES, PretrainConfig, StageConfig
from ..errors import require
from ..fast.device import DTYPES

DROPOUTS = {"lora_dropout": "lora", "adapter_dropout": "acoustic"}  # and the part that each is of


def parse_arguments(argv: list[str], description: str) -> argparse.Namespace:
    """The flags of train.py. Raises UserError where they contradict each other."""
    parser = Parser(description)
    add = parser.add_argument
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
    add("--init", type=Path, metavar="CHECKPOINT",
        help="start from this (default: the stage before, in --out)")
    add("--other-parts", action="store_true",
        help="start from a checkpoint that was trained on another --whisper or --llada")
    add("--resume", action="store_true", help="go on where the run in --out was stopped")
    add(
        "--whisper", help=
        "weights of the encoder: a file, a folder or a hub name (default: the size's; in stage 0: none)"
    )
    add("--llada",
        help="weights of the backbone (likewise; with them, stage 0 goes on to its last part)")
    add("--diffa2", help="start from published adapters and LoRA, likewise, instead of --init")
    add("--random-weights", action="store_true", help="instead of downloads: to try a machine")
    add("--dry-run", action="store_true",
        help="build without memory, and print what the stages would take")
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
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="auto", choices=["auto", *DTYPES],
        help="of the frozen parts (auto: bfloat16 on CUDA)")
    add(
        "--recompute", choices=["nothing", "feed-forward", "blocks"], help=
        "of the backbone, in the backward pass: less memory, more time (default: blocks, for downloaded weights)"
    )
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
    args = parser.parse_args(argv)
    require(not (args.init and args.diffa2), "--init and --diffa2 exclude each other; choose one")
    started = os.environ.get("WORLD_SIZE", "1")
    require(started.isdecimal() and int(started),
            f"expected WORLD_SIZE, a number of processes, from torchrun, got {started!r}; unset it")
    started = int(started)
    require(
        args.processes in (None, started) or args.dry_run,
        f"--processes {args.processes}: got {started}; start them with: torchrun --nproc_per_node={args.processes} train.py"
    )
    args.processes = args.processes or started
    require(not args.shard or args.stage != "0",
            "--shard splits the backbone of stages 1 to 4; leave it out")
    require(not args.shard or args.processes > 1,
            "--shard splits among processes; start them with: torchrun --nproc_per_node=N")
    require(not (args.shard and args.compile),
            "--shard and --compile exclude each other; choose one")
    require(not args.shard or args.stage != "all" or args.dry_run,
            "--shard takes one stage at a time; name it: --stage 1")
    args.out = args.out or Path("runs") / args.size
    require(not args.dry_run or args.stage != "0",
            "--dry-run plans stages 1 to 4; leave out --stage 0")
    stages = SIZES[args.size][1]
    args.stages = list(stages) if args.stage == "all" else [int(args.stage)]
    require(args.stage == "0" or args.stages[0] in stages,
            f"--size {args.size} has stages {', '.join(map(str, stages))}")
    for number in args.stages if args.stage != "0" else ():
        stage_config(args, number)  # what cannot be is refused now
    return args


def stage_config(args: argparse.Namespace, number: int) -> StageConfig:
    """The stage's row of the table, with what the command line changes."""
    row = SIZES[args.size][1][number]
    names = ("lr", "warmup", "batch_size", "steps", "epochs", *DROPOUTS)
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in DROPOUTS.keys() & changes.keys():
        if row.preference or DROPOUTS[name] not in row.trains:
            flag, why = f"--{name.replace('_', '-')}", f"does not train the {DROPOUTS[name]} part"
            why = "compares with a reference that has none" if row.preference else why
            require(args.stage == "all" or not changes[name],
                    f"{flag}: stage {number} {why}; leave it out")
            del changes[name]
    if "epochs" in changes:
        changes.setdefault("steps", None)
    stage = dataclasses.replace(row, **changes)
    require(stage.batch_size >= args.processes,
            f"--batch-size {stage.batch_size}: expected an example for each of "
            f"{args.processes} processes; raise it")
    require(
        not args.shard or stage.batch_size % args.processes == 0,
        f"--batch-size must be a multiple of the number of processes with --shard, got {stage.batch_size} and {args.processes}"
    )
    share = math.ceil(stage.batch_size / args.processes)
    n_pieces = args.grad_accum or math.ceil(share / (stage.micro_batch or share))
    require(
        args.grad_accum is None or stage.batch_size % (n_pieces * args.processes) == 0,
        f"--batch-size must be a multiple of --grad-accum, for each process, got {stage.batch_size} and {n_pieces}"
    )
    return dataclasses.replace(stage, micro_batch=math.ceil(share / n_pieces))


def pretrain_config(args: argparse.Namespace) -> PretrainConfig:
    """Stage 0's settings, with what the command line changes in all of its phases."""
    changes = {"warmup": args.warmup}
    for name in ("encoder_steps", "recall_steps", "backbone_steps", "silence_steps"):
        changes[name] = args.steps
    for name in ("encoder_batch", "backbone_batch"):
        changes[name] = args.batch_size
    for name in ("encoder_lr", "backbone_lr", "silence_lr"):
        changes[name] = args.lr
    return PretrainConfig(**{name: value for name, value in changes.items() if value is not None})
