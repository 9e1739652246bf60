"""The paper's claims, each tried in the toy world, where everything can be measured.

    python tutorials/claims.py                 # all of it, hours; stop and repeat it at will
    python tutorials/claims.py --only factor   # one experiment
    python tutorials/claims.py --table         # the table of reference/claims.md, so far

A cell is one experiment in one setting with one seed. What it measured is written to
tutorials/results/cells when it is done. Many cells need the same training, so a *variant*, a model
trained in one way, is made once for each seed, in runs/claims. What was made of other settings,
data or weights is refused, and not mixed in. Encoder and backbone are the shipped ones for all
seeds, the autoregressive backbone is pretrained here once; the seed decides adapters, LoRA, order
of the data and noise. Questions are those of the toy's validation set.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs as a script

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from data import toy
from data.pretraining.backbone import accuracy_by_type, open_and_lettered
from diffa2_mini.command.script import Parser
from diffa2_mini.config import DATA
from diffa2_mini.errors import require
from diffa2_mini.noise import stream
from tutorials import claims_table
from tutorials.claims_lab import (
    CONFIG,
    QUICK,
    STAGES,
    Lab,
    Scale,
    Variant,
    generator_of,
    slug,
    write_json,
)
from tutorials.claims_table import SEEDS

# estimates of the score, from which its variance and the bias of the loss are computed
N_DRAWS = 4000


# ---------------------------------------------------------------------------------------- the cells


def trained(name: str, lab: Lab, seed: int) -> dict:
    """A variant."""
    return lab.figures(name, seed)


def decoded(changes: dict, lab: Lab, seed: int) -> dict:
    """The curriculum's model, which answers in another way, one question at a time."""
    model, variant = lab.restored("stage 4", seed), lab.variants["stage 4"]
    return lab.accuracy(model, variant, lab.stage(variant), lab.questions, 1,
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
        return np.logaddexp(0, -STAGES[4].vrpo_beta * margin)

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


def experiments(scale: Scale) -> dict[str, dict[str, Callable]]:
    """Every setting of every experiment: a function of the lab and the seed. Those with the most
    new training come last."""
    def of(variants: dict[str, str]) -> dict[str, Callable]:
        return {setting: partial(trained, name) for setting, name in variants.items()}

    factors = {f"f = {f:g}": partial(decoded, dict(factor=f)) for f in (0.25, 0.5, 1, 2, 4)}
    schedules = {f"{n} steps": partial(decoded, dict(factor=None, steps=n))
                 for n in (1, 2, 3, 4, 16)}
    draws = [(1, 1, True), (2, 1, True), (4, 1, True), (8, 1, True), (2, 2, True), (1, 4, True),
             (1, 1, False), (2, 1, False), (4, 1, False), (8, 1, False)]
    variances = {f"{times} x {masks}, {'shared' if shared else 'independent'}": partial(
        estimated, times, masks, shared) for times, masks, shared in draws}
    few, more = scale.n_clips
    sizes = {"few clips": few, "more clips": more, "all clips": None}
    return {
        "adapters": of({"both": "stage 2", "semantic": "semantic", "acoustic": "acoustic"}),
        "curriculum": of({
            "1": "stage 1", "1, 2": "stage 2", "2": "2", "1, 2, 3": "stage 3",
            "1, 2, 2": "1, 2, 2", "1, 2, 3, 4": "stage 4", "1, 2, 3, 3": "1, 2, 3, 3"}),
        "factor": factors | schedules,
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
            "diffusion, texts": partial(texts, False),
            "autoregressive, texts": partial(texts, True)},
    }


# -------------------------------------------------------------------------------------- the command


def parse_arguments(argv: list[str]):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--only", choices=list(experiments(QUICK)), help="one experiment (default: all)")
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
    args.work = args.work or (args.out / "work" if args.quick else ROOT / "runs" / "claims")
    args.out = args.out or ROOT / "tutorials" / "results"
    return args


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    scale, seeds = (QUICK, SEEDS[:1]) if args.quick else (Scale(), SEEDS)
    cells = {}
    for seed in seeds:
        for experiment, settings in experiments(scale).items():
            for setting, measure in settings.items():
                path = args.out / "cells" / f"{experiment}-{slug(setting)}-{seed}.json"
                cells[experiment, setting, seed] = path, measure
    wanted = {cell: found for cell, found in cells.items()
              if args.only in (None, cell[0]) and not args.table}
    missing = {cell: found for cell, found in wanted.items() if not found[0].exists()}
    print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are there")
    lab = Lab(toy.make_world(args.data), args.work, scale) if missing else None
    there = [path for path, _ in cells.values() if lab and path.exists()]
    others = [path for path in there if json.loads(path.read_text()).get("made_of") != lab.made_of]
    require(not others, f"{', '.join(map(str, others[:1]))}: was measured with another version, "
                        "world or scale; choose another --out")
    for (experiment, setting, seed), (path, measure) in missing.items():
        if path.exists():  # by now: a second process may be at work with another --only
            continue
        began = time.perf_counter()
        figures = measure(lab, seed)
        write_json(path, {"experiment": experiment, "setting": setting, "seed": seed,
                          "made_of": lab.made_of, **figures})
        shown = ", ".join(f"{name} {figures[name]:.3g}"
                          for name in ("overall", "variance", "bias", "open") if name in figures)
        seconds = time.perf_counter() - began
        print(f"{experiment} / {setting} / seed {seed}: {shown} ({seconds:.0f} s)", flush=True)
    found = [json.loads(path.read_text()) for path, _ in cells.values() if path.exists()]
    require(found, f"{args.out}: no cell is measured yet; leave out --table")
    write_json(args.out / "claims.json", claims_table.summary(found))
    claims_table.draw(found, args.out)
    print(claims_table.table(found))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
