"""How fast it is: each case beside what it is compared with, on the same random weights.

    python -m diffa2_mini.bench                                # the cases for a CPU
    python -m diffa2_mini.bench --toy                          # the caches (after data/toy.py)
    python -m diffa2_mini.bench --size full --random-weights   # at full size, for a GPU

Random weights are never confident, so decoding follows a fixed schedule. A figure is the median
over `--runs`, in which the variants take turns, with the fastest and the slowest run behind it. It
is printed and written as soon as it is there.
"""

from ..command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import argparse
import json
import sys
from itertools import chain
from pathlib import Path

import torch

from ..command.script import Parser
from ..config import DATA, SIZES
from ..fast.device import DTYPES, choose_device
from ..training.files import write_whole
from .cases import CASES, toy
from .timing import machine
from .whole_size import whole_size


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add, choose = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    choose("--toy", action="store_true", help="measure the caches on the toy's questions")
    choose("--size", choices=list(SIZES), help="measure training and decoding of a whole size")
    add("--data", type=Path, default=DATA / "toy", help="of --toy: the toy world")
    add("--random-weights", action="store_true", help="with --size: instead of downloads")
    add("--compile", action="store_true", help="with --size: have torch.compile fuse operations")
    add("--only", action="append", choices=list(CASES), help="of the cases for a CPU; repeatable")
    add("--runs", type=int, default=5)
    add("--out", type=Path, help="the same as JSON (default: runs/bench.json, bench_toy.json or "
        "bench_SIZE.json)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="auto", choices=["auto", *DTYPES])
    add("--threads", type=int, help="CPU threads (default: one per core)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    large = bool(args.size) and not SIZES[args.size][0].from_scratch
    device, dtype, _ = choose_device(args.device, args.dtype, large)
    torch.manual_seed(0)
    if args.size:
        name, rows = f"bench_{args.size}", whole_size(
            args.size, args.runs, device, dtype, args.compile, args.random_weights)
    elif args.toy:
        name, rows = "bench_toy", toy(args.data, args.runs, device)
    else:
        asked = [CASES[case] for case in CASES if case in (args.only or CASES)]
        name, rows = "bench", chain.from_iterable(case(args.runs, device) for case in asked)
    out = args.out or Path("runs", f"{name}.json")
    found = {"arguments": argv, "machine": machine(device, dtype), "rows": []}
    print(", ".join(f"{what} {value}" for what, value in found["machine"].items()))
    for row in rows:
        print(row)
        found["rows"].append(vars(row) | {"median": row.median})
        write_whole(out, lambda path: path.write_text(json.dumps(found, indent=2) + "\n"))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
