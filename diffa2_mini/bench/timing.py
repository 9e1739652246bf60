"""What every case shares: timing of variants in turn, decoding, the machine, and the table."""

import os
import platform
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..command.table import columns
from ..config import DecodeConfig
from ..fast.generate import generate
from ..fast.measure import now
from ..fast.state import DecodingState
from ..model import Diffa2Model
from ..tokenizer import Prompt

PROMPT = Prompt([7] * 60, audio_at=20)  # any 60 tokens, with the audio behind the first 20
MASK_ID, EOS_ID = 5, -1  # no token is EOS: answers have all their tokens


@dataclass
class Row:
    """One variant of a case. `ratio` is how many times faster it is than the first variant, or what
    `of` says. `target` is what the ratio should be."""

    case: str
    variant: str
    seconds: list[float] = field(default_factory=list)
    ratio: float | None = None
    of: str = "times as fast"
    target: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def take_turns(case: str, variants: dict[str, Callable], runs: int,
               device: torch.device) -> list[Row]:
    """Time the variants in turn, so that a change of the machine's speed meets all of them. A first
    run of each does not count."""
    rows = [Row(case, name) for name in variants]
    for run in range(runs + 1):
        for row, variant in zip(rows, variants.values()):
            start = now(device)
            variant()
            if run > 0:
                row.seconds.append(now(device) - start)
    for row in rows:
        row.ratio = rows[0].median / row.median
    return rows


def decode(model: Diffa2Model, clips: list[Tensor], config: DecodeConfig,
           state: type[DecodingState] = DecodingState) -> list[float]:
    """Answer a prompt about each of the clips [A, D], as a batch; returns the time at the end of
    each step."""
    n = len(clips)
    batch = state(model, clips, [PROMPT] * n, [config.gen_length] * n, MASK_ID)
    return [now(clips[0].device) for _ in generate(batch, config, EOS_ID)]


def processor() -> str:
    """The CPU's model where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    about = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    if "model name" not in about:
        return platform.machine()
    return "{model name} (family {cpu family}, model {model})".format_map(about)


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What the figures depend on."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "dtype": str(dtype), "threads": str(torch.get_num_threads()), "cores": str(os.cpu_count()),
        "system": platform.system(), "python": platform.python_version(),
        "torch": torch.__version__, "numpy": np.__version__}


def table(rows: list[Row]) -> str:
    """The rows as text, a column for each figure."""
    cells = [("case", "variant", "median s", "fastest", "slowest", "", "", "target")]
    for row in rows:
        figures = [row.median, min(row.seconds, default=None), max(row.seconds, default=None),
                   row.ratio]
        texts = ["" if each is None else f"{each:.4g}" for each in figures]
        cells.append((row.case, row.variant, *texts, row.of, row.target))
    return columns(cells)
