"""Stage 0: pretrained parts for the sizes that are trained from scratch, in the place of
Whisper-large-v3 and LLaDA-8B. Not part of DIFFA-2.

The parts do not need each other: of several processes the first makes the encoder and the second
the backbone.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from .. import weights
from ..command.script import progress
from ..config import SIZES, PretrainConfig
from ..errors import require
from ..fast.device import choose_device
from ..fast.llada import FastLlada
from ..model import Diffa2Model
from ..noise import seed_of
from ..published.sources import load_tokenizer, locate
from ..training.export import save_part
from ..training.processes import World
from .backbone import open_and_lettered, pretrain_backbone
from .encoder import LabelledClips, pretrain_encoder


@dataclass(frozen=True)
class Options:
    """What to make, of what, and where. Weights of a part are where its training starts."""

    size: str
    parts: str  # whisper, llada or both
    out: Path
    data: Path | None  # a folder with a stage0.json, which trains the encoder alone
    whisper: str | None
    llada: str | None
    device: str
    threads: int | None
    seed: int
    pretrain: PretrainConfig

    @property
    def made_by(self) -> str:
        """The command, for the files that it makes."""
        return f"python train.py --stage 0 --size {self.size} --seed {self.seed}"


def make_encoder(options: Options, model: Diffa2Model, folder: Path, start: Path | None,
                 say: Callable) -> None:
    """Pretrain the encoder on the clips of `folder`/stage0.json, and save it."""
    pretrain, device = options.pretrain, model.whisper.conv1.weight.device
    if start:
        weights.load_part(model.whisper, "whisper", start, device)
    clips = LabelledClips.load(folder / "stage0.json", model.config.audio,
                               partial(progress, desc="reading clips"),
                               most=pretrain.encoder_steps * pretrain.encoder_batch)
    steps = pretrain_encoder(model.whisper, clips, pretrain, options.seed,
                             partial(progress, desc="encoder"))
    for step, loss, right in steps:
        say(f"encoder step {step}: loss {loss:.3f}, frames right {right:.3f}")
    save_part(model.whisper, "whisper",
                      options.out / f"{options.size}_whisper.safetensors", options.made_by)


def make_backbone(options: Options, model: Diffa2Model, sample: Callable, start: Path | None,
                  say: Callable) -> None:
    """Pretrain the backbone on texts, and save it. From given weights only the last part of its
    training, with silences, goes on."""
    if start:
        weights.load_part(model.llada, "llada", start, model.llada.wte.weight.device)
    first_step = options.pretrain.backbone_steps if start else 0
    steps = pretrain_backbone(model, load_tokenizer(model.config), sample,
                              options.pretrain, options.seed, progress, first_step=first_step)
    for step, loss, accuracy in steps:
        say(f"backbone step {step}: loss {loss:.3f}")
        for form, by_type in accuracy.items():
            plain, lettered = open_and_lettered(by_type)
            say(f"  on {form}: open {plain:.3f}, lettered {lettered:.3f}")
    for form, by_type in accuracy.items():
        say(f"{form}: " + "  ".join(f"{type} {value:.2f}" for type, value in by_type.items()))
    save_part(model.llada, "llada", options.out / f"{options.size}_llada.safetensors",
                      options.made_by)


def run(options: Options, world: World, make_clips: Callable[[], Path], sample: Callable) -> None:
    """Pretrain the parts that are asked for and write them to `options.out`. Without
    `options.data`, `make_clips()` makes its folder. `sample` is that of `pretrain_backbone`. Raises
    UserError."""
    config = SIZES[options.size][0]
    require(config.from_scratch,
            f"--stage 0 makes parts of --size toy or small; for {options.size} they are published")
    require(options.data is None or options.parts != "llada",
            "--parts llada learns from texts; leave out --data")
    device, _, why = choose_device(options.device, "float32")
    device = world.device(device)
    print(why)
    say = tqdm.write if world.is_main else partial(tqdm.write, file=sys.stderr)
    starts = {part: given and locate(given, part, options.size)
              for part, given in (("whisper", options.whisper), ("llada", options.llada))}
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(seed_of("weights", options.seed, 0))
    model = Diffa2Model(config, llada=FastLlada).to(device)
    if options.parts != "llada" and world.is_main:
        folder = options.data or make_clips()
        make_encoder(options, model, folder, starts["whisper"], say)
    makes_backbone = options.parts != "whisper" and options.data is None
    if makes_backbone and world.rank == min(1, world.size - 1):
        make_backbone(options, model, sample, starts["llada"], say)
