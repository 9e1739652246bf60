"""What the cells of seeds.py say: what was asked of each figure, and what the seeds gave."""

from dataclasses import dataclass

import numpy as np

LOWER = ("wer", "affirmed")  # figures that are better if lower


@dataclass(frozen=True)
class Figure:
    """A figure of a stage, or its change from stage 3 to stage 4. What is asked of its mean over
    the seeds, or of the worst seed: what must be reached, and the aim."""

    text: str
    stage: str
    name: str
    mean: tuple[float, ...] = ()
    worst: tuple[float, ...] = ()

    def of(self, cell: dict) -> float:
        stages = cell["stages"]
        if self.stage == "change":
            return stages["4"][self.name] - stages["3"][self.name]
        return stages[self.stage][self.name]


FIGURES = (
    Figure("word error rate after stage 1", "1", "wer", worst=(0.10, 0.03)),
    Figure("word error rate after stage 4", "4", "wer", worst=(0.05, 0.02)),
    Figure("all questions after stage 3", "3", "overall"),
    Figure("all questions after stage 4", "4", "overall", (0.935, 0.97), (0.91, 0.95)),
    Figure("open questions, mean over types", "4", "open"),
    Figure("open questions, the worst type", "4", "worst_open", worst=(0.80, 0.90)),
    Figure("captions with every fact right", "4", "caption", (0.92, 0.97)),
    Figure("lettered questions, mean over types", "4", "lettered", (0.93, 0.97)),
    Figure("held-out pairs ranked right", "4", "reward_accuracy", (0.90, 0.95)),
    Figure("false premises affirmed after stage 3 (0.3 or more)", "3", "affirmed", (0.80,)),
    Figure("false premises affirmed after stage 4", "4", "affirmed"),
    Figure("balanced accuracy on premises, change by stage 4", "change", "balanced", (0.15, 0.25)),
    Figure("right on true premises, change", "change", "true", (-0.01,)),
    Figure("right on false premises, change", "change", "false"),
    Figure("all other questions, change", "change", "other", (-0.005, 0.0)),
)


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution: with t = sqrt(freedom) tan(a), the density of
    a goes as cos(a)^(freedom - 1)."""
    a = np.linspace(-np.pi / 2, np.pi / 2, 1_000_001)
    below = np.cumsum(np.cos(a) ** (freedom - 1))
    return float(np.sqrt(freedom) * np.tan(a[np.searchsorted(below, 0.975 * below[-1])]))


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of the mean over seeds (Student's t); without ends for one seed."""
    n = len(values)
    half = student_t(n - 1) * np.std(values, ddof=1) / np.sqrt(n) if n > 1 else np.inf
    return float(np.mean(values) - half), float(np.mean(values) + half)


def row_of(figure: Figure, cells: list[dict]) -> str:
    """A figure over the seeds, and whether it is what it must be. A change that must be above zero
    must also have an interval above it."""
    values, lower = [figure.of(cell) for cell in cells], figure.name in LOWER
    worst = int((np.argmax if lower else np.argmin)(values))
    found = {"mean": float(np.mean(values)), "worst": values[worst]}
    asked = {of: limits for of in found if (limits := getattr(figure, of))}
    must, aim = (", ".join(f"{of} {'≤' if lower else '≥'} {limits[i]:g}"
                           for of, limits in asked.items() if len(limits) > i) for i in (0, 1))
    low, high = interval(values)
    reached = all(found[of] <= limits[0] if lower else found[of] >= limits[0]
                  for of, limits in asked.items())
    if figure.stage == "change" and asked and figure.mean[0] > 0:
        reached = reached and low > 0
    return (f"| {figure.text} | {found['mean']:.3f} | {low:.3f} to {high:.3f} | "
            f"{found['worst']:.3f} (seed {cells[worst]['seed']}) | {must} | {aim} | "
            f"{('yes' if reached else '**no**') if must else ''} |")


def table(cells: list[dict]) -> str:
    """What was asked and measured, and accuracy by type of question, in Markdown. Changes and their
    intervals are of differences seed by seed."""
    lines = [f"| {len(cells)} seeds | mean | 95 % interval | worst seed | must | aim | reached |",
             "|---|---:|---:|---:|---|---|---|", *(row_of(figure, cells) for figure in FIGURES)]
    lines += ["", "| type of question | after stage 3 | after stage 4 | worst seed after stage 4 |",
              "|---|---:|---:|---:|"]
    for group, where in {"types": "", "premises": ", premises.json"}.items():
        for type in sorted(cells[0]["stages"]["4"][group]):
            before, after = ([cell["stages"][n][group][type] for cell in cells] for n in "34")
            worst = int(np.argmin(after))
            lines.append(f"| {type}{where} | {np.mean(before):.3f} | {np.mean(after):.3f} | "
                         f"{after[worst]:.3f} (seed {cells[worst]['seed']}) |")
    return "\n".join(lines)
