"""The loss and the validation figures of a run, as a picture."""

from pathlib import Path

from ..training.files import write_whole
from ..training.folder import read_row

COLOURS = {"loss": "tab:blue", "open": "tab:green", "lettered": "tab:olive", "wer": "tab:red"}


def draw_curves(log: Path, picture: Path) -> bool:
    """Draw a run's log.jsonl: of each stage the loss on the left axis, and on the right one what
    was measured. False where there is nothing, or no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = log.read_bytes().split(b"\n") if log.exists() else []
    rows = [row for line in lines if (row := read_row(line))]
    stages = sorted({row["stage"] for row in rows})
    if not stages:
        return False
    figure, legend = Figure(figsize=(4 * len(stages), 3.2), layout="constrained"), {}
    for left, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages):
        left.set(title=f"stage {stage}", xlabel="step")
        right = left.twinx()
        right.set_ylim(0, 1)
        for name, colour in COLOURS.items():
            drawn = [(row["step"], float(row[name])) for row in rows if row["stage"] == stage
                     and type(row.get(name)) in (int, float) and not abs(row[name]) > 1e300]
            axis, line = (left, "-") if name == "loss" else (right, "o-")
            if drawn:
                (legend[name],) = axis.plot(*zip(*drawn), line, color=colour)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4)
    write_whole(picture, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    return True
