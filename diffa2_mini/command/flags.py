"""What the commands that ask a model share: the flags that name it and tell how it decodes."""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from ..config import SIZES, Config, DecodeConfig
from ..errors import require
from ..fast.device import DTYPES, choose_device
from ..fast.measure import keep_freed_memory
from ..fast.state import CACHES
from ..listen import Source, decode_settings, find_source
from ..published.sources import tokenizer_file
from ..quantize import KINDS


def add_model_flags(add: Callable) -> None:
    """Add the flags that `model_source`, `device_and_dtype` and `decode_config` read."""
    add("--checkpoint", type=Path, help="what train.py wrote (default: the size's own)")
    add("--size", choices=list(SIZES), help="default: the checkpoint's, or toy; with --diffa2 full")
    add("--whisper", help="weights of the encoder: a file, a folder or a hub name")
    add("--llada", help="weights of the backbone, likewise (default of both: the size's own)")
    add("--other-parts", action="store_true", help="--checkpoint may be of other frozen parts")
    add("--diffa2", help="published adapters and LoRA, likewise, instead of --checkpoint")
    add("--merge-lora", action="store_true", help="fold LoRA into the weights: faster, less exact")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="auto", choices=["auto", *DTYPES],
        help="of the frozen parts (auto: bfloat16 on CUDA and for diffa1 and full)")
    add("--quantize", choices=list(KINDS), help="keep their linear layers in 8 or 4 bits a weight")
    add("--gen-length", type=int, help="response tokens")
    add("--block-length", type=int, help="tokens per block")
    add("--steps", type=int, help="of a fixed schedule, instead of factor-based decoding")
    add("--factor", type=float, help="of factor-based decoding: larger is faster (full 1, toy 0.5)")
    add("--threshold", type=float, help="instead of --factor: commit what is more confident")
    add("--eos-threshold", type=float, help="end at once at an EOS that is more confident")
    add("--revise", type=float, help="mask once more what was committed less confidently")
    add("--cache", choices=CACHES, help="which keys and values outside the block to keep")
    add("--capture", action="store_true", default=None, help="on CUDA: replay a recorded step")
    add("--compile", action="store_true", default=None, help="of --capture: compile the step")
    add("--refresh", type=int, help="steps between renewals of a cache (default: once a block)")
    add("--temperature", type=float, help="0 takes the most probable tokens")
    add("--cfg", type=float, help="scale of classifier-free guidance, 0 is none")
    add("--remasking", choices=["confidence", "random"], help="what a fixed schedule commits first")
    add("--seed", type=int, help="of temperature and random remasking")


def decode_config(args: argparse.Namespace, default: DecodeConfig) -> DecodeConfig:
    """The size's way to decode, with what the command line changes (`decode_settings`)."""
    flags = {field.name: getattr(args, field.name) for field in dataclasses.fields(DecodeConfig)}
    given = {name: value for name, value in flags.items() if value is not None}
    return decode_settings(default, **given)


def model_source(args: argparse.Namespace) -> Source:
    """Where the model that the flags name is, as `find_source` tells."""
    sources = {part: getattr(args, part) for part in ("whisper", "llada", "diffa2")}
    return find_source(args.size, args.checkpoint, sources, args.other_parts)


def device_and_dtype(args: argparse.Namespace, config: Config) -> tuple[torch.device, torch.dtype]:
    """Where and in which precision to compute."""
    require(not (args.merge_lora and args.quantize),
            "--merge-lora and --quantize exclude each other; choose one")
    device, dtype, _ = choose_device(args.device, args.dtype, large=not config.from_scratch,
                                     quantize=args.quantize)
    if device.type == "cpu" and config.from_scratch:  # a downloaded model has no memory to spare
        keep_freed_memory()
    return device, dtype


def identify_model(source: Source, decode: DecodeConfig, dtype: torch.dtype, merge: bool,
                   quantize: str | None = None) -> str:
    """Which model answers, and how, in one line: answers that differ in it are not to be mixed.
    Files count by what they hold, not by where they are."""
    config, trained, paths, prints = source
    about = dataclasses.asdict(config) | {"decode": None}  # how to decode is told below
    if trained:
        about["audio of the prompt"] = trained.audio
    hashed = {"tokenizer": tokenizer_file(config, paths["llada"]).read_bytes(),
              "config": json.dumps(about, sort_keys=True).encode()}
    prints = prints | {name: hashlib.sha256(held).hexdigest() for name, held in hashed.items()}
    return ", ".join([config.size, *(f"{part} {prints[part][:16]}" for part in sorted(prints)),
                      "LoRA merged" if merge else "LoRA apart", str(dtype).removeprefix("torch."),
                      *([quantize] if quantize else []),
                      *(f"{name} {value}" for name, value in dataclasses.asdict(decode).items())])
