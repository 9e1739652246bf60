"""What all measurements share: a row of figures, variants in turn, the machine."""

import platform
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..fast.measure import now


@dataclass
class Row:
    """One variant of a case. `ratio` is how many times as fast as the first variant it is, or what
    `of` says; `target` is what it should be."""

    case: str
    variant: str
    seconds: list[float] = field(default_factory=list)
    ratio: float | None = None
    of: str = "times as fast"
    target: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def __str__(self) -> str:
        text = f"{self.case}, {self.variant}"
        if self.seconds:
            text += f": {self.median:.4g} s ({min(self.seconds):.4g} to {max(self.seconds):.4g})"
        if self.ratio is not None:
            text += f": {self.ratio:.4g} {self.of}"
        return text + (f" (target: {self.target})" if self.target else "")


def take_turns(case: str, variants: dict[str, Callable], runs: int, device: torch.device,
               targets: dict[str, str] | None = None) -> tuple[list[Row], list]:
    """Time the variants in turn, so that a change of the machine's speed meets all of them. A first
    run of each does not count. Returns a row for each, and what each returned last."""
    rows = [Row(case, name, target=(targets or {}).get(name, "")) for name in variants]
    for run in range(runs + 1):
        results = []
        for row, variant in zip(rows, variants.values()):
            start = now(device)
            results.append(variant())
            row.seconds += [now(device) - start] if run > 0 else []
    for row in rows:
        row.ratio = rows[0].median / row.median
    return rows, results


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What the figures depend on. Only Linux tells the model of a CPU."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    elif (cpuinfo := Path("/proc/cpuinfo")).exists():
        told = re.findall(r"^(cpu family|model|model name)\s*: (.*)", cpuinfo.read_text(), re.M)
        name = " ".join(map(" ".join, told[:3])) or name
    return {"device": name, "dtype": str(dtype), "threads": str(torch.get_num_threads()),
            "system": platform.system(), "torch": torch.__version__}
