"""What a person looks at: the answer forming in the terminal, and the curves of a run."""

import json
from contextlib import suppress
from pathlib import Path

from .decode import Step
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
        kept = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else []:
            with suppress(json.JSONDecodeError):  # a line that a killed run wrote half of
                row = json.loads(line)
                kept += [line] if row["stage"] != stage or row["step"] <= step else []
        write(self.path, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))


def draw_curves(log: Path, picture: Path) -> bool:
    """Draw the loss and the validation figures of a run's log.jsonl. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    stages = sorted({row["stage"] for row in rows})
    figure, axes = pyplot.subplots(1, len(stages), figsize=(4 * len(stages), 3.2), squeeze=False, layout="constrained")
    for axis, stage in zip(axes[0], stages):
        of_stage = [row for row in rows if row["stage"] == stage]
        losses = [(row["step"], row["loss"]) for row in of_stage if "loss" in row]
        if losses:
            axis.plot(*zip(*losses), color="tab:blue", label="loss")
        right = axis.twinx()
        for name, colour in (("open", "tab:green"), ("lettered", "tab:olive"), ("wer", "tab:red")):
            points = [(row["step"], row[name]) for row in of_stage if name in row]
            if points:
                right.plot(*zip(*points), "o-", color=colour, label=name)
        right.set_ylim(0, 1)
        axis.set(title=f"stage {stage}", xlabel="step")
        figure.legend(*[a + b for a, b in zip(axis.get_legend_handles_labels(), right.get_legend_handles_labels())],
                      loc="outside lower center", ncols=4) if stage == stages[-1] else None
    write(picture, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    pyplot.close(figure)
    return True
