"""What the cells of claims.py say about the claims: means, spreads, verdicts, a table.
Every word about a result is computed from the cells.

A claim compares settings. Whatever differs between seeds differs in both settings alike, so that
the difference is taken seed by seed. It *shows* if it is above zero with 95 % confidence (Student's
t, one-sided); that something is "as good" shows if it is above minus MARGIN. Spreads are standard
deviations over seeds.
"""

import math
from dataclasses import dataclass

import numpy as np

SEEDS = (0, 1, 2)
SEEDS_OF = {"small": SEEDS[:1], "again": SEEDS[:2]}  # of other experiments: all
STUDENT = {2: 6.31, 3: 2.92}  # 95 % points of Student's distribution, by number of seeds
T95 = STUDENT[len(SEEDS)]
MARGIN = 0.02  # in accuracy
SHOWS, HIDES, OPPOSITE = "shows", "does not show at this scale", "the opposite shows at this scale"
PENDING = "not measured yet"
# compared as ratios
LOGGED = ("variance", "variance_start", "forward_passes", "seconds")
# at which an experiment was measured; whoever measures its cells anew says so here
COMMITS = dict.fromkeys(("adapters", "curriculum", "autoregressive", "lora"),
                        "5149114 or earlier")
COMMITS |= dict.fromkeys(("factor", "vrpo"), "01bf624")
COMMITS |= dict.fromkeys(("learning", "again", "small"), "c019ef3")
COMMITS |= dict.fromkeys(("whole", "cost"), "8fb7c5a")
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
         Comparison("held-out pairs ranked right, trained with n = 4 against n = 1 in four times "
                    "the steps", "trained: 4, shared", "trained: 1, shared", "reward_accuracy"),
         Comparison("likewise, n = 4 with shared masks against independent ones",
                    "trained: 4, shared", "trained: 4, independent", "reward_accuracy"),
         Comparison("likewise, all tricks against none in four times the steps",
                    "trained: 4, shared", "trained: 1, independent", "reward_accuracy"),
         Comparison("answers right, all tricks against none in four times the steps",
                    "trained: 4, shared", "trained: 1, independent"))),
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
    Claim(
        "learning", "the autoregressive twin learns faster as its steps have more targets",
        "No claim of the paper: what this page guessed",
        (Comparison("the twin against diffusion as published, stage 2 alone", "autoregressive",
                    "diffusion, as published"),
         Comparison("the twin against itself with no more targets than diffusion", "autoregressive",
                    "autoregressive, few targets"),
         Comparison("the twin with few targets against diffusion with low variance",
                    "autoregressive, few targets", "diffusion, low variance"),
         Comparison("diffusion with low variance against as published", "diffusion, low variance",
                    "diffusion, as published"),
         Comparison("variance of its first gradients, as published against low variance",
                    "diffusion, as published", "diffusion, low variance", "variance_start"),
         Comparison("late EOS lighter (biased) against low variance",
                    "diffusion, late EOS lighter", "diffusion, low variance"),
         Comparison("half of the answers masked wholly (biased) against low variance",
                    "diffusion, half masked", "diffusion, low variance"),
         Comparison("everything masked (biased) against low variance", "diffusion, all masked",
                    "diffusion, low variance"),
         Comparison("the twin against diffusion with everything masked", "autoregressive",
                    "diffusion, all masked"))),
    Claim(
        "whole", "the autoregressive twin is ahead after the whole curriculum, too",
        "No claim of the paper",
        (*(Comparison(f"after stages 1 to {n}, the twin against diffusion",
                      f"autoregressive, stages 1 to {n}", f"diffusion, stages 1 to {n}")
           for n in (3, 4)),
         *(Comparison(f"{whose}, stage 4 against none", f"{kind}, stages 1 to 4",
                      f"{kind}, stages 1 to 3")
           for whose, kind in (("diffusion", "diffusion"), ("the twin", "autoregressive"))))),
    Claim(
        "again", "diffusion gains from data used again, where next-token prediction overfits",
        "Not of this paper: found on texts ([arXiv 2507.15857](https://arxiv.org/abs/2507.15857), "
        "[arXiv 2511.03276](https://arxiv.org/abs/2511.03276))",
        (*(Comparison(f"{words}: diffusion against the twin", f"diffusion, {setting}",
                      f"autoregressive, {setting}")
           for words, setting in (("few clips, 16 passes", "few x 16"),
                                  ("few clips, 64 passes", "few x 64"),
                                  ("more clips, 16 passes", "more x 16"))),
         Comparison("few clips, diffusion: 64 passes against 16", "diffusion, few x 64",
                    "diffusion, few x 16"),
         Comparison("few clips, the twin: 16 passes against 64", "autoregressive, few x 16",
                    "autoregressive, few x 64"),
         Comparison("few clips, 64 passes: rise of the held-out loss from its lowest, the twin "
                    "against diffusion", "autoregressive, few x 64", "diffusion, few x 64",
                    "rise"))),
    Claim(
        "cost", "an answer that is filled in in parallel takes less than one token by token",
        "A real-time factor of 0.082, where an autoregressive peer has 0.14 (from summaries of the "
        "paper)",
        tuple(Comparison(f"{words} of the twin against diffusion, {length} answers, {at_once} at "
                         "once", f"autoregressive, {length} answers, {at_once} at once",
                         f"diffusion, {length} answers, {at_once} at once", figure)
              for words, figure in (("forward passes", "forward_passes"),
                                    ("seconds per answer", "seconds"))
              for length in ("short", "long") for at_once in (1, 16))),
)
FIGURES = {  # what the settings of an experiment are listed with, and what that is called
    "learning": {
        "overall": "accuracy", "targets": "targets a step", "answer_targets": "of the answer",
        "targets_from_audio_alone": "from the audio alone",
        "variance_start": "variance of the gradient, first step", "variance_end": "last step",
        "signal_to_noise_start": "signal to noise, first step", "signal_to_noise_end": "last"},
    "whole": {"overall": "accuracy", "open": "open questions", "lettered": "lettered",
              "wer": "word error rate", "reward_accuracy": "held-out pairs ranked right"},
    "again": {"overall": "accuracy", "rise": "rise of the held-out loss, nats"},
    "cost": {"tokens": "tokens", "forward_passes": "forward passes", "seconds": "seconds",
             "overall": "accuracy"},
    "small": {"overall": "accuracy", "wer": "word error rate"}}


# -------------------------------------------------------------------------------------- the figures

Found = dict[str, dict[str, dict[int, dict]]]  # experiment, setting, seed: the cell


def arrange(cells: list[dict]) -> Found:
    """The cells by experiment, setting and seed, and what follows from them."""
    found: Found = {}
    for cell in cells:
        if "curve" in cell:
            losses = [point["nats_held_out"] for point in cell["curve"]]
            cell = cell | {"rise": losses[-1] - min(losses)}
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


def verdict(differences: list[float], margin: float = 0.0, n_seeds: int = len(SEEDS)) -> str:
    """Whether what should be positive is so over the seeds: above -margin with 95 % confidence."""
    if len(differences) < n_seeds:
        return PENDING
    mean, spread = mean_and_spread(differences)
    error = STUDENT[n_seeds] * spread / math.sqrt(n_seeds)
    if mean - error > -margin:
        return SHOWS
    return OPPOSITE if mean + error < -margin else HIDES


def judge(comparison: Comparison, settings: dict[str, dict[int, dict]],
          n_seeds: int = len(SEEDS)) -> dict:
    """A comparison's figures and its verdict."""
    more, less = ({seed: cell[comparison.figure] for seed, cell in settings.get(name, {}).items()}
                  for name in (comparison.more, comparison.less))
    seeds = sorted(more.keys() & less.keys())
    scale = math.log if comparison.figure in LOGGED else float
    differences = [scale(more[seed]) - scale(less[seed]) for seed in seeds]
    return {
        "text": comparison.text, "figure": comparison.figure,
        "more": [more[seed] for seed in seeds], "less": [less[seed] for seed in seeds],
        "verdict": verdict(differences, comparison.margin, n_seeds)}


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


def measured_claims(found: Found) -> list[Claim]:
    """Those with a cell."""
    return [claim for claim in CLAIMS if claim.experiment in found]


def summary(cells: list[dict]) -> dict:
    """Mean and spread of every figure, every cell, and the verdicts."""
    found = arrange(cells)
    experiments = {}
    for experiment, settings in found.items():
        for setting, by_seed in settings.items():
            figures = over_seeds([*by_seed.values()])
            experiments.setdefault(experiment, {})[setting] = figures
    claims = []
    for claim in measured_claims(found):
        settings, seeds = found[claim.experiment], SEEDS_OF.get(claim.experiment, SEEDS)
        judged = [judge(comparison, settings, len(seeds)) for comparison in claim.comparisons]
        claims.append({"claim": claim.claim, "experiment": claim.experiment,
                       "verdict": together([each["verdict"] for each in judged]),
                       "comparisons": judged})
    return {"seeds": list(SEEDS), "margin": MARGIN, "claims": claims, "experiments": experiments}


def written(values: list[float]) -> str:
    """Mean ± spread."""
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    return f"{mean:.3g}" if math.isnan(spread) else f"{mean:.3g} ± {spread:.2g}"


def table(cells: list[dict]) -> str:
    """A row for each claim, in Markdown: what the paper says, what the toy shows, the command."""
    lines = ["| claim | the paper | the toy | command, commit |", "|---|---|---|---|"]
    for claim, judged in zip(measured_claims(arrange(cells)), summary(cells)["claims"]):
        parts = [f"{each['text']}: {written(each['more']) or 'not measured'} against "
                 f"{written(each['less']) or 'not measured'}, "
                 f"*{each['verdict']}*" for each in judged["comparisons"]]
        lines.append(
            f"| {claim.claim} | {claim.paper} | **{judged['verdict']}**<br>{'<br>'.join(parts)} "
            f"| `python tutorials/claims.py --only {claim.experiment}`, "
            f"{COMMITS.get(claim.experiment, '')} |")
    return "\n".join(lines)


def figures_table(cells: list[dict], experiment: str) -> str:
    """A row for each setting of an experiment, in Markdown, with the figures that it has."""
    names = FIGURES[experiment]
    lines = ["| setting | " + " | ".join(names.values()) + " |", "|---" * (1 + len(names)) + "|"]
    for setting, by_seed in arrange(cells)[experiment].items():
        values = [[cell[name] for cell in by_seed.values() if name in cell] for name in names]
        lines.append(f"| {setting} | " + " | ".join(map(written, values)) + " |")
    return "\n".join(lines)
