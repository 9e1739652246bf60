"""The caches on the shipped toy model: accuracy, forward passes and seconds."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from ..config import SIZES
from ..data import load_examples
from ..errors import require
from ..evaluate.answers import Respondent
from ..evaluate.scoreboard import report
from ..fast.state import CACHES
from ..listen import Diffa2
from ..training.features import FeatureCache
from .timing import Row, take_turns


def toy(data: Path, runs: int, device: torch.device) -> Iterator[Row]:
    """The shipped toy model on its validation questions: every cache at several factors of parallel
    decoding, 64 questions at once; and on every tenth question one at a time, as the model decodes
    by default."""
    require((data / "validation.json").is_file(),
            f"{data}: expected the toy world, found none; in a clone of the repository "
            "'python data/toy.py' makes it, or name it: --data")
    diffa2 = Diffa2.from_pretrained("toy", device=device.type, dtype="float32")
    config, features = diffa2.config, FeatureCache(diffa2.model, device, diffa2.dtype, keep=True)
    examples = load_examples(data / "validation.json", SIZES["toy"][1][2], config)
    features.prepare([example.path for example in examples], iter)
    settings = [(block, factor, examples, 64)
                for block, factor in product((8, 16), (0.25, 0.5, 1.0, 2.0))]
    for block, factor, asked, at_once in [*settings, (16, config.decode.factor, examples[::10], 1)]:
        ways = {}
        for cache in CACHES:
            decode = replace(config.decode, block_length=block, factor=factor, cache=cache)
            respondent = Respondent(features, diffa2.tokenizer, diffa2.parts, decode)
            ways[cache] = partial(respondent.answer, asked, at_once)
        case = f"toy, blocks of {block}, f = {factor:g}, {len(asked)} questions, {at_once} at once"
        for row, (replies, n_passes) in zip(*take_turns(case, ways, runs, device)):
            row.ratio = report(asked, replies).figures["overall"]
            row.of = f"right, {n_passes} forward passes"
            yield row
