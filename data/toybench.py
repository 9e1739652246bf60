"""ToyBench: a benchmark of the toy world in the file format of MMAU, made by a fixed seed. Nothing
is downloaded.

    python data/toybench.py                        # data/toy/toybench.json and its 180 clips
    python -m diffa2_mini.evaluate --benchmark toy

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

import numpy as np

from data import toy, toy_text
from diffa2_mini.command.script import Parser
from diffa2_mini.config import DATA
from diffa2_mini.evaluate.benchmarks import FREE

SEED = 0
REASONING = ("count", "first", "last", "after", "premise", "fits")
N_CHOICES = 4  # of a free question, at most


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


def make(folder: Path, seed: int = SEED) -> Path:
    """Make the benchmark in `folder`, unless it is there; returns its file."""
    file = Path(folder) / "toybench.json"
    if not file.exists():  # the last file written
        rng = np.random.default_rng([seed, 98])
        clips = toy.make_clips(file.parent, "toybench", seed)
        asked = [(row, question) for scene, row in clips
                 for question in toy_text.questions(scene, rng) if question.wrong]
        toy.write_json(file, [entry(row, question, rng) for row, question in asked])
    return file


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=DATA / "toy",
                        help="where it goes (default: data/toy)")
    print(f"ToyBench is {make(parser.parse_args(argv).out)}")


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
