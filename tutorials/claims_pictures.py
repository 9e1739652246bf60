"""A picture of each experiment of claims.py, drawn from its cells."""

import math
from pathlib import Path

import numpy as np

from tutorials.claims_table import arrange, mean_and_spread

GREY, COLOURS = "#7a7a7a", ("#3b82c4", "#d9822b", "#4a9c5d")  # to be read on white and on black


def points(settings: dict, names: list[str], figure: str) -> tuple[list[float], list[float]]:
    """Means and spreads of a figure in some settings."""
    pairs = [mean_and_spread([cell[figure] for cell in settings[name].values()]) for name in names]
    return [mean for mean, _ in pairs], [
        0.0 if math.isnan(spread) else spread for _, spread in pairs]


def draw_types(axes, settings: dict) -> None:
    """Accuracy by type of question, a bar for each setting."""
    types = list(next(iter(next(iter(settings.values())).values()))["types"])
    for i, (name, by_seed) in enumerate(settings.items()):
        heights = [np.mean([cell["types"][type] for cell in by_seed.values()]) for type in types]
        axes.barh(
            np.arange(len(types)) - 0.27 * (i - 1), heights, 0.25, label=name, color=COLOURS[i])
    axes.set_yticks(range(len(types)), types, fontsize=8)
    axes.set_xlabel("accuracy")


def draw_bars(axes, settings: dict, figure: str = "overall", label: str = "accuracy") -> None:
    """A figure in each setting; autoregressive ones have the second colour."""
    means, spreads = points(settings, list(settings), figure)
    colours = [COLOURS[name.startswith("autoregressive")] for name in settings]
    axes.barh(list(settings), means, xerr=spreads, color=colours, ecolor=GREY)
    axes.invert_yaxis()
    axes.set_xlabel(label)


def draw_factor(axes, settings: dict) -> None:
    """Accuracy against forward passes."""
    by_factor = [name for name in settings if name.startswith("f =")]
    fixed = [name for name in settings if name.endswith("steps")]
    for colour, label, names in zip(COLOURS, ("factor", "fixed schedule"), (by_factor, fixed)):
        x, _ = points(settings, names, "forward_passes")
        y, spreads = points(settings, names, "overall")
        axes.errorbar(x, y, spreads, label=label, color=colour, marker="o")
    axes.set(xscale="log", xlabel="forward passes per answer", ylabel="accuracy")


def draw_vrpo(axes, settings: dict) -> None:
    """Variance of the score against the number of samples."""
    lines = {"times, shared masks": "{} x 1, shared",
             "times, independent masks": "{} x 1, independent",
             "masks of one time, shared": "1 x {}, shared"}
    for colour, (label, setting) in zip(COLOURS, lines.items()):
        n = [n for n in (1, 2, 4, 8) if setting.format(n) in settings]
        means, spreads = points(settings, [setting.format(i) for i in n], "variance")
        axes.errorbar(n, means, spreads, label=label, color=colour, marker="o")
    axes.set(xscale="log", yscale="log", xlabel="samples", ylabel="variance of the score")


def draw_autoregressive(axes, settings: dict) -> None:
    """Accuracy against passes over the data, for each number of clips, on one question in four."""
    for colour, kind in zip(COLOURS, ("diffusion", "autoregressive")):
        for style, size in zip((":", "--", "-"), ("few clips", "more clips", "all clips")):
            by_seed = settings.get(f"{kind}, {size}", {}).values()
            if by_seed:
                x, y = np.mean([cell["on_the_way"] for cell in by_seed], axis=0).T
                clips = next(iter(by_seed))["clips"]
                axes.plot(x, y, style, label=f"{kind}, {clips:,} clips", color=colour, marker="o")
    axes.set(xscale="log", xlabel="passes over the data", ylabel="accuracy")


def draw_learning(axes, settings: dict) -> None:
    """On two axes: accuracy on the way of the diffusion model and its twin, the surprise; and where
    each setting ends, with its targets a step, as what explains it."""
    for colour, name in zip(COLOURS, ("diffusion, as published", "autoregressive")):
        if name in settings:
            x, y = np.mean([cell["on_the_way"] for cell in settings[name].values()], axis=0).T
            axes[0].plot(x, y, label=name, color=colour, marker="o")
    axes[0].set(xlabel="passes over the data", ylabel="accuracy", ylim=(0, 1))
    draw_bars(axes[1], settings)
    axes[1].set_xlim(0, 1.35)
    for row, name in enumerate(settings):
        by_seed = settings[name].values()
        if all("answer_targets" in cell for cell in by_seed):
            n = np.mean([cell["answer_targets"] for cell in by_seed])
            axes[1].text(1.02, row, f"{n:.0f} targets", color=GREY, va="center", fontsize=8)


def draw_again(axes, settings: dict) -> None:
    """On two axes: accuracy against passes over the data, each a training of its own; and the loss
    of answers that are trained on and of others, on the way through the most passes of few."""
    for colour, kind in zip(COLOURS, ("diffusion", "autoregressive")):
        for style, size in zip(("-", "--"), ("few", "more")):
            names = [name for name in settings if name.startswith(f"{kind}, {size} x")]
            if names:
                clips = next(iter(settings[names[0]].values()))["clips"]
                means, spreads = points(settings, names, "overall")
                axes[0].errorbar([int(name.split()[-1]) for name in names], means, spreads,
                                 linestyle=style, label=f"{kind}, {clips:,} clips", color=colour,
                                 marker="o")
        curves = [cell["curve"] for cell in settings.get(f"{kind}, few x 64", {}).values()]
        for style, name in (("-", "held_out"), (":", "trained_on")) if curves else ():
            losses = np.mean([[point[f"nats_{name}"] for point in curve] for curve in curves], 0)
            axes[1].plot([point["passes"] for point in curves[0]], losses, style, marker="o",
                         label=f"{kind}, {name.replace('_', ' ')}", color=colour)
    axes[0].set(xscale="log", xlabel="passes over the data", ylabel="accuracy")
    axes[1].set(xscale="log", xlabel="passes over the data", ylabel="loss of an answer, nats")


def draw_cost(axes, settings: dict) -> None:
    """On two axes: forward passes, and seconds an answer."""
    draw_bars(axes[0], settings, "forward_passes", "forward passes")
    draw_bars(axes[1], settings, "seconds", "seconds per answer")
    axes[1].set_yticks([])


DRAW = {
    "adapters": draw_types, "curriculum": draw_bars, "autoregressive": draw_autoregressive,
    "factor": draw_factor, "vrpo": draw_vrpo, "lora": draw_bars, "small": draw_bars}
DRAW_TWO = {"learning": draw_learning, "again": draw_again, "cost": draw_cost}  # on two axes


def show(axes) -> None:
    """Let axes be read on white and on black."""
    axes.patch.set_alpha(0)
    axes.tick_params(colors=GREY)
    for part in (*axes.spines.values(), axes.xaxis.label, axes.yaxis.label):
        part.set_color(GREY)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(labelcolor=GREY, framealpha=0, fontsize=8)


def draw(cells: list[dict], folder: Path) -> list[Path]:
    """A picture of each experiment that is measured; none if matplotlib is not installed."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no pictures")
        return []
    rcParams["svg.hashsalt"] = "diffa2_mini"  # the same picture is the same file
    paths = []
    for experiment, settings in arrange(cells).items():
        two = experiment in DRAW_TWO
        figure = Figure(figsize=(10 if two else 7, 4.5), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots(1, 2) if two else figure.add_subplot()
        (DRAW | DRAW_TWO)[experiment](axes, settings)
        for each in figure.axes:
            show(each)
        paths.append(folder / f"claims_{experiment}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
    return paths
