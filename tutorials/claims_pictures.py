"""A picture of each experiment of claims.py, drawn from its cells."""

import math
from pathlib import Path

import numpy as np

from tutorials.claims_table import arrange, mean_and_spread

GREY, COLOURS = "#7a7a7a", ("#3b82c4", "#d07b26", "#4a9c5d")  # to be read on white and on black
DOMAINS = ("speech", "sound", "music")


def points(settings: dict, names: list[str], figure: str) -> tuple[list[float], list[float]]:
    """Means and spreads of a figure in some settings."""
    pairs = [mean_and_spread([cell[figure] for cell in settings[name].values()]) for name in names]
    return [mean for mean, _ in pairs], [
        0.0 if math.isnan(spread) else spread for _, spread in pairs]


def by_domain(by_seed: dict[int, dict]) -> dict[str, list[float]]:
    """For each domain the accuracy of every seed, a mean over its types of question."""
    return {domain: [float(np.mean([right for type, right in cell["types"].items()
                                    if type.startswith(f"{domain}: ")]))
                     for cell in by_seed.values()] for domain in DOMAINS}


def draw_dumbbells(axes, settings: dict, names: dict[str, str]) -> None:
    """Accuracy by domain in some settings, which `names` gives with their labels: a large dot for
    each mean, small ones for the seeds, and a line from the least mean to the greatest."""
    found = {setting: by_domain(settings[setting]) for setting in names if setting in settings}
    for row, domain in enumerate(DOMAINS):
        means = [np.mean(shares[domain]) for shares in found.values()]
        axes.plot([min(means), max(means)], [row, row], color=GREY, zorder=0)
        for colour, mean, (setting, shares) in zip(COLOURS, means, found.items()):
            axes.plot(shares[domain], [row] * len(shares[domain]), "o", color=colour, markersize=3)
            axes.plot(mean, row, "o", color=colour, markersize=9,
                      label="" if row else names[setting])
    axes.set_yticks(range(len(DOMAINS)), DOMAINS)
    axes.set(xlim=(0, 1.04), ylim=(len(DOMAINS) - 0.5, -1.4), xlabel="accuracy")
    axes.legend()


def draw_adapters(axes, settings: dict) -> None:
    """Accuracy by domain with one adapter, the other, and both."""
    draw_dumbbells(axes, settings, {name: name for name in ("semantic", "acoustic", "both")})


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
    """On two axes: accuracy by domain of the diffusion model and of its twin, from few clips and
    from all."""
    for axis, size in zip(axes, ("few clips", "all clips")):
        draw_dumbbells(axis, settings, {f"{kind}, {size}": kind
                                        for kind in ("diffusion", "autoregressive")})
        axis.set_title(size)


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
    for axis, label, first in zip(axes, ("accuracy", "loss of an answer, nats"), (0, 1)):
        axis.set(xscale="log", xlabel="passes over the data", ylabel=label)
        ticks = [2**i for i in range(first, 7)]
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()


def draw_cost(axes, settings: dict) -> None:
    """On two axes: forward passes, and seconds an answer."""
    draw_bars(axes[0], settings, "forward_passes", "forward passes")
    draw_bars(axes[1], settings, "seconds", "seconds per answer")
    axes[1].set_yticks([])


DRAW = {
    "adapters": draw_adapters, "curriculum": draw_bars, "factor": draw_factor, "vrpo": draw_vrpo,
    "lora": draw_bars, "small": draw_bars, "whole": draw_bars}
DRAW_TWO = {  # on two axes
    "autoregressive": draw_autoregressive, "learning": draw_learning, "again": draw_again,
    "cost": draw_cost}


def show(axes) -> None:
    """Let axes be read on white and on black."""
    axes.patch.set_alpha(0)
    axes.tick_params(colors=GREY)
    for part in (*axes.spines.values(), axes.title, axes.xaxis.label, axes.yaxis.label):
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
