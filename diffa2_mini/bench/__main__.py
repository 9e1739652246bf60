"""How fast it is, measured: each case beside what it is to be compared with, on the same random
weights.

    python -m diffa2_mini.bench                                # the cases for a CPU
    python -m diffa2_mini.bench --toy                          # the caches (after data/toy.py)
    python -m diffa2_mini.bench --size full --random-weights   # at full size, for a GPU

The confidences of random weights mean nothing, so that decoding follows a fixed schedule. A figure
is the median over `--runs`, in which the variants take turns; beside it stand the fastest and the
slowest run.
"""

from ..command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import argparse
import json
import sys
from pathlib import Path

import torch

from ..command.script import Parser
from ..config import DATA, SIZES
from ..errors import require
from ..fast.device import DTYPES, choose_device
from ..training.files import write_whole
from .cases import CASES
from .timing import machine, table
from .toy_caches import toy
from .whole_size import whole_size


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--toy", action="store_true", help="measure the caches on the toy's questions")
    add("--data", type=Path, default=DATA / "toy",
        help="of --toy: the toy world (default: data/toy in a clone)")
    add("--size", choices=list(SIZES), help="measure training and decoding of a whole size")
    add("--random-weights", action="store_true", help="with --size: instead of downloads")
    add("--compile", action="store_true", help="with --size: have torch.compile fuse operations")
    add("--only", action="append", choices=list(CASES),
        help="of the cases for a CPU; may be given again")
    add("--runs", type=int, default=5)
    add("--out", type=Path, help="a file for the same as JSON "
        "(default: runs/bench.json, bench_toy.json or bench_SIZE.json)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="auto", choices=["auto", *DTYPES])
    add("--threads", type=int, help="CPU threads (default: one per core)")
    args = parser.parse_args(argv)
    require(not (args.toy and args.size), "--toy and --size exclude each other; choose one")
    what = "toy" if args.toy else args.size
    args.out = args.out or Path("runs", f"bench_{what}.json" if what else "bench.json")
    return args


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    large = bool(args.size) and not SIZES[args.size][0].from_scratch
    device, dtype, _ = choose_device(args.device, args.dtype, large)
    about = machine(device, dtype)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    torch.manual_seed(0)
    if args.size:
        rows = whole_size(args.size, args.runs, device, dtype, args.compile, args.random_weights)
    elif args.toy:
        rows = toy(args.data, args.runs, device)
    else:
        chosen = [case for name, case in CASES.items() if name in (args.only or CASES)]
        rows = [row for case in chosen for row in case(args.runs, device)]
    found = [vars(row) | {"median": row.median} for row in rows]
    text = json.dumps({"arguments": argv, "machine": about, "rows": found}, indent=2) + "\n"
    write_whole(args.out, lambda path: path.write_text(text))
    print(table(rows))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
