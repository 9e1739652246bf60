"""The flags of train.py, and what they change in the table of stages."""

import argparse
import dataclasses
import math
import os
from pathlib import Path

from ..command.script import Parser
from ..config import MASKINGS, SIZES, StageConfig
from ..errors import require
from ..fast.device import DTYPES

FLAGS = {
    # which stages, on which data, into which folder
    "--stage": dict(default="all", choices=["0", "1", "2", "3", "4", "all"]),
    "--size": dict(default="toy", choices=list(SIZES)),
    "--data": dict(type=Path, help="a manifest, or a folder of them (default: the toy world)"),
    "--validation": dict(type=Path, help="to measure on (default: validation.json beside --data)"),
    "--test": dict(type=Path, nargs="+", default=[], metavar="MANIFEST", help="to measure on last"),
    "--parts": dict(default="both", choices=["whisper", "llada", "both"], help="for stage 0"),
    "--skip-broken": dict(action="store_true", help="leave out what is broken, and name it"),
    "--skip-nonfinite": dict(action="store_true", help="leave out steps without a finite loss"),
    "--out": dict(type=Path, help="where checkpoints and logs go (default: runs/SIZE)"),
    # what training starts from
    "--init": dict(type=Path, metavar="CHECKPOINT", help="default: the stage before, in --out"),
    "--other-parts": dict(action="store_true", help="--init may be of other frozen parts"),
    "--resume": dict(action="store_true", help="go on where the run in --out was stopped"),
    "--whisper": dict(help="weights of the encoder: a file, a folder or a hub name"),
    "--llada": dict(help="of the backbone, likewise; with them, stage 0 goes on to its last part"),
    "--diffa2": dict(help="published adapters and LoRA, likewise, instead of --init"),
    "--random-weights": dict(action="store_true", help="instead of downloads: to try a machine"),
    "--dry-run": dict(action="store_true", help="print what the stages would take"),
    # how the stages are trained, measured and saved
    "--steps": dict(type=int, help="steps of each stage"),
    "--epochs": dict(type=int, help="instead of --steps: passes over the data"),
    "--batch-size": dict(type=int, help="examples per step"),
    "--grad-accum": dict(type=int, help="pieces of a process's part of a batch, to save memory"),
    "--lr": dict(type=float, help="peak learning rate"),
    "--masking": dict(choices=MASKINGS, help="of the answers (default: the size's)"),
    "--warmup": dict(type=int, help="steps"),
    "--lora-dropout": dict(type=float, help="of LoRA's inputs in stage 3, from 0 to 0.99"),
    "--adapter-dropout": dict(type=float, help="of the acoustic adapter in stages 2 and 3"),
    "--eval-every": dict(type=int, default=0, help="steps; asks an eighth of all questions"),
    "--save-every": dict(type=int, default=100, help="steps between checkpoints"),
    "--sample-every": dict(type=int, default=200, help="steps between decoded samples"),
    # on which machine, and how its memory and time are used
    "--device": dict(default="auto", choices=["auto", "cpu", "cuda", "mps"]),
    "--dtype": dict(default="auto", choices=["auto", *DTYPES],
                    help="of the frozen parts (auto: bfloat16 on CUDA and for diffa1 and full)"),
    "--quantize": dict(choices=["int8", "nf4"], help="keep their linear layers in less memory"),
    "--recompute": dict(choices=["nothing", "feed-forward", "blocks"],
                        help="to save memory (default: blocks for diffa1 and full)"),
    "--threads": dict(type=int, help="CPU threads (default: one per core)"),
    "--seed": dict(type=int, default=42),
    "--workers": dict(type=int, help="processes that load audio (default: 0 to 8, as needed)"),
    "--no-cache-audio": dict(action="store_true", help="encode clips of toy or small anew"),
    "--cache-audio": dict(type=Path, metavar="DIR", help="keep encoded clips on disk"),
    "--compile": dict(action="store_true", help="fuse operations: slow to start, then faster"),
    "--shard": dict(action="store_true", help="split the backbone among the processes"),
    "--processes": dict(type=int, help="of --dry-run: as if torchrun started so many")}
DROPOUTS = {"lora_dropout": "lora", "adapter_dropout": "acoustic"}  # the part each belongs to


def parse_arguments(argv: list[str], description: str) -> argparse.Namespace:
    """The flags of train.py, with the numbers of the `stages` to train and of all `processes`.
    Raises UserError where they contradict each other."""
    parser = Parser(description)
    for flag, settings in FLAGS.items():
        parser.add_argument(flag, **settings)
    args = parser.parse_args(argv)
    config, stages = SIZES[args.size]
    started = os.environ.get("WORLD_SIZE", "1")
    require(started.isdecimal() and int(started),
            f"expected WORLD_SIZE, a number of processes, from torchrun, got {started!r}; unset it")
    require(args.processes in (None, int(started)) or args.dry_run,
            "--processes is of --dry-run; start them with: torchrun --nproc_per_node=N train.py")
    args.processes = args.processes or int(started)
    args.out = args.out or Path("runs") / args.size
    args.recompute = args.recompute or ("nothing" if config.from_scratch else "blocks")
    numbers = {"all": list(stages), "0": []}
    args.stages = numbers[args.stage] if args.stage in numbers else [int(args.stage)]
    for one, other in (("init", "diffa2"), ("steps", "epochs"), ("shard", "compile")):
        require(not (getattr(args, one) and getattr(args, other)),
                f"--{one} and --{other} exclude each other; choose one")
    require(args.parts == "both" or args.stage == "0", "--parts is of --stage 0; leave it out")
    names = ("whisper", "llada", "diffa2", "validation", "test", "eval_every")
    in_vain = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    require(not (args.random_weights and in_vain), "--random-weights reads no others and measures "
            f"nothing; leave out {', '.join(in_vain)}")
    require(not args.shard or args.processes > 1 and (len(args.stages) == 1 or args.dry_run),
            "--shard splits a stage over processes: torchrun --nproc_per_node=N train.py --stage 1")
    require(not args.quantize or args.stages and not (args.shard or args.compile),
            "--quantize is of stages 1 to 4, without --shard and --compile; leave it out")
    require(not args.dry_run or args.stages, "--dry-run plans stages 1 to 4; leave out --stage 0")
    require(set(args.stages) <= set(stages),
            f"--size {args.size} has stages {', '.join(map(str, stages))}")
    for number in args.stages:
        stage_config(args, number)  # which refuses what cannot be
    return args


def stage_config(args: argparse.Namespace, number: int) -> StageConfig:
    """The stage's row of the table, with what the command line changes. Raises UserError."""
    row = SIZES[args.size][1][number]
    names = ("lr", "masking", "warmup", "batch_size", "steps", "epochs", *DROPOUTS)
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, part in DROPOUTS.items():
        if name in changes and (row.preference or part not in row.trains):
            value = changes.pop(name)
            require(args.stage == "all" or not value,
                    f"--{name.replace('_', '-')}: stage {number} has no such dropout; leave it out")
    if row.preference and args.masking == "all-masked":
        changes["vrpo_samples"] = 1  # all would be the same
    elif row.preference and args.masking not in (None, "published"):
        del changes["masking"]
        require(args.stage == "all",
                f"--masking {args.masking}: stage {number} has published or all-masked samples")
    if "epochs" in changes:
        changes.setdefault("steps", None)
    stage = dataclasses.replace(row, **changes)
    return dataclasses.replace(stage, micro_batch=micro_batch(args, stage))


def micro_batch(args: argparse.Namespace, stage: StageConfig) -> int:
    """How many examples a process computes at once. Raises UserError if no batch divides so."""
    size, n, n_pieces = stage.batch_size, args.processes, args.grad_accum
    require(size >= n, f"--batch-size {size}: expected one for each of {n} processes; raise it")
    for flag, divisor in {"--shard": n * args.shard, "--grad-accum": n * (n_pieces or 0)}.items():
        require(not divisor or size % divisor == 0, f"--batch-size: expected a multiple of "
                f"{divisor}, for {n} processes and {flag}, got {size}")
    per_process = math.ceil(size / n)
    n_pieces = n_pieces or math.ceil(per_process / (stage.micro_batch or per_process))
    return math.ceil(per_process / n_pieces)
