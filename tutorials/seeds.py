"""Does the toy learn with every seed, and what does stage 4 repair? Runs of train.py, measured.

    python tutorials/seeds.py                 # seeds 0 to 9, hours; stop and repeat it at will
    python tutorials/seeds.py --seeds 3 4     # some of them
    python tutorials/seeds.py --table         # measure nothing more; the table, so far
    python tutorials/seeds.py --out runs/lr --work runs/lr -- --lr 1e-3   # with flags of train.py

A cell is a seed: what its run answers to ToyBench and to premises.json (data/toybench.py) after
stages 1, 3 and 4. It is written to tutorials/results/seeds when it is done. Runs are kept in
runs/seeds. What was made of other settings, data or weights is refused, and not mixed in. Several
processes may make a seed each, once `python data/toy.py` and `python data/toybench.py` have made
the data.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs as a script

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import argparse
import dataclasses
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from string import ascii_uppercase

import numpy as np
import torch

from data import toy, toybench
from data.toy_sound import DIGITS, SOUNDS
from data.toy_text import ABOUT_X
from diffa2_mini import weights
from diffa2_mini.command.script import Parser
from diffa2_mini.config import DATA, SIZES
from diffa2_mini.data import Example, load_examples
from diffa2_mini.errors import require
from diffa2_mini.evaluate import scoreboard
from diffa2_mini.evaluate.answers import Respondent
from diffa2_mini.evaluate.benchmarks import FREE, BenchmarkQuestion, load_questions
from diffa2_mini.evaluate.scoring import is_right
from diffa2_mini.fast.device import choose_device
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.published.sources import load_tokenizer, locate_all
from diffa2_mini.training import options
from diffa2_mini.training.checkpoint import load_checkpoint
from diffa2_mini.training.features import FeatureCache
from tutorials.claims_lab import made_of, write_json
from tutorials.seeds_table import table

TRUE, FALSE = ("present", "after"), ("absent", "premise")  # types of question, by their premise


def as_example(question: BenchmarkQuestion) -> Example:
    """A question of ToyBench as one of a manifest; all domains are one."""
    type, answer = question.row["sub-category"], question.answer
    if question.row["difficulty"] != FREE:
        letter = ascii_uppercase[question.choices.index(answer)]
        type, answer = f"{type}+abcd", f"{letter}. {answer}"
    return Example(question.audio, question.prompt, answer, "", type, "all")


def share(examples: list[Example], replies: list[str], types: Sequence[str],
          judge: Callable = is_right) -> float:
    """The share of the questions of `types` whose reply is right."""
    return float(np.mean([judge(example, reply) for example, reply in zip(examples, replies)
                          if example.type in types]))


def affirms(example: Example, reply: str) -> bool:
    """Whether a reply about what is not there says yes, or names sounds or digits."""
    return bool(reply.strip()) and {*reply.split()} <= {"yes", *SOUNDS, *DIGITS}


def measure(respondent: Respondent, questions: list[Example], premises: list[Example]) -> dict:
    """The figures of a model that was trained on questions."""
    replies, _ = respondent.answer(questions)
    report = scoreboard.report(questions, replies)
    types = {type: value for (_, type), value in report.accuracy.items()}
    other = share(questions, replies, [type for type in types if type not in ABOUT_X])
    replies, _ = respondent.answer(premises)
    true, false = (share(premises, replies, part) for part in (TRUE, FALSE))
    return report.figures | {
        "other": other, "true": true, "false": false, "balanced": (true + false) / 2,
        "affirmed": share(premises, replies, FALSE, affirms), "types": types,
        "premises": {type: share(premises, replies, (type,)) for type in ABOUT_X}}


def switched_on(fields: list[tuple[str, object]]) -> dict[str, object]:
    """Settings without the pieces of a batch, which change nothing but speed, and without switches
    that are off, of which a later version may have more."""
    return {name: value for name, value in fields if value is not False and name != "micro_batch"}


class Curriculum:
    """What all runs share: the flags of train.py, the data and the frozen parts."""

    def __init__(self, argv: list[str]):
        flags = options.parse_arguments(argv, __doc__)
        require(flags.stage == "all", "expected flags of all four stages, got --stage")
        self.argv, self.config = argv, SIZES[flags.size][0]
        self.stages = {number: options.stage_config(flags, number) for number in flags.stages}
        self.data, self.cache = flags.data or toy.make_world(DATA / "toy"), flags.cache_audio
        self.questions = [*map(as_example, load_questions("toy", toybench.make(self.data)))]
        self.premises = load_examples(self.data / "premises.json", self.stages[2], self.config)
        self.parts = locate_all({"whisper": flags.whisper, "llada": flags.llada}, flags.size)
        self.device, self.dtype, _ = choose_device(flags.device, flags.dtype, large=False)
        self.tokenizer = load_tokenizer(self.config, flags.llada)
        torch.set_num_threads(flags.threads or torch.get_num_threads())
        names = ["validation", "toybench", "premises", *(s.data for s in self.stages.values())]
        settings = [dataclasses.asdict(each, dict_factory=switched_on)
                    for each in (self.config, *self.stages.values())]
        self.made_of = made_of((settings, self.dtype), self.parts,
                               [self.data / f"{name}.json" for name in names])

    def train(self, seed: int, run: Path) -> None:
        """Train all stages into the folder `run`, or go on there."""
        command = [sys.executable, str(ROOT / "train.py"), *self.argv, "--seed", str(seed),
                   "--out", str(run), "--resume"]
        code = subprocess.call(command)
        require(code == 0, f"seed {seed}: train.py ended with {code}; see above, and go on by the "
                           "same command")

    def measure(self, run: Path) -> dict[str, dict]:
        """The figures of a run's stages 1, 3 and 4, by stage."""
        model = weights.build(self.config, self.parts, self.device, self.dtype, FastLlada)
        features = FeatureCache(model, self.device, self.dtype, True, self.cache)
        said, found = [each for each in self.questions if each.type == "asr"], {}
        for number in (1, 3, 4):
            path = run / f"stage{number}.safetensors"
            saved = load_checkpoint(path)
            weights.restore(model, saved.model, str(path))
            model.eval()
            respondent = Respondent(features, self.tokenizer, saved.audio, self.config.decode)
            if number == 1:  # which has learnt transcripts alone
                report = scoreboard.report(said, respondent.answer(said)[0])
                found["1"] = {"wer": report.figures["wer"]}
            else:
                found[str(number)] = measure(respondent, self.questions, self.premises)
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        *_, ranked = [row for row in rows if "reward_accuracy" in row]
        found["4"]["reward_accuracy"] = ranked["reward_accuracy"]
        return found


# -------------------------------------------------------------------------------------- the command


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and those of train.py."""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--seeds", dest="seed", type=int, nargs="+", default=[*range(10)], help="default: 0 to 9")
    add("--table", action="store_true", help="measure nothing more; print what there is")
    add("--out", type=Path, default=ROOT / "tutorials" / "results" / "seeds",
        help="where cells go (default: tutorials/results/seeds)")
    add("--work", type=Path, default=ROOT / "runs" / "seeds",
        help="where runs go (default: runs/seeds)")
    for name in ("device", "dtype", "threads"):
        add(f"--{name}", help="as of train.py")
    args = parser.parse_args(argv[:at])
    same = [f"--{name}={value}" for name in ("device", "dtype", "threads")
            if (value := getattr(args, name))]
    return args, [*argv[at + 1:], *same]


def main(argv: list[str]) -> None:
    args, argv = parse_arguments(argv)
    paths = {seed: args.out / f"{seed}.json" for seed in args.seed}
    missing = {seed: path for seed, path in paths.items() if not (args.table or path.exists())}
    curriculum = None if args.table else Curriculum(argv)
    cells = [json.loads(path.read_text()) for path in paths.values() if path.exists()]
    known = {cell["made_of"] for cell in cells} | ({curriculum.made_of} if curriculum else set())
    require(len(known) <= 1, f"{args.out}: holds cells of other settings, data or weights; choose "
                             "another --out and --work")
    print(f"{len(cells)} of {len(paths)} seeds are measured")
    for seed, path in missing.items():
        began = time.perf_counter()
        curriculum.train(seed, args.work / str(seed))
        stages = curriculum.measure(args.work / str(seed))
        cells.append({"seed": seed, "made_of": curriculum.made_of, "stages": stages})
        write_json(path, cells[-1])
        seconds = time.perf_counter() - began
        print(f"seed {seed}: {stages['4']['overall']:.3f} right ({seconds:.0f} s)", flush=True)
    require(cells, f"{args.out}: no seed is measured yet; leave out --table")
    print(table(sorted(cells, key=lambda cell: cell["seed"])))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
