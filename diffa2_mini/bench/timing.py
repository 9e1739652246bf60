"""What all measurements share: a row of figures, the machine, the report, and decoding."""

import json
import platform
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..config import DecodeConfig
from ..fast.generate import generate
from ..fast.measure import now
from ..fast.state import DecodingState
from ..model import Diffa2Model
from ..tokenizer import Prompt
from ..training.files import write_whole

PROMPT = Prompt([7] * 60, audio_at=20)  # any 60 tokens, with the audio behind the first 20
MASK_ID, EOS_ID = 5, -1  # no token is EOS: answers have all their tokens


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


def report(rows: Iterable[Row], out: Path, argv: list[str], device: torch.device,
           dtype: torch.dtype) -> None:
    """Print each row as soon as it is there, and write all to `out` as JSON."""
    found = {"arguments": argv, "machine": machine(device, dtype), "rows": []}
    print(", ".join(f"{what} {value}" for what, value in found["machine"].items()))
    for row in rows:
        print(row)
        found["rows"].append(vars(row) | {"median": row.median})
        write_whole(out, lambda path: path.write_text(json.dumps(found, indent=2) + "\n"))


def decode(model: Diffa2Model, clips: list[Tensor], config: DecodeConfig,
           state: type[DecodingState] = DecodingState) -> list[float]:
    """Answer about the clips [A, D], as a batch; returns the seconds between the ends of steps. A
    CUDA device notes them itself, and no step waits for that."""
    n, device = len(clips), clips[0].device
    batch = state(model, clips, [PROMPT] * n, [config.gen_length] * n, MASK_ID)
    ends = [torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
            if device.type == "cuda" else now(device) for _ in generate(batch, config, EOS_ID)]
    now(device)  # waits for the last one
    return [end.elapsed_time(after) / 1000 if device.type == "cuda" else after - end
            for end, after in pairwise(ends)]
