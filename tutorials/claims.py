"""The paper's claims, each tried in the toy world, where everything can be measured.

    python tutorials/claims.py                 # all of it, hours; stop and repeat it at will
    python tutorials/claims.py --only factor   # one experiment
    python tutorials/claims.py --table         # the table of reference/claims.md, so far
    python tutorials/claims.py --backbone      # the autoregressive backbone alone, the first step
    python tutorials/claims.py --share 1/2     # the first of two processes that share the cells

A cell is one experiment in one setting with one seed. What it measured is written to
tutorials/results/cells when it is done. Many cells need the same training, so a *variant*, a model
trained in one way, is made once for each seed, in runs/claims. What was made of other settings,
data or shipped weights is not mixed in: an experiment is measured anew as a whole, once its cells
are deleted. Encoder and backbone are the shipped ones for all seeds, the autoregressive backbone is
pretrained here, once in runs/claims; the seed decides adapters, LoRA, order of the data and noise.
Questions are those of the toy's validation set, but for the long answers of "cost"
(`long_questions`).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs as a script

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import dataclasses
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from data import toy
from data.pretraining.backbone import accuracy_by_type, open_and_lettered
from diffa2_mini.command.script import Parser
from diffa2_mini.config import DATA
from diffa2_mini.errors import require
from diffa2_mini.fast.device import choose_device
from diffa2_mini.noise import stream
from tutorials import claims_pictures, claims_table
from tutorials.autoregressive import answer_tokens
from tutorials.claims_lab import (
    BACKBONE,
    CONFIG,
    PAIRS,
    PASSES,
    QUICK,
    Lab,
    Scale,
    Variant,
    chain,
    generator_of,
    pretrain_autoregressive,
    slug,
    stage_of,
    variants,
    write_json,
)
from tutorials.claims_table import FIGURES, SEEDS, SEEDS_OF

# estimates of the score, from which its variance and the bias of the loss are computed
N_DRAWS = 4000


# ---------------------------------------------------------------------------------------- the cells


@dataclass(frozen=True)
class Setting:
    """Of an experiment: how it is measured, with a lab and a seed; and which variant it needs, or
    the backbone of which."""

    measure: Callable[[Lab, int], dict]
    needs: str | None = None


Cells = dict[tuple[str, str, int], Setting]  # by experiment, setting and seed


def trained(name: str, lab: Lab, seed: int) -> dict:
    """A variant."""
    return lab.figures(name, seed)


def decoded(changes: dict, lab: Lab, seed: int) -> dict:
    """The curriculum's model, which answers in another way, one question at a time."""
    model, variant = lab.restored("stage 4", seed), lab.variants["stage 4"]
    return lab.accuracy(model, variant, stage_of(variant, lab.scale), lab.questions, 1,
                        dataclasses.replace(CONFIG.decode, **changes))


def estimated(times: int, masks: int, shared: bool, lab: Lab, seed: int) -> dict:
    """Variance of the score of a pair, and bias of its loss, with `times` numbers of masked tokens
    and `masks` masks of each."""
    policy, reference = lab.pool(seed)
    (P, _, K, M), rng = policy.shape, stream("score", seed, "draws")

    def draw():
        k = rng.integers(K, size=(N_DRAWS, P, 2, times, 1))
        m = rng.integers(M, size=(N_DRAWS, P, 2, times, masks))
        return np.arange(P)[:, None, None, None], np.arange(2)[:, None, None], k, m

    def loss(margin):
        return np.logaddexp(0, -PAIRS["vrpo_beta"] * margin)

    at = draw()
    gain = (policy[at] - reference[at if shared else draw()]).mean((-2, -1))  # [N, P, 2]
    margin, truth = (x[..., 0] - x[..., 1] for x in (gain, (policy - reference).mean((-2, -1))))
    return {"variance": float(margin.var(0).mean()),
            "bias": float((loss(margin).mean(0) - loss(truth)).mean())}


def texts(causal: bool, lab: Lab, seed: int) -> dict:
    """A backbone before it is trained on audio: texts, in which a description stands in the
    audio's place."""
    rng = stream("held-out texts", seed, "claims")
    examples = [toy.text_example(rng, evaluation=True) for _ in range(lab.scale.n_texts)]
    model = lab.build(Variant(None, 2, causal=causal))
    accuracy = accuracy_by_type(model, lab.tokenizer, examples, lab.scale.pretrain.silences,
                                generator_of(causal))
    return dict(zip(("open", "lettered"), open_and_lettered(accuracy)))


def timed(name: str, at_once: int, n_tokens: int, lab: Lab, seed: int) -> dict:
    """What an answer takes: to the questions whose answers are nearest to so many tokens, the last
    one included, `at_once` together."""
    def length(question) -> int:
        ids = lab.tokenizer.response(question.answer, CONFIG.text.response_multiple)
        return int(answer_tokens(torch.tensor([ids]), lab.tokenizer).sum())

    model, variant = lab.restored(name, seed), lab.variants[name]
    questions = sorted(lab.asked(variant), key=lambda each: abs(length(each) - n_tokens))
    questions = questions[:lab.scale.n_timed]
    for _ in range(2):  # the first time warms up
        figures = lab.accuracy(model, variant, stage_of(variant, lab.scale), questions, at_once)
    return figures | {"tokens": float(np.mean([length(question) for question in questions]))}


def of(names: dict[str, str]) -> dict[str, Setting]:
    """Settings that are variants, by name."""
    return {setting: Setting(partial(trained, name), name) for setting, name in names.items()}


def experiments(scale: Scale) -> dict[str, dict[str, Setting]]:
    """Every setting of every experiment. Those with the most new training come last."""
    factors = {f"f = {f:g}": dict(factor=f) for f in (0.25, 0.5, 1, 2, 4)}
    schedules = {f"{n} steps": dict(factor=None, steps=n) for n in (1, 2, 3, 4, 16)}
    draws = [(1, 1, True), (2, 1, True), (4, 1, True), (8, 1, True), (2, 2, True), (1, 4, True),
             (1, 1, False), (2, 1, False), (4, 1, False), (8, 1, False)]
    variances = {f"{times} x {masks}, {'shared' if shared else 'independent'}": Setting(
        partial(estimated, times, masks, shared), "stage 4") for times, masks, shared in draws}
    few, more = scale.n_clips
    sizes = {"few clips": few, "more clips": more, "all clips": None}
    return {
        "adapters": of({"both": "stage 2", "semantic": "semantic", "acoustic": "acoustic"}),
        "curriculum": of({
            "1": "stage 1", "1, 2": "stage 2", "2": "2", "1, 2, 3": "stage 3",
            "1, 2, 2": "1, 2, 2", "1, 2, 3, 4": "stage 4", "1, 2, 3, 3": "1, 2, 3, 3"}),
        "factor": {setting: Setting(partial(decoded, changes), "stage 4")
                   for setting, changes in (factors | schedules).items()},
        "vrpo": variances | of({
            "trained: 4, shared": "stage 4", "trained: 1, shared": "1, shared",
            "trained: 4, independent": "4, independent",
            "trained: 1, independent": "1, independent"}),
        "lora": of({
            "rank 0": "1, 2, 2", "rank 2": "rank 2", "rank 8": "stage 3", "rank 32": "rank 32",
            "attention": "attention", "feed-forward": "feed-forward"}),
        "autoregressive": {
            **of({f"diffusion, {size}": f"diffusion, {n}" for size, n in sizes.items()}),
            **of({f"autoregressive, {size}": f"causal, {n}" for size, n in sizes.items()}),
            "diffusion, texts": Setting(partial(texts, False)),
            "autoregressive, texts": Setting(partial(texts, True), "causal, None")},
    } | twin(scale)


def twin(scale: Scale) -> dict[str, dict[str, Setting]]:
    """Why the autoregressive twin learns faster, what data used again bring, what an answer costs;
    and two small questions, with one seed."""
    kinds = {"diffusion": "diffusion", "autoregressive": "causal"}
    curricula = {"diffusion": "low", "autoregressive": "causal"}
    return {
        "learning": of({
            "diffusion, as published": "published", "diffusion, low variance": "low variance",
            "diffusion, late EOS lighter": "light EOS",
            "diffusion, half masked": "half masked", "diffusion, all masked": "all masked",
            "autoregressive, few targets": "twin, few targets", "autoregressive": "twin"}),
        "whole": of({
            f"{kind}, stages 1 to {n}": f"{name} stage {n}" for n in (3, 4)
            for kind, name in curricula.items()}),
        "again": of({
            f"{kind}, {size} x {passes}": f"{name}, {n} x {passes}"
            for size, n, some in zip(("few", "more"), scale.n_clips, PASSES) for passes in some
            for kind, name in kinds.items()}),
        "cost": {
            f"{kind}, {length} answers, {at_once} at once": Setting(
                partial(timed, f"{name} {variant}", at_once, n_tokens), f"{name} {variant}")
            for length, variant, n_tokens in (("short", "stage 3", 4), ("long", "long", 16))
            for at_once in (1, 16) for kind, name in curricula.items()},
        "small": of({
            "stage 1, 0 prompts": "no prompts", "stage 1, 20 prompts": "low stage 1",
            "stages 1 and 2, 0 prompts": "no prompts, 2",
            "stages 1 and 2, 20 prompts": "low stage 2",
            "stage 2, 1 query": "1 query", "stage 2, 12 queries": "12 queries"})}


def needs_backbone(cell: Setting, scale: Scale) -> bool:
    return cell.needs is not None and variants(scale)[cell.needs].causal


def share(cells: Cells, scale: Scale, number: int, n: int) -> Cells:
    """The cells of process `number`, from 1 on, of `n`. Those that need the same training stay
    together; the largest groups are dealt out first, each to whoever has least to do."""
    found, groups = variants(scale), {}
    for (experiment, setting, seed), cell in cells.items():
        needed = chain(found, cell.needs)
        group = groups.setdefault((*needed[-1:], seed), ({}, {}))
        group[0][experiment, setting, seed] = cell
        stages = {name: stage_of(found[name], scale) for name in needed}
        group[1].update((name, stage.steps * stage.batch_size) for name, stage in stages.items())
    loads, mine = [0] * n, {}
    for some, costs in sorted(groups.values(), key=lambda group: -sum(group[1].values())):
        least = loads.index(min(loads))
        loads[least] += 1 + sum(costs.values())
        mine |= some if least == number - 1 else {}
    return mine


# -------------------------------------------------------------------------------------- the command


def parse_arguments(argv: list[str]):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(experiments(QUICK)), default=list(experiments(QUICK)),
        help="experiments (default: all)")
    add("--backbone", action="store_true", help="pretrain the autoregressive backbone; no more")
    add("--share", help="I/N: as process I of N, measure its part of the cells, and print no table "
        "(default: all)")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="default: cpu")
    add("--quick", action="store_true",
        help="a few steps of each, with one seed, to try the code; needs --out")
    add("--table", action="store_true", help="measure nothing more; print what there is")
    add("--out", type=Path, help="where results go (default: tutorials/results)")
    add("--work", type=Path,
        help="where trained models go (default: runs/claims; with --quick: in --out)")
    add("--data", type=Path, default=DATA / "toy",
        help="the toy world, made if missing (default: data/toy)")
    add("--threads", type=int, help="CPU threads (default: one per core)")
    args = parser.parse_args(argv)
    require(args.out or not args.quick,
            "--quick needs --out FOLDER, so that its results do not stand among the real ones")
    found = re.fullmatch(r"(\d+)/(\d+)", args.share or "1/1")
    args.part = tuple(map(int, found.groups())) if found else (0, 0)
    require(0 < args.part[0] <= args.part[1] <= 1024,
            f"--share must be I/N, with I from 1 to N, got {args.share}")
    args.work = args.work or (args.out / "work" if args.quick else ROOT / "runs" / "claims")
    args.out = args.out or ROOT / "tutorials" / "results"
    return args


def path_of(out: Path, experiment: str, setting: str, seed: int) -> Path:
    return out / "cells" / f"{experiment}-{slug(setting)}-{seed}.json"


def measure(cells: Cells, lab: Lab, out: Path) -> None:
    """Measure cells that are missing, and write each as soon as it is there."""
    for (experiment, setting, seed), cell in cells.items():
        path, began = path_of(out, experiment, setting, seed), time.perf_counter()
        if path.exists():  # by now: a second process may be at work
            continue
        figures = cell.measure(lab, seed)
        write_json(path, {"experiment": experiment, "setting": setting, "seed": seed,
                          "made_of": lab.made_of, **figures})
        shown = ", ".join(f"{name} {figures[name]:.3g}"
                          for name in ("overall", "variance", "bias", "open") if name in figures)
        seconds = time.perf_counter() - began
        print(f"{experiment} / {setting} / seed {seed}: {shown} ({seconds:.0f} s)", flush=True)


def require_same(cells: Cells, missing: Cells, made_of: str, out: Path) -> None:
    """Raise UserError if an experiment that is to be completed has cells of other things."""
    begun = {experiment for experiment, *_ in missing}
    for path in (path_of(out, *cell) for cell in cells if cell[0] in begun):
        if path.exists():
            require(json.loads(path.read_text()).get("made_of") == made_of,
                    f"{path}: was measured with another version, world or scale; choose another "
                    "--out, or delete all cells of this experiment to measure them anew")


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    scale, seeds = (QUICK, SEEDS[:1]) if args.quick else (Scale(), SEEDS)
    device, *_ = choose_device(args.device, "float32")
    if args.backbone:
        return pretrain_autoregressive(args.work / BACKBONE, scale.pretrain, device)
    cells = {(experiment, setting, seed): cell for seed in seeds
             for experiment, settings in experiments(scale).items()
             for setting, cell in settings.items() if seed in SEEDS_OF.get(experiment, SEEDS)}
    wanted = {key: cell for key, cell in cells.items() if key[0] in args.only and not args.table}
    if args.share and not (args.work / BACKBONE).exists():
        wanted = {key: cell for key, cell in wanted.items() if not needs_backbone(cell, scale)}
        print(f"{args.work / BACKBONE} is not there: cells that need it are left out; make it by "
              "--backbone")
    wanted = share(wanted, scale, *args.part)
    missing = {key: cell for key, cell in wanted.items() if not path_of(args.out, *key).exists()}
    if not args.table:
        print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are there", flush=True)
    if missing:
        lab = Lab(toy.make_world(args.data), args.work, scale, device)
        require_same(cells, missing, lab.made_of, args.out)
        measure(missing, lab, args.out)
    if args.share:
        return
    paths = [path_of(args.out, *key) for key in cells]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    require(found, f"{args.out}: no cell is measured yet; leave out --table")
    write_json(args.out / "claims.json", claims_table.summary(found))
    claims_pictures.draw(found, args.out)
    for experiment in FIGURES:
        if any(cell["experiment"] == experiment for cell in found):
            print(claims_table.figures_table(found, experiment), end="\n\n")
    print(claims_table.table(found))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
