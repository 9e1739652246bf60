"""The caches on the shipped toy model: accuracy, forward passes and seconds."""

import dataclasses
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

from .. import weights
from ..config import SIZES, DecodeConfig
from ..data import Example, load_examples
from ..errors import require
from ..evaluate.answers import answer
from ..evaluate.scoreboard import report
from ..fast.llada import FastLlada
from ..fast.state import BLOCK_STATES
from ..published.sources import load_tokenizer
from ..training.checkpoint import load_checkpoint
from ..training.features import FeatureCache
from .timing import Row, take_turns


def compare_caches(ask: Callable, asked: list[Example], decode: DecodeConfig, batch_size: int,
                   runs: int, device: torch.device) -> list[Row]:
    """A row for each cache. `ask` gives the replies to `asked` and the number of forward passes."""
    found = {}

    def answering(cache: str) -> Callable:
        def run():
            found[cache] = ask(asked, dataclasses.replace(decode, cache=cache), batch_size)
        return run

    case = (f"toy, blocks of {decode.block_length}, f = {decode.factor:g}, "
            f"{len(asked)} questions, {batch_size} at once")
    rows = take_turns(case, {cache: answering(cache) for cache in BLOCK_STATES}, runs, device)
    for row in rows:
        replies, n_passes = found[row.variant]
        row.more["forward passes"] = n_passes
        row.ratio = report(asked, replies).figures["overall"]
        row.of = f"right, {n_passes} forward passes"
    return rows


def toy(data: Path, runs: int, device: torch.device) -> list[Row]:
    """The shipped toy model on its validation questions: every cache at several factors of parallel
    decoding, 64 questions at once; and on every tenth question one at a time, as the model decodes
    by default."""
    require((data / "validation.json").is_file(),
            f"{data}: expected the toy world, found none; in a clone of the repository "
            "'python data/toy.py' makes it, or name it: --data")
    trained = load_checkpoint(weights.SHIPPED["diffa2"])
    config = trained.config
    model = weights.build(config, device=device, llada=FastLlada).eval()
    weights.restore(model, trained.model, "the shipped checkpoint")
    tokenizer = load_tokenizer(config)
    features = FeatureCache(model, device, torch.float32, keep=True)
    examples = load_examples(data / "validation.json", SIZES["toy"][1][2], config, False, print)
    features.prepare([example.path for example in examples], iter)

    def ask(asked: list[Example], decode: DecodeConfig, batch_size: int) -> tuple[list[str], int]:
        return answer(model, tokenizer, features, asked, trained.audio, decode, batch_size)

    rows = []
    for block, factor in product((8, 16), (0.25, 0.5, 1.0, 2.0)):
        decode = dataclasses.replace(config.decode, block_length=block, factor=factor)
        rows += compare_caches(ask, examples, decode, 64, runs, device)
    decode = dataclasses.replace(config.decode, block_length=16)
    return rows + compare_caches(ask, examples[::10], decode, 1, runs, device)
