"""What every case of the benchmark shares: timing of variants in turn, the prompt, the machine, and
the table."""

import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..command.table import columns
from ..fast.measure import now
from ..tokenizer import Prompt

PROMPT = Prompt([7] * 60, audio_at=20)  # any 60 tokens, with the audio behind the first 20
MASK_ID, EOS_ID = 5, -1  # no token is EOS: answers have all their tokens


@dataclass
class Row:
    """One variant of a case. `ratio` is how many times faster it is than the variant that it is
    compared with, or, where `of` says so, something else. `target` is what the ratio should be."""

    case: str
    variant: str
    seconds: list[float] = field(default_factory=list)
    ratio: float | None = None
    of: str = "times as fast"
    target: str = ""
    more: dict = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(case: str, variants: dict[str, Callable], runs: int,
               device: torch.device) -> list[Row]:
    """Time the variants in turn, so that a change of the machine's speed meets all of them; a first
    run of each does not count. The others are compared with the first variant."""
    rows = [Row(case, name) for name in variants]
    for run in range(runs + 1):
        for row, variant in zip(rows, variants.values()):
            start = now(device)
            variant()
            seconds = now(device) - start
            if run > 0:
                row.seconds.append(seconds)
    for row in rows:
        row.ratio = rows[0].median / row.median
    return rows


def cpu_name() -> str:
    """The processor's model where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.machine()
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    about = {name.strip(): value.strip()
             for name, value in (line.split(":", 1) for line in lines)}
    if "model name" not in about:
        return platform.machine()
    return f"{about['model name']} (family {about['cpu family']}, model {about['model']})"


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What the figures depend on."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "dtype": str(dtype),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def table(rows: list[Row]) -> str:
    """The rows as text, a column for each figure."""
    cells = [("case", "variant", "median s", "fastest", "slowest", "", "", "target")]
    for row in rows:
        times = ["", "", ""]
        if row.seconds:
            times = [f"{t:.4g}" for t in (row.median, min(row.seconds), max(row.seconds))]
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        cells.append((row.case, row.variant, *times, ratio, row.of, row.target))
    return columns(cells)
