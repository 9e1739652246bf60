"""The curriculum of `--size small` without its acoustic adapter.

    python tutorials/small_without.py --data data/small --dtype bfloat16 --out runs/without
    python tutorials/small_goals.py runs/without       # measure it, beside the whole model

Flags are those of train.py. Stages 2 to 4 train all else, and the prompt has semantic embeddings
alone: the encoder's final states, and no other depth.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs as a script

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

from dataclasses import replace

import train
from diffa2_mini.config import SIZES, StageConfig


def semantic_alone(stage: StageConfig) -> StageConfig:
    """The stage without the acoustic adapter, which stage 1 does not have anyway."""
    if stage.number == 1:
        return stage
    return replace(stage, trains=tuple(part for part in stage.trains if part != "acoustic"),
                   audio=("semantic",))


def main(argv: list[str]) -> None:
    config, stages = SIZES["small"]
    SIZES["small"] = config, {n: semantic_alone(stage) for n, stage in stages.items()}
    train.main([*argv, "--size", "small"])


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
