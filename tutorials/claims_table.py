"""What the cells of claims.py say about the claims: means, spreads, verdicts, a table, pictures.
Every word about a result is computed from the cells.

A claim compares settings. Whatever differs between seeds differs in both settings alike, so that
the difference is taken seed by seed. It *shows* if it is above zero with 95 % confidence (Student's
t, one-sided); that something is "as good" shows if it is above minus MARGIN. Spreads are standard
deviations over seeds.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SEEDS = (0, 1, 2)
T95 = 2.92  # of Student's distribution with two degrees of freedom, as three seeds have
MARGIN = 0.02  # in accuracy
SHOWS, HIDES, OPPOSITE = "shows", "does not show at this scale", "the opposite shows at this scale"
PENDING = "not measured yet"
LOGGED = ("variance", "forward_passes", "seconds")  # compared as ratios
# a setting that is interpolated between those measured
SAME_PASSES = "fixed schedule with as many passes"


@dataclass(frozen=True)
class Comparison:
    """That the setting `more` has more of a figure than `less`, or, with a margin, not much
    less."""

    text: str
    more: str
    less: str
    figure: str = "overall"
    margin: float = 0.0


@dataclass(frozen=True)
class Claim:
    experiment: str
    claim: str
    paper: str  # what is said there
    comparisons: tuple[Comparison, ...]


CLAIMS = (
    Claim("adapters", "two adapters hear more than one",
          "One adapter for what was said, one for how it sounded (DIFFA-2, section 3.2)",
          (Comparison("both against the semantic one", "both", "semantic"),
           Comparison("both against the acoustic one", "both", "acoustic"))),
    Claim("curriculum", "the curriculum's order matters",
          "Four stages, each from the one before it (section 3.3)",
          (Comparison("stage 1 before stage 2 against stage 2 on as many examples", "1, 2", "2"),
           Comparison("stage 3 against further steps of stage 2", "1, 2, 3", "1, 2, 2"),
           Comparison("stage 4 against further steps of stage 3", "1, 2, 3, 4", "1, 2, 3, 3"))),
    Claim(
        "autoregressive",
        "a diffusion backbone is as good as an autoregressive one, and uses little data well",
        "60.45 on MMSU and up to 69.60 on MMAU test-mini; a real-time factor of 0.082, where an "
        "autoregressive peer has 0.14 (from summaries of the paper)",
        (Comparison("diffusion as good on all clips", "diffusion, all clips",
                    "autoregressive, all clips", margin=MARGIN),
         Comparison("diffusion better on few clips", "diffusion, few clips",
                    "autoregressive, few clips"),
         Comparison("what more clips bring diffusion in as many steps: all against few",
                    "diffusion, all clips", "diffusion, few clips"),
         Comparison("what they bring the autoregressive one", "autoregressive, all clips",
                    "autoregressive, few clips"),
         Comparison("forward passes per answer of the autoregressive one against diffusion",
                    "autoregressive, all clips", "diffusion, all clips", "forward_passes"),
         Comparison("seconds per answer of the autoregressive one against diffusion",
                    "autoregressive, all clips", "diffusion, all clips", "seconds"))),
    Claim(
        "factor", "factor-based parallel decoding is faster and keeps accuracy",
        "Fast-dLLM, LLaDA-8B on GSM8K: 9.3 tokens a second instead of 0.7, 78.0 % right instead of "
        "77.3 %",
        (Comparison("f = 1 as good as one token a step", "f = 1", "16 steps", margin=MARGIN),
         Comparison("forward passes per answer of one token a step against f = 1", "16 steps",
                    "f = 1", "forward_passes"),
         Comparison("seconds per answer of one token a step against f = 1", "16 steps", "f = 1",
                    "seconds"),
         Comparison("f = 1 against a fixed schedule with as many passes", "f = 1", SAME_PASSES))),
    Claim(
        "vrpo", "VRPO's three tricks reduce variance, and that helps",
        "The variance of the score bounds bias and variance of the loss; more samples, a time for "
        "each, and masks that policy and reference share reduce it (LLaDA-1.5)",
        (Comparison("variance with n = 1 against n = 4", "1 x 1, shared", "4 x 1, shared",
                    "variance"),
         Comparison("variance with 1 time x 4 masks against 4 x 1", "1 x 4, shared",
                    "4 x 1, shared", "variance"),
         Comparison("variance with 2 times x 2 masks against 4 x 1", "2 x 2, shared",
                    "4 x 1, shared", "variance"),
         Comparison("variance with independent masks against shared ones", "4 x 1, independent",
                    "4 x 1, shared", "variance"),
         Comparison("bias of the loss likewise", "4 x 1, independent", "4 x 1, shared", "bias"),
         Comparison("bias of the loss with n = 1 against n = 4", "1 x 1, shared", "4 x 1, shared",
                    "bias"),
         Comparison("held-out pairs ranked right, trained with n = 4 against n = 1",
                    "trained: 4, shared", "trained: 1, shared", "reward_accuracy"),
         Comparison("likewise, shared masks against independent ones", "trained: 4, shared",
                    "trained: 4, independent", "reward_accuracy"),
         Comparison("likewise, all tricks against none", "trained: 4, shared",
                    "trained: 1, independent", "reward_accuracy"),
         Comparison("answers right, all tricks against none", "trained: 4, shared",
                    "trained: 1, independent"))),
    Claim("lora", "about 1 % of the weights suffices",
          "99,047,424 of 8.75 billion weights are trained, 1.13 %: LoRA of rank 8, the adapters "
          "and the 20 prompt embeddings of stage 1",
          (Comparison("rank 8 against no LoRA", "rank 8", "rank 0"),
           Comparison("rank 8 against rank 2", "rank 8", "rank 2"),
           Comparison("rank 8 as good as rank 32", "rank 8", "rank 32", margin=MARGIN),
           Comparison("all projections against attention's", "rank 8", "attention"),
           Comparison("all projections against the feed-forward's", "rank 8", "feed-forward"),
           Comparison("share of the weights that train, with rank 32 against rank 8", "rank 32",
                      "rank 8", "share_trained"))),
)


# -------------------------------------------------------------------------------------- the figures

Found = dict[str, dict[str, dict[int, dict]]]  # experiment, setting, seed: the cell


def arrange(cells: list[dict]) -> Found:
    """The cells by experiment, setting and seed, and what follows from them."""
    found: Found = {}
    for cell in cells:
        found.setdefault(cell["experiment"], {}).setdefault(
            cell["setting"], {})[cell["seed"]] = cell
    factor = found.get("factor", {})
    for seed, cell in factor.get("f = 1", {}).items():
        fixed = sorted((by_seed[seed]["forward_passes"], by_seed[seed]["overall"])
                       for setting, by_seed in factor.items()
                       if setting.endswith("steps") and seed in by_seed)
        if fixed:
            between = float(np.interp(cell["forward_passes"], *zip(*fixed)))
            factor.setdefault(SAME_PASSES, {})[seed] = {
                "forward_passes": cell["forward_passes"], "overall": between}
    return found


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds, the latter NaN for one."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def numbers(cell: dict) -> dict[str, float]:
    """The figures of a cell that are single numbers; accuracy by type has the type's name."""
    found = {name: value for name, value in cell.items()
             if isinstance(value, (int, float)) and name != "seed"}
    return found | cell.get("types", {})


def verdict(differences: list[float], margin: float = 0.0) -> str:
    """Whether what should be positive is so over the seeds: above -margin with 95 % confidence."""
    if len(differences) < len(SEEDS):
        return PENDING
    mean, spread = mean_and_spread(differences)
    error = T95 * spread / math.sqrt(len(differences))
    if mean - error > -margin:
        return SHOWS
    return OPPOSITE if mean + error < -margin else HIDES


def judge(comparison: Comparison, settings: dict[str, dict[int, dict]]) -> dict:
    """A comparison's figures and its verdict."""
    more, less = ({seed: cell[comparison.figure] for seed, cell in settings.get(name, {}).items()}
                  for name in (comparison.more, comparison.less))
    seeds = sorted(more.keys() & less.keys())
    scale = math.log if comparison.figure in LOGGED else float
    differences = [scale(more[seed]) - scale(less[seed]) for seed in seeds]
    return {
        "text": comparison.text, "figure": comparison.figure,
        "more": [more[seed] for seed in seeds], "less": [less[seed] for seed in seeds],
        "verdict": verdict(differences, comparison.margin)}


def together(verdicts: list[str]) -> str:
    """What several comparisons say about a claim."""
    if len({*verdicts}) == 1:
        return verdicts[0]
    counts = [f"{what} in {verdicts.count(kind)}"
              for kind, what in ((OPPOSITE, "the opposite"), (HIDES, "neither"), (PENDING, PENDING))
              if kind in verdicts]
    return ", ".join([f"shows in {verdicts.count(SHOWS)} of {len(verdicts)}", *counts])


def over_seeds(cells: list[dict]) -> dict:
    """Mean and spread of every figure that all cells of a setting have; the spread is None for one
    seed."""
    figures, means, spreads = [numbers(cell) for cell in cells], {}, {}
    for name in figures[0]:
        if all(name in each for each in figures):
            means[name], spread = mean_and_spread([each[name] for each in figures])
            spreads[name] = None if math.isnan(spread) else spread
    return {"mean": means, "spread": spreads, "cells": cells}


def summary(cells: list[dict]) -> dict:
    """Mean and spread of every figure, every cell, and the verdicts."""
    found = arrange(cells)
    experiments = {}
    for experiment, settings in found.items():
        for setting, by_seed in settings.items():
            figures = over_seeds([*by_seed.values()])
            experiments.setdefault(experiment, {})[setting] = figures
    claims = []
    for claim in CLAIMS:
        settings = found.get(claim.experiment, {})
        judged = [judge(comparison, settings) for comparison in claim.comparisons]
        claims.append({"claim": claim.claim, "experiment": claim.experiment,
                       "verdict": together([each["verdict"] for each in judged]),
                       "comparisons": judged})
    return {"seeds": list(SEEDS), "margin": MARGIN, "claims": claims, "experiments": experiments}


def written(values: list[float]) -> str:
    """Mean ± spread."""
    if not values:
        return "not measured"
    mean, spread = mean_and_spread(values)
    return f"{mean:.3g}" if math.isnan(spread) else f"{mean:.3g} ± {spread:.2g}"


def table(cells: list[dict]) -> str:
    """A row for each claim, in Markdown: what the paper says, what the toy shows, the command."""
    lines = ["| claim | the paper | the toy | command |", "|---|---|---|---|"]
    for claim, judged in zip(CLAIMS, summary(cells)["claims"]):
        parts = [f"{each['text']}: {written(each['more'])} against {written(each['less'])}, "
                 f"*{each['verdict']}*" for each in judged["comparisons"]]
        lines.append(
            f"| {claim.claim} | {claim.paper} | **{judged['verdict']}**<br>{'<br>'.join(parts)} "
            f"| `python tutorials/claims.py --only {claim.experiment}` |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the pictures

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


def draw_bars(axes, settings: dict) -> None:
    """Accuracy in each setting."""
    means, spreads = points(settings, list(settings), "overall")
    axes.barh(list(settings), means, xerr=spreads, color=COLOURS[0], ecolor=GREY)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy")


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


DRAW = {
    "adapters": draw_types, "curriculum": draw_bars, "autoregressive": draw_autoregressive,
    "factor": draw_factor, "vrpo": draw_vrpo, "lora": draw_bars}


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
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        DRAW[experiment](axes, settings)
        axes.tick_params(colors=GREY)
        for line in axes.spines.values():
            line.set_color(GREY)
        axes.xaxis.label.set_color(GREY)
        axes.yaxis.label.set_color(GREY)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(labelcolor=GREY, framealpha=0, fontsize=8)
        paths.append(folder / f"claims_{experiment}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
    return paths
