"""Reads numbers of hostile cases from its input, runs each, and prints a line of JSON for it: how
it ended, and how much memory it took. A case that computes for more seconds than the argument says
ends it with SIGXCPU. test_hostile.py starts it and watches it."""

import io
import json
import math
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from hostile_cases import case

from data import toy
from diffa2_mini.errors import UserError


def peak() -> int:
    """The most memory that this process has had since the peak was forgotten, in bytes."""
    return next(int(line.split()[1]) * 1024
                for line in open("/proc/self/status")
                if line.startswith("VmHWM"))


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()}


def run(number: int) -> dict:
    """Run a case; how it ended, `refused` or `read`, or else what is wrong."""
    root = Path(tempfile.mkdtemp())
    folder = root / "case"
    folder.mkdir()
    what, refused, read = case(number, folder)
    before = listing(folder)
    Path("/proc/self/clear_refs").write_text("5")
    start, wrong = peak(), ""
    try:
        read()
        ended = "read"
    except UserError as error:
        ended = "refused"
        if "\n" in str(error) or not str(error):
            wrong = f"expected one line, got {str(error)[:300]!r}"
    except Exception:
        ended, wrong = "broken", traceback.format_exc()[-1500:]
    if refused and ended == "read":
        wrong = "expected a UserError"
    after = listing(folder)
    left = [name for name in after if ".tmp" in name] + [
        name for name, body in before.items() if after.get(name) != body]
    memory = peak() - start
    shutil.rmtree(root)
    return {
        "number": number, "what": what, "ended": ended, "wrong": wrong or
        (f"left {left}" if left else ""), "memory": memory}


if __name__ == "__main__":
    torch.set_num_threads(1)
    toy.make_world = lambda folder: folder  # what is not made here is missing
    limit = 4 * 2**30 + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # so that this machine survives what goes wrong
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    answers, sys.stdout = sys.stdout, io.StringIO()
    for i, line in enumerate(sys.stdin):
        if i > 1:  # the first two make what is made once
            most = math.ceil(time.process_time()) + int(sys.argv[1])
            resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        print(json.dumps(run(int(line))), file=answers, flush=True)
