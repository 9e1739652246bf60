"""Stage 0: pretrained parts for the sizes that are trained from scratch, in the place of
Whisper-large-v3 and LLaDA-8B. Not part of DIFFA-2.

The parts do not need each other: of several processes the first makes the encoder and the second
the backbone.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data import toy
from data.pretraining.backbone import open_and_lettered, pretrain_backbone
from data.pretraining.config import PretrainConfig, pretrain_config
from data.pretraining.encoder import LabelledClips, pretrain_encoder
from diffa2_mini import weights
from diffa2_mini.command.script import progress
from diffa2_mini.config import DATA, SIZES
from diffa2_mini.errors import require
from diffa2_mini.fast.device import choose_device
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.model import Diffa2Model
from diffa2_mini.noise import seed_of
from diffa2_mini.published.sources import load_tokenizer, locate
from diffa2_mini.training.export import save_part
from diffa2_mini.training.processes import World


def make_encoder(model: Diffa2Model, folder: Path, config: PretrainConfig, seed: int,
                 say: Callable) -> None:
    """Pretrain the encoder on the clips of `folder`/stage0.json."""
    clips = LabelledClips.load(folder / "stage0.json", model.config.audio,
                               partial(progress, desc="reading clips"),
                               most=config.encoder_steps * config.encoder_batch)
    steps = pretrain_encoder(model.whisper, clips, config, seed, partial(progress, desc="encoder"))
    for step, loss, right in steps:
        say(f"encoder step {step}: loss {loss:.3f}, frames right {right:.3f}")


def make_backbone(model: Diffa2Model, config: PretrainConfig, seed: int, goes_on: bool,
                  say: Callable) -> None:
    """Pretrain the backbone on texts; if it `goes_on`, only the last part, with silences."""
    first_step = config.backbone_steps if goes_on else 0
    steps = pretrain_backbone(model, load_tokenizer(model.config), toy.text_example, config, seed,
                              progress, first_step=first_step)
    for step, loss, accuracy in steps:
        say(f"backbone step {step}: loss {loss:.3f}")
        for form, by_type in accuracy.items():
            plain, lettered = open_and_lettered(by_type)
            say(f"  on {form}: open {plain:.3f}, lettered {lettered:.3f}")
    for form, by_type in accuracy.items():
        say(f"{form}: " + "  ".join(f"{type} {value:.2f}" for type, value in by_type.items()))


def run(args: argparse.Namespace, world: World) -> None:
    """Pretrain the parts that the flags of train.py ask for, from given weights if there are any,
    and write them to `args.out`. `args.data`, a folder with a stage0.json, is for the encoder
    alone. Raises UserError."""
    require(SIZES[args.size][0].from_scratch,
            f"--stage 0 makes parts of --size toy or small; for {args.size} they are published")
    require(args.data is None or args.parts != "llada",
            "--parts llada learns from texts; leave out --data")
    device, _, why = choose_device(args.device, "float32")
    device = world.device(device)
    print(why)
    say = tqdm.write if world.is_main else partial(tqdm.write, file=sys.stderr)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(seed_of("weights", args.seed, 0))
    model = Diffa2Model(SIZES[args.size][0], llada=FastLlada).to(device)
    for part, start in (("whisper", args.whisper), ("llada", args.llada)):
        if start:
            path = locate(start, part, args.size)
            weights.load_part(getattr(model, part), part, path, device)

    def save(part: str) -> None:
        save_part(getattr(model, part), part, args.out / f"{args.size}_{part}.safetensors",
                  f"python train.py --stage 0 --size {args.size} --seed {args.seed}")

    config = pretrain_config(args)
    if args.parts != "llada" and world.is_main:
        folder = args.data or toy.make_stage0(DATA / "toy")
        make_encoder(model, folder, config, args.seed, say)
        save("whisper")
    makes_backbone = args.parts != "whisper" and args.data is None
    if makes_backbone and world.rank == min(1, world.size - 1):
        make_backbone(model, config, args.seed, args.llada is not None, say)
        save("llada")
