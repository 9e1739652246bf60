"""ToyBench: a benchmark of the toy world in the file format of MMAU, made by a fixed seed. Nothing
is downloaded.

    python data/toybench.py                        # data/toy: toybench.json, premises.json, clips
    python -m diffa2_mini.evaluate --benchmark toy

premises.json is a manifest: questions about the same clips, half of them with a false premise, in
words and a wording that stage 4's pairs never have. It tells what stage 4 is for.

Every question is asked about clips of held-out scenes: speech, sound and music (`task`), perception
and reasoning (`category`), with its type as `sub-category`. MMAU's `difficulty` says how it is
asked here: `free`, where the choices are never shown, or `lettered`. To perceive is to name what is
there; to reason is to count, to order, or to find the only word that fits.
"""

import sys
from pathlib import Path

# so that this file runs as a script
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

from collections import Counter

import numpy as np

from data import toy, toy_text
from data.toy_sound import Scene
from diffa2_mini.command.script import Parser
from diffa2_mini.config import DATA
from diffa2_mini.evaluate.benchmarks import FREE

SEED = 0
REASONING = ("count", "first", "last", "after", "premise", "fits")
N_CHOICES = 4  # of a free question, at most
N_PER_TYPE = 110  # questions of a type, at most, and as many lettered ones
N_PREMISES = 100  # questions of a type in premises.json, at most


def entry(row: dict, question: toy_text.Question, rng: np.random.Generator) -> dict:
    """A question about the clip of a manifest's row, in MMAU's fields."""
    type, *lettered = question.type.split("+")
    if lettered:  # their letters are taken off: who asks puts them on again
        text, *lines = question.instruction.split("\n")
        choices, answer = [line[3:] for line in lines], question.answer[3:]
    else:
        text, answer = question.instruction, question.answer
        choices = rng.permutation([answer, *question.wrong[:N_CHOICES - 1]]).tolist()
    asked = "lettered" if lettered else FREE
    return {
        "id": f"{row['audio_id']}_{type}_{asked}", "audio_id": row["audio_filepath"],
        "question": text, "choices": choices, "answer": answer, "task": row["domain"],
        "category": "reasoning" if type in REASONING else "perception", "sub-category": type,
        "difficulty": asked}


def choose(clips: list[tuple[Scene, dict]], rng: np.random.Generator
           ) -> list[tuple[dict, toy_text.Question]]:
    """Questions about clips, of each type some, with the rows of their clips and in their order."""
    asked = [(row, question) for scene, row in clips
             for question in toy_text.questions(scene, rng) if question.wrong]
    counts, chosen = Counter(), []
    for i in rng.permutation(len(asked)):
        type = asked[i][1].type
        counts[type] += 1
        if counts[type] <= N_PER_TYPE:
            chosen.append(i)
    return [asked[i] for i in sorted(chosen)]


def make(folder: Path, seed: int = SEED) -> Path:
    """Make the benchmark in `folder`, and premises.json beside it, unless they are there; returns
    the benchmark's file."""
    file, premises = (Path(folder) / f"{name}.json" for name in ("toybench", "premises"))
    if not (file.exists() and premises.exists()):
        rng = np.random.default_rng([seed, 98])
        clips = toy.make_clips(file.parent, "toybench", seed)
        toy.write_json(file, [entry(row, question, rng) for row, question in choose(clips, rng)])
        toy.write_json(premises, toy.premises(clips, rng, "unpaired", N_PREMISES))
    return file


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=DATA / "toy",
                        help="where it goes (default: data/toy)")
    out = parser.parse_args(argv).out
    kept = ", as it was: delete it to make it anew" if (out / "toybench.json").exists() else ""
    print(f"ToyBench is {make(out)}{kept}")


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
