"""What `--size small` reaches on real recordings, beside what is easy about them.

    python train.py --size small --data data/small --out runs/small     # data/README.md: its data
    python tutorials/small_goals.py                    # measure that run, print the table
    python tutorials/small_goals.py runs/a runs/b      # several runs
    python tutorials/small_goals.py --digits runs/jackson    # runs on digits alone
    python tutorials/small_goals.py --table            # measure nothing more; the table, so far

A cell is a run: what it answers to the test questions of data/orders, data/people and data/fsdd
after stages 3 and 4. It is written to tutorials/results/small. Beside the runs stand the answer
that training has most often, and a linear probe: ridge regression on the mean of the encoder's
final states of a clip. It names a value of each slot or `none`, or who speaks; it cannot write
digits down; easy.json keeps both (delete it where the data have changed). A run without the
acoustic adapter (small_without.py) has rows of its own, and so have runs on digits alone, each with
the test clips of the data that it was trained on. The table is of all runs that --out holds, ours
among them: another --out keeps yours apart.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs as a script

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import argparse
import json
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from data import orders
from diffa2_mini import weights
from diffa2_mini.command.script import Parser, progress
from diffa2_mini.command.table import columns
from diffa2_mini.config import DATA, SIZES
from diffa2_mini.data import Example, load_examples
from diffa2_mini.errors import UserError, require
from diffa2_mini.evaluate.answers import Respondent
from diffa2_mini.evaluate.scoreboard import word_error_rate
from diffa2_mini.evaluate.scoring import is_right, word_errors
from diffa2_mini.fast.device import choose_device
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.published.sources import load_tokenizer, locate_all
from diffa2_mini.training.checkpoint import (
    Checkpoint,
    fingerprints_of,
    load_checkpoint,
    require_same,
)
from diffa2_mini.training.features import FeatureCache
from tutorials.claims_lab import write_json

CONFIG, STAGES = SIZES["small"]
RIDGES = (1.0, 10.0, 100.0, 1000.0, 10_000.0)  # the one that is best in validation counts
SLOT_OF = {wording: slot for slot, wordings in orders.WORDINGS.items() for wording in wordings}


@dataclass(frozen=True)
class Goal:
    """A figure of the table: what must be reached, what is hoped for, and whether less is more."""

    text: str
    name: str
    must: float
    aim: float
    lower: bool = False


GOALS = (
    Goal("digits, word error rate, known speakers", "known", 0.05, 0.02, lower=True),
    Goal("digits, word error rate, the held-out speaker", "held_out", 0.10, 0.04, lower=True),
    Goal("orders: slots that were said", "said", 0.85, 0.95),
    Goal("orders: none where nothing was said", "none", 0.90, 0.97),
    Goal("orders: the whole order", "order", 0.50, 0.75),
    Goal("woman, man, girl, boy", "who", 0.70, 0.80),
    Goal("woman or man, among adults", "adult", 0.93, 0.98),
)


def examples_of(folder: Path, name: str) -> list[Example]:
    """The open questions of a manifest."""
    manifest = folder / f"{name}.json"
    require(manifest.is_file(), f"{manifest}: found no such file; data/README.md says how to make "
            "it")
    examples = load_examples(manifest, STAGES[2], CONFIG)
    return [example for example in examples if not example.type.endswith("+abcd")]


def digits_of(folder: Path, name: str) -> list[Example]:
    """The digits to write down of a manifest."""
    return [e for e in examples_of(folder, name) if e.type == "asr"]


def tests_of(data: Path) -> dict[str, list[Example]]:
    """The test questions of each goal."""
    said = examples_of(data / "orders", "test")
    who = [e for e in examples_of(data / "people", "test") if e.type != "asr"]
    return {"known": digits_of(data / "fsdd", "test"),
            "held_out": digits_of(data / "fsdd", "held_out"),
            "said": [e for e in said if e.type in orders.SLOTS],
            "none": [e for e in said if e.type == orders.NONE],
            "order": [e for e in said if e.type == "order"],
            "who": who, "adult": [e for e in who if e.type == "adult"]}


def score(name: str, examples: list[Example], answers: list[str]) -> float:
    """The word error rate of digits, the share of right answers to the rest."""
    if name in ("known", "held_out"):
        return word_error_rate([word_errors(e.answer, a) for e, a in zip(examples, answers)])
    return float(np.mean([is_right(e, a) for e, a in zip(examples, answers)]))


# ------------------------------------------------------------------------------------- what is easy


def key_of(example: Example) -> str:
    """Which questions have the same answers: about one slot, or who speaks, or what is said."""
    return SLOT_OF.get(example.instruction, "who" if example.type in ("adult", "child")
                       else example.type)


def commonest(train: list[Example]) -> dict[str, str]:
    """The most frequent answer to each kind of question."""
    counts = defaultdict(Counter)
    for example in train:
        counts[key_of(example)][example.answer] += 1
    return {key: found.most_common(1)[0][0] for key, found in counts.items()}


def ridge_answers(train: list[tuple[np.ndarray, str]], asked: list[np.ndarray], ridge: float
                  ) -> list[str]:
    """What ridge regression on standardised vectors answers, the constant not shrunk."""
    classes = sorted({label for _, label in train})
    x, y = np.stack([vector for vector, _ in train]), np.eye(len(classes))[
        [classes.index(label) for _, label in train]]
    mean, std = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / std
    solved = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    scores = (np.stack(asked) - mean) / std @ solved + y.mean(0)
    return [classes[i] for i in scores.argmax(1)]


class Probe:
    """Ridge regression for each kind of question, on the mean final state of a clip."""

    def __init__(self, features: FeatureCache, train: list[Example], validation: list[Example]):
        self.features, self.train, self.ridges = features, train, {}
        for key in {key_of(e) for e in train}:
            asked = [e for e in validation if key_of(e) == key]
            self.ridges[key] = max(RIDGES, key=lambda ridge: sum(
                is_right(e, a) for e, a in zip(asked, self.answers(key, asked, ridge))))

    def vector(self, example: Example) -> np.ndarray:
        return self.features.get(example.path).final.float().mean(0).cpu().numpy()

    def answers(self, key: str, asked: list[Example], ridge: float) -> list[str]:
        train = [(self.vector(e), e.answer) for e in self.train if key_of(e) == key]
        return ridge_answers(train, [self.vector(e) for e in asked], ridge)

    def answer(self, asked: list[Example]) -> list[str]:
        found = {}
        for key in {key_of(e) for e in asked}:
            some = [e for e in asked if key_of(e) == key]
            found |= zip(map(id, some), self.answers(key, some, self.ridges[key]))
        return [found[id(e)] for e in asked]


def whole_orders(asked: list[Example], probe: Probe) -> list[str]:
    """The sentence of the slots that a probe names."""
    slots = {}
    for slot in orders.SLOTS:
        values = probe.answers(slot, asked, probe.ridges[slot])
        for example, value in zip(asked, values):
            slots.setdefault(id(example), {})[slot] = value
    return [orders.sentence({slot: value for slot, value in slots[id(e)].items()
                             if value != orders.NONE}) for e in asked]


def easy(data: Path, features: FeatureCache) -> dict[str, dict[str, float]]:
    """What the most frequent answer and a linear probe reach."""
    tests = tests_of(data)
    train = {folder: examples_of(data / folder, "sft") for folder in ("orders", "people", "fsdd")}
    most = commonest(train["orders"] + train["people"])
    most["asr"] = commonest(train["fsdd"])["asr"]
    found = {"most frequent": {name: score(name, asked, [most[key_of(e)] for e in asked])
                               for name, asked in tests.items()}}
    named = [e for folder in ("orders", "people") for e in train[folder]
             if e.type not in ("asr", "order")]
    validation = [e for folder in ("orders", "people") for e in
                  examples_of(data / folder, "validation") if e.type not in ("asr", "order")]
    features.prepare([e.path for e in [*named, *validation]], progress)
    probe = Probe(features, named, validation)
    found["probe"] = {name: score(name, tests[name], probe.answer(tests[name]))
                      for name in ("said", "none", "who", "adult")}
    found["probe"]["order"] = score("order", tests["order"], whole_orders(tests["order"], probe))
    return found


# ----------------------------------------------------------------------------------------- the runs


def restore(path: Path, features: FeatureCache, fingerprints: dict[str, str]) -> Checkpoint:
    """Fill the model with a checkpoint. Raises UserError unless its stage is done, and was trained
    on the frozen parts that have these fingerprints."""
    saved = load_checkpoint(path)
    require(saved.done, f"{path}: expected a stage that is done, got {saved.step} steps of one; "
            "finish it with --resume")
    require_same(path, saved, "name those that it was trained on: --whisper, --llada",
                 config=CONFIG, fingerprints=fingerprints)
    weights.restore(features.model, saved.model, str(path))
    return saved


def measure(run: Path, data: Path, features: FeatureCache, fingerprints: dict[str, str]) -> dict:
    """The figures of a run's stages 3 and 4, and for each question about what was not said the
    clip and whether a value was named, which affirms it."""
    found, tests, tokenizer = {}, tests_of(data), load_tokenizer(CONFIG)
    asked = {id(e): e for some in tests.values() for e in some}  # adults are in two of them
    for number in (3, 4):
        saved = restore(run / f"stage{number}.safetensors", features, fingerprints)
        respondent = Respondent(features, tokenizer, saved.audio, CONFIG.decode)
        replies = dict(zip(asked, respondent.answer([*asked.values()])[0], strict=True))
        answers = {name: [replies[id(e)] for e in some] for name, some in tests.items()}
        found[str(number)] = {name: score(name, tests[name], some)
                              for name, some in answers.items()}
        found[str(number)]["affirmed"] = [
            [e.path.stem, bool(a.strip()) and a.strip() != orders.NONE]
            for e, a in zip(tests["none"], answers["none"])]
    return {"audio": saved.audio, "stages": found}


def data_of(run: Path) -> Path:
    """The data that a run was trained on. Raises UserError."""
    path = run / "config.json"
    try:
        return Path(json.loads(path.read_text(encoding="utf-8"))["arguments"]["data"])
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path}: expected what train.py writes, got something else; choose "
                        "another run") from None


def measure_digits(run: Path, features: FeatureCache, fingerprints: dict[str, str]
                   ) -> dict[str, float]:
    """The word error rates of a run on digits alone after stage 4, for the speakers that it has
    heard and for the one that was held out of its data."""
    data = data_of(run)
    saved = restore(run / "stage4.safetensors", features, fingerprints)
    respondent = Respondent(features, load_tokenizer(CONFIG), saved.audio, CONFIG.decode)
    tests = {name: digits_of(data, manifest)
             for name, manifest in (("known", "test"), ("held_out", "held_out"))}
    return {name: score(name, asked, respondent.answer(asked)[0]) for name, asked in tests.items()}


def affirmed(stage: dict) -> float:
    return float(np.mean([yes for _, yes in stage["affirmed"]]))


def paired_bound(cells: list[dict]) -> list[float]:
    """The 95 % interval of the change of false affirmations by stage 4, over 10,000 drawings of as
    many clips, each with all its questions in all runs."""
    by_clip = defaultdict(list)
    for cell in cells:
        for (clip, before), (_, after) in zip(*(cell["stages"][n]["affirmed"] for n in ("3", "4"))):
            by_clip[clip].append(after - before)
    sums = np.array([[sum(changes), len(changes)] for changes in by_clip.values()])
    drawn = sums[np.random.default_rng(0).integers(len(sums), size=(10_000, len(sums)))].sum(1)
    return np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5]).tolist()


def row_of(goal: Goal, easy: dict[str, dict[str, float]], cells: list[dict]) -> tuple[str, ...]:
    """A goal beside what is easy and what the runs reach."""
    three, four = ([cell["stages"][n][goal.name] for cell in cells] for n in ("3", "4"))
    base = (easy[name].get(goal.name) for name in ("most frequent", "probe"))
    return (goal.text, f"{'<=' if goal.lower else '>='} {goal.must:.2f}", f"{goal.aim:.2f}",
            *("-" if value is None else f"{value:.3f}" for value in base),
            f"{np.mean(three):.3f}", f"{np.mean(four):.3f}",
            f"{(max if goal.lower else min)(four):.3f}")


def table(runs: list[dict], easy: dict[str, dict[str, float]], without: list[dict] = (),
          digits: list[dict] = ()) -> str:
    """The goals beside what is easy and what the runs reach: whole ones, those `without` the
    acoustic adapter, and those on `digits` alone, with which the held-out speaker of the first run
    counts."""
    rows = [("", "must", "aim", "most frequent", "probe", "stage 3", "stage 4",
             f"worst of {len(runs)}"), *(row_of(goal, easy, runs) for goal in GOALS)]
    before, after = ([affirmed(cell["stages"][n]) for cell in runs] for n in ("3", "4"))
    rows.append(("orders: what was not said is affirmed", "halved", "", "-", "-",
                 f"{np.mean(before):.3f}", f"{np.mean(after):.3f}", f"{max(after):.3f}"))
    if without:
        rows += [("", *[""] * 7), ("without the acoustic adapter", *[""] * 6,
                                   f"worst of {len(without)}")]
        rows += [row_of(goal, easy, without) for goal in GOALS]
    low, high = paired_bound(runs)
    lines = [columns(rows), f"false affirmations change by {low:+.3f} to {high:+.3f} (95 %, drawn "
             "by clip)"]
    if digits:
        rates = [cell["held_out"] for cell in (runs[0]["stages"]["4"], *digits)]
        lines.append(f"digits, {len(rates)} held-out speakers, all but the first in runs on digits "
                     f"alone: mean {np.mean(rates):.3f} (must 0.10, aim 0.04), worst "
                     f"{max(rates):.3f} (must 0.15, aim 0.08)")
    return "\n".join(lines)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="*", default=[ROOT / "runs" / "small"],
        help="folders of runs (default: runs/small)")
    add("--digits", action="store_true", help="the runs had digits alone")
    add("--table", action="store_true", help="measure nothing more; print what there is")
    add("--data", type=Path, default=DATA, help="the folder that has those of the corpora")
    add("--out", type=Path, default=ROOT / "tutorials" / "results" / "small",
        help="where cells go (default: tutorials/results/small)")
    for part in ("whisper", "llada"):
        add(f"--{part}", help="as of train.py")
    add("--cache-audio", type=Path, help="as of train.py")
    add("--device", default="auto", help="as of train.py")
    add("--threads", type=int, help="as of train.py")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if not args.table:
        torch.set_num_threads(args.threads or torch.get_num_threads())
        device, dtype, _ = choose_device(args.device, "float32")
        parts = locate_all({"whisper": args.whisper, "llada": args.llada}, "small")
        fingerprints = fingerprints_of(parts)
        model = weights.build(CONFIG, parts, device, dtype, FastLlada).eval()
        features = FeatureCache(model, device, dtype, True, args.cache_audio)
        if not (args.out / "easy.json").exists():
            write_json(args.out / "easy.json", easy(args.data, features))
        for run in args.runs:
            name, found = (("digits", measure_digits(run, features, fingerprints))
                           if args.digits else
                           ("run", measure(run, args.data, features, fingerprints)))
            write_json(args.out / f"{name}_{run.name}.json", {"run": run.name} | found)
    cells, digits = ([json.loads(path.read_text()) for path in sorted(args.out.glob(pattern))]
                     for pattern in ("run_*.json", "digits_*.json"))
    runs = [cell for cell in cells if "acoustic" in cell["audio"]]
    require(runs, f"{args.out}: no run on all the data is measured yet; name one")
    without = [cell for cell in cells if "acoustic" not in cell["audio"]]
    print(table(runs, json.loads((args.out / "easy.json").read_text()), without, digits))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
