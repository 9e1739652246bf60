"""The loss and the validation figures of a run, as a picture."""

from pathlib import Path

from ..training.files import write_whole
from ..training.log import read_row


def points(rows: list[dict], name: str) -> list[tuple[int, float]]:
    """Steps and values of a figure, where a row has it and it is a number that can be drawn."""
    return [(row["step"], float(row[name])) for row in rows
            if type(row.get(name)) in (int, float) and not abs(row[name]) > 1e300]


def draw_stage(axis, rows: list[dict]) -> list[list]:
    """The loss of one stage on the left axis, and what was measured on the right one. Returns
    handles and labels for a legend."""
    losses = points(rows, "loss")
    if losses:
        axis.plot(*zip(*losses), color="tab:blue", label="loss")
    right = axis.twinx()
    for name, colour in (("open", "tab:green"), ("lettered", "tab:olive"), ("wer", "tab:red")):
        measured = points(rows, name)
        if measured:
            right.plot(*zip(*measured), "o-", color=colour, label=name)
    right.set_ylim(0, 1)
    axis.set(title=f"stage {rows[0]['stage']}", xlabel="step")
    return [a + b for a, b in zip(axis.get_legend_handles_labels(),
                                  right.get_legend_handles_labels())]


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
    figure, axes = pyplot.subplots(1, len(stages), figsize=(4 * len(stages), 3.2), squeeze=False,
                                   layout="constrained")
    for axis, stage in zip(axes[0], stages):
        legend = draw_stage(axis, [row for row in rows if row["stage"] == stage])
    figure.legend(*legend, loc="outside lower center", ncols=4)  # of the last stage
    write_whole(picture, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    pyplot.close(figure)
    return True
