"""How sure `--size small` is of answers that it has no ground for.

    python tutorials/small_confidence.py                         # the shipped weights
    python tutorials/small_confidence.py --clips german.wav      # and another language

It is asked about the slots of an order where somebody orders (the test clips of data/orders),
where somebody reads about something else (those of data/people), in clips that are named, in
silence, and in noise. The confidence of an answer is that of its least sure token, the EOS
included, when it was committed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs as a script

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import argparse

import numpy as np
import torch

from data import orders
from diffa2_mini import Diffa2
from diffa2_mini.command.script import Parser
from diffa2_mini.command.table import columns
from diffa2_mini.config import DATA
from diffa2_mini.listen import Answer, Clip
from tutorials.small_goals import examples_of

N_CLIPS = 40  # of each corpus
SECONDS = 4  # of silence, and of noise
QUESTIONS = [orders.WORDINGS[slot][0] for slot in orders.SLOTS]


def confidence(answer: Answer, eos: int) -> float:
    """That of the answer's least sure token up to the first EOS, when it was committed."""
    length = (answer.tokens + [eos]).index(eos) + 1
    when_committed = torch.zeros_like(answer.history[0].confidence[0], dtype=torch.float32)
    for step in answer.history:
        when_committed = torch.where(step.committed[0], step.confidence[0].float(), when_committed)
    return float(when_committed[:length].min())


def clips_of(data: Path, corpus: str) -> list[Clip]:
    """Some of the test clips of a corpus, each once. Raises UserError."""
    clips = [*dict.fromkeys(example.path for example in examples_of(data / corpus, "test"))]
    return clips[::max(1, len(clips) // N_CLIPS)][:N_CLIPS]


def groups_of(args: argparse.Namespace, rate: int) -> dict[str, list[Clip]]:
    """The clips to ask about, by what is in them."""
    noise = np.random.default_rng(0).normal(0, 0.01, SECONDS * rate)
    return {"an order": clips_of(args.data, "orders"), "reading": clips_of(args.data, "people"),
            "the clips named": args.clips,
            "silence": [(np.zeros(SECONDS * rate, np.float32), rate)],
            "noise": [(noise.astype(np.float32), rate)]}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--clips", type=Path, nargs="+", default=[], help="clips of something else")
    add("--data", type=Path, default=DATA, help="the folder that has those of the corpora")
    add("--checkpoint", help="as of sample.py (default: the shipped one)")
    for part in ("whisper", "llada"):
        add(f"--{part}", help="as of train.py")
    add("--device", default="auto", help="as of train.py")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    diffa2 = Diffa2.from_pretrained(
        "small", checkpoint=args.checkpoint, device=args.device,
        sources={"whisper": args.whisper, "llada": args.llada})
    rows = [("what is in the clip", "answers", "mean confidence", "above 0.9", '"none"')]
    for name, clips in groups_of(args, diffa2.config.audio.sample_rate).items():
        answers = [answer for clip in clips
                   for answer in diffa2.ask([clip] * len(QUESTIONS), QUESTIONS)]
        sure = np.array([confidence(answer, diffa2.tokenizer.eos_id) for answer in answers])
        none = [answer.text.strip() == orders.NONE for answer in answers]
        if answers:
            figures = (sure.mean(), (sure > 0.9).mean(), np.mean(none))
            rows.append((name, str(len(answers)), *(f"{figure:.2f}" for figure in figures)))
    print(columns(rows))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
