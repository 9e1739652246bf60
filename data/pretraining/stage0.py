"""Stage 0: pretrained parts for the sizes that are trained from scratch, in the place of
Whisper-large-v3 and LLaDA-8B. Not part of DIFFA-2.

The parts do not need each other: of several processes the first makes the encoder and the second
the backbone.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from data import small, toy
from data.pretraining.backbone import MASKED_DIFFUSION, pretrain_backbone
from data.pretraining.config import PretrainConfig, pretrain_config
from data.pretraining.encoder import LabelledClips, pretrain_encoder
from data.pretraining.saves import Saves
from diffa2_mini import weights
from diffa2_mini.config import DATA, SIZES
from diffa2_mini.errors import require
from diffa2_mini.fast.device import choose_device
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.model import Diffa2Model
from diffa2_mini.noise import seed_of
from diffa2_mini.published.sources import locate_all
from diffa2_mini.training.checkpoint import differences
from diffa2_mini.training.files import save_tensors
from diffa2_mini.training.options import parse_arguments
from diffa2_mini.training.processes import World

PUBLISHED_PREFIX = {"whisper": "encoder.", "llada": "model.transformer."}
# what stage 0 uses of the flags of train.py
READ = {"stage", "size", "data", "parts", "out", "resume", "whisper", "llada", "steps",
        "batch_size", "lr", "warmup", "save_every", "device", "dtype", "threads", "seed", "workers"}


def save_part(module: nn.Module, part: str, path: Path, made_by: str,
              settings: dict | None = None) -> None:
    """Write a part in float16 under its published names, with the command that made it and the
    settings that decided it."""
    tensors = {PUBLISHED_PREFIX[part] + name: tensor.half()
               for name, tensor in module.state_dict().items()}
    save_tensors(path, tensors, {"format": "pt", "made_by": made_by,
                                 "settings": json.dumps(settings or {})})


def command(args: argparse.Namespace) -> str:
    """The command that makes a part, as its file names it."""
    dtype = f" --dtype {args.dtype}" * (args.dtype != "auto")
    return f"python train.py --stage 0 --size {args.size} --seed {args.seed}{dtype}"


def settings_of(args: argparse.Namespace, config: PretrainConfig, part: str) -> dict:
    """All that decides a part."""
    given = {"seed": args.seed, part: args.whisper if part == "whisper" else args.llada}
    if part == "whisper":
        given["data"] = args.data and str(args.data)
    settings = asdict(config) | given
    del settings["workers"]
    return settings


def is_made(args: argparse.Namespace, path: Path, settings: dict) -> bool:
    """Whether a part is there, where --resume goes on. Raises UserError if it is another's."""
    if not (args.resume and path.is_file()):
        return False
    metadata = weights.read_tensors(path, "a part of stage 0")[1]
    made_by, advice = metadata.get("made_by"), "leave out --resume to make it anew"
    require(made_by == command(args), f"{path}: was made by `{made_by}`; {advice}")
    wrong = differences(json.loads(metadata.get("settings", "{}")), settings)
    require(not wrong, f"{path}: was made with {'; '.join(wrong)}; {advice}")
    print(f"{path} is done")
    return True


def make_backbone(args: argparse.Namespace, model: Diffa2Model, config: PretrainConfig,
                  say: Callable) -> None:
    """Pretrain the backbone. On its way it is saved beside the place where it will be."""
    path = args.out / f"{args.size}_llada.safetensors"
    settings = settings_of(args, config, "llada")
    saves = Saves(path.with_suffix(".partial.safetensors"), args.save_every, args.resume,
                  model.config, settings)
    if not saves.path.is_file() and is_made(args, path, settings):
        return
    draw = small.texts() if args.size == "small" else MASKED_DIFFUSION.draw
    pretrain_backbone(model, config, args.seed, say, bool(args.llada),
                      replace(MASKED_DIFFUSION, draw=draw), saves)
    save_part(model.llada, "llada", path, command(args), settings)
    saves.remove()


def refuse_others(args: argparse.Namespace) -> None:
    """Raise UserError for a flag of train.py that would be ignored."""
    plain = vars(parse_arguments(["--stage", "0", "--size", args.size], ""))
    given = [f"--{name.replace('_', '-')}" for name, value in vars(args).items()
             if name not in READ and value != plain[name]]
    require(not given, f"{', '.join(given)}: of stages 1 to 4, not of stage 0; leave it out")


def run(args: argparse.Namespace, world: World) -> None:
    """Pretrain the parts that the flags of train.py ask for, from given weights if there are any,
    and write them to `args.out`. `args.data`, a folder with a stage0.json, is for the encoder
    alone. Raises UserError."""
    require(SIZES[args.size][0].from_scratch,
            f"--stage 0 makes parts of --size toy or small; for {args.size} they are published")
    refuse_others(args)
    require(args.size == "toy" or args.parts == "llada",
            "--size small hears with a published encoder; --parts llada makes its backbone")
    require(args.data is None or args.parts != "llada",
            "--parts llada learns from texts; leave out --data")
    config = pretrain_config(args)
    device, _, why = choose_device(args.device, config.dtype, trains=True)
    device = world.device(device)
    print(why)
    say = tqdm.write if world.is_main else partial(tqdm.write, file=sys.stderr)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(seed_of("weights", args.seed, 0))
    model = Diffa2Model(SIZES[args.size][0], llada=FastLlada).to(device)
    for part, start in (("whisper", args.whisper), ("llada", args.llada)):
        if start:
            path = locate_all({part: start}, args.size)[part]
            weights.load_part(getattr(model, part), part, path, device)
    encoder = args.out / f"{args.size}_whisper.safetensors"
    settings = settings_of(args, config, "whisper")
    if args.parts != "llada" and world.is_main and not is_made(args, encoder, settings):
        manifest = (args.data or toy.make_stage0(DATA / "toy")) / "stage0.json"
        clips = LabelledClips.load(manifest, model.config.audio,
                                   config.encoder_steps * config.encoder_batch)
        pretrain_encoder(model.whisper, clips, config, args.seed, say)
        save_part(model.whisper, "whisper", encoder, command(args), settings)
    makes_backbone = args.parts != "whisper" and args.data is None
    if makes_backbone and world.rank == min(1, world.size - 1):
        make_backbone(args, model, config, say)
