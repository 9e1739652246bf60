"""train.py in miniature, as several tests run it: a small world, four steps of each stage, and what
they leave."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import train
from diffa2_mini.command.script import run_script
from diffa2_mini.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
# the project's own: of what is downloaded or installed beside them, some is in Python too
FILES = [*ROOT.glob("*.py"), *(path for name in ("diffa2_mini", "data", "tests", "tutorials")
                               for path in (ROOT / name).rglob("*.py"))]
SECONDS = 600  # what takes longer hangs, on a slow and busy machine too
MINI = [
    "--steps", "4", "--batch-size", "3", "--warmup", "1", "--save-every", "2", "--threads", "1",
    "--sample-every", "3"]
# the only figures that may differ between two equal runs
CLOCK = ("time", "examples_per_second", "tokens_per_second", "mfu", "data_wait")


def command(world, out, *extra):
    return [sys.executable, str(ROOT / "train.py"), "--data", str(world), "--out", str(out), *MINI,
            *extra]


def started_by(method: str, folder: Path) -> dict[str, str]:
    """An environment in which Python's own default is to start processes by `method`."""
    (folder / "sitecustomize.py").write_text(
        f"import multiprocessing\nmultiprocessing.set_start_method({method!r})\n")
    return os.environ | {"PYTHONPATH": str(folder)}


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, as on a disk that is full."""
    import resource  # Windows has none

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def train_here(world, out, *extra):
    """In this process, which has imported torch already."""
    train.main(command(world, out, *extra)[2:])


def prepare(script, source, out, *extra):
    """Run a script that prepares recordings, given its main, on a copy or, where `source` is None,
    on what it downloads: the folder, its manifests by name."""
    copy = ["--source", str(source)] if source else []
    assert run_script(script, [*copy, "--out", str(out), *extra]) == 0
    return out, {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def refused(script, capsys, *arguments) -> str:
    """The only line that a script, given its main, prints as it ends with an error."""
    assert run_script(script, [str(each) for each in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    return printed


def logged(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def same(out, other, stages=(1, 2, 3, 4)):
    """Do two runs have the same weights, bit by bit, and the same log?"""
    for number in stages:
        name = f"stage{number}.safetensors"
        a, b = (load_checkpoint(folder / name) for folder in (out, other))
        assert a.done and b.done and a.model.keys() == b.model.keys()
        assert all(torch.equal(a.model[name], b.model[name]) for name in a.model)
    rows, others = ([row for row in logged(folder) if row["stage"] in stages]
                    for folder in (out, other))
    return rows == others
