"""What a person looks at: the answer forming in the terminal, and the curves of a run."""

import json
from pathlib import Path

from .fast.generate import Step
from .faults import append, write
from .tokenizer import Tokenizer

CLEAR_LINE = "\r\x1b[2K"
DARKEST, BRIGHTEST = 238, 255  # greys of a 256-colour terminal


def shade(text: str, confidence: float) -> str:
    """Text in a grey that is the brighter the more confident it is."""
    grey = round(DARKEST + (BRIGHTEST - DARKEST) * confidence)
    return f"\x1b[38;5;{grey}m{text}\x1b[0m"


def response_line(step: Step, confidence: list[float], tokenizer: Tokenizer, row: int = 0) -> str:
    """One response as coloured text up to its end, if that is known: ░ for a mask, each token shaded by the confidence it
    was committed with."""
    pieces = []
    for token, c in zip(step.tokens[row].tolist(), confidence):
        if token in (tokenizer.eot_id, tokenizer.eos_id):
            break
        pieces.append("░" if token == tokenizer.mask_id else shade(tokenizer.spell([token]), c))
    return "".join(pieces)


def watch(steps, tokenizer: Tokenizer, write, pause: float):
    """Show each step of decoding one response on one terminal line, then hand it on. `pause` is in seconds."""
    import time

    confidence = None
    for number, step in enumerate(steps, start=1):
        confidence = confidence or [0.0] * step.tokens.shape[1]
        for i, committed in enumerate(step.committed[0].tolist()):
            if committed:
                confidence[i] = float(step.confidence[0, i])
        write(f"{CLEAR_LINE}{number:3} {response_line(step, confidence, tokenizer)}")
        time.sleep(pause)
        yield step
    write("\n")


def read_row(line: bytes) -> dict | None:
    """A line of log.jsonl as `Log` writes it, or None: others may have written there too."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no text, a number too long, or depth
        return None
    ours = isinstance(row, dict) and all(type(row.get(name)) is int for name in ("stage", "step"))
    return row if ours and max(abs(row["stage"]), abs(row["step"])) < 2**53 else None


def points(rows: list[dict], name: str) -> list[tuple[int, float]]:
    """Steps and values of a figure, where a row has it and it is a number that can be drawn."""
    return [(row["step"], float(row[name])) for row in rows
            if type(row.get(name)) in (int, float) and not abs(row[name]) > 1e300]


class Log:
    """A run's log.jsonl: a line of JSON for each step, and for each measurement. Of several processes one `writes` it."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes

    def add(self, **row) -> None:
        if self.writes:
            append(self.path, json.dumps(row) + "\n")

    def forget_after(self, stage: int, step: int) -> None:
        """Drop what was logged of a stage after a checkpoint: the resumed run will log it again. What came of later stages stays:
        they may be done, and this one have gone back to an earlier save."""
        *lines, half = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        lines += [half] if read_row(half) else []  # or what a killed run wrote half of
        rows = [(line + b"\n", read_row(line)) for line in lines]
        kept = [line for line, row in rows
                if not row or row["stage"] != stage or row["step"] <= step]
        write(self.path, lambda temporary: temporary.write_bytes(b"".join(kept)))


def draw_curves(log: Path, picture: Path) -> bool:
    """Draw the loss and the validation figures of a run's log.jsonl. False where there are none, or
    where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = log.read_bytes().split(b"\n") if log.exists() else []
    rows = [row for line in lines if (row := read_row(line))]
    stages = sorted({row["stage"] for row in rows})
    if not stages:
        return False
    figure, axes = pyplot.subplots(1, len(stages), figsize=(4 * len(stages), 3.2), squeeze=False, layout="constrained")
    for axis, stage in zip(axes[0], stages):
        of_stage = [row for row in rows if row["stage"] == stage]
        losses = points(of_stage, "loss")
        if losses:
            axis.plot(*zip(*losses), color="tab:blue", label="loss")
        right = axis.twinx()
        for name, colour in (("open", "tab:green"), ("lettered", "tab:olive"), ("wer", "tab:red")):
            measured = points(of_stage, name)
            if measured:
                right.plot(*zip(*measured), "o-", color=colour, label=name)
        right.set_ylim(0, 1)
        axis.set(title=f"stage {stage}", xlabel="step")
        figure.legend(*[a + b for a, b in zip(axis.get_legend_handles_labels(), right.get_legend_handles_labels())],
                      loc="outside lower center", ncols=4) if stage == stages[-1] else None
    write(picture, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    pyplot.close(figure)
    return True
