"""What a run writes down: log.jsonl, and which clips gave a loss that is not finite."""

import json
import math
from pathlib import Path

from ..errors import require
from .files import append, write_whole


def finite(row: dict) -> bool:
    """Are the loss and the norm of its gradient numbers that a step can be made with?"""
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def read_row(line: bytes) -> dict | None:
    """A line of log.jsonl as `Log` writes it, or None: others may have written there too."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no text, a number too long, or depth
        return None
    ours = isinstance(row, dict) and all(type(row.get(name)) is int for name in ("stage", "step"))
    return row if ours and max(abs(row["stage"]), abs(row["step"])) < 2**53 else None


class Log:
    """A run's log.jsonl: a line of JSON for each step and measurement. One process `writes` it."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes

    def add(self, **row) -> None:
        if self.writes:
            append(self.path, json.dumps(row) + "\n")

    def note_nonfinite(self, row: dict, clips: list[str], skip: bool) -> None:
        """Write the clips of a step whose loss or gradient is not finite to nonfinite.jsonl. `row`
        is the log's, before it has it. Raises UserError unless `skip`."""
        path, loss, norm = self.path.with_name("nonfinite.jsonl"), row["loss"], row["grad_norm"]
        Log(path, self.writes).add(stage=row["stage"], step=row["step"], loss=str(loss),
                                   grad_norm=str(norm), clips=clips)
        require(skip, f"stage {row['stage']}, step {row['step']}: expected a finite loss and "
                f"gradient, got {loss} and {norm}; {path} names the clips. Begin again with a "
                "lower --lr, or go on without such steps: --resume --skip-nonfinite")

    def forget_after(self, stage: int, step: int) -> None:
        """Drop a stage's entries after a checkpoint: the resumed run logs these steps again. Those
        of later stages stay, which may be done although this one goes back to an earlier save."""
        *lines, half = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        lines += [half] if read_row(half) else []  # or what a killed run wrote half of
        kept = [line + b"\n" for line in lines if not (row := read_row(line))
                or row["stage"] != stage or row["step"] <= step]
        write_whole(self.path, lambda temporary: temporary.write_bytes(b"".join(kept)))
