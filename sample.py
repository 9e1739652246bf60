"""Ask DIFFA-2 about a recording.

    python sample.py data/clips/three_one_four.wav
    python sample.py clip.wav --prompt "How many digits are there?" --watch
    python sample.py *.wav --json --checkpoint runs/mine/stage4.safetensors
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from diffa2_mini import checkpoint, show, weights
from diffa2_mini.audio import duration, encoder_frames, load_audio, log_mel
from diffa2_mini.config import SIZES, Config, DecodeConfig, Parser, require, run_script
from diffa2_mini.decode import generate
from diffa2_mini.model import Diffa2, Reader
from diffa2_mini.parallel import DTYPES, choose_device, keep_freed_memory
from diffa2_mini.tokenizer import Tokenizer


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("clips", nargs="+", type=Path, metavar="CLIP", help="wav, flac, ogg or mp3, of any rate")
    add("--prompt", help="the question (default: transcribe)")
    add("--checkpoint", type=Path, help="what train.py wrote (default: the size's own)")
    add("--size", choices=list(SIZES), help="default: that of the checkpoint, or toy")
    add("--whisper", help="weights of the encoder: a file, a folder, or a hub name (default: the size's own)")
    add("--llada", help="weights of the backbone, likewise")
    add("--diffa2", help="published adapters and LoRA, likewise, instead of --checkpoint")
    add("--chunk", action="store_true", help="answer on each part of a clip that is longer than the model hears")
    add("--json", action="store_true", help="print a line of JSON for each clip")
    add("--watch", action="store_true", help="show the answer forming; ░ is a mask, bright is confident")
    add("--gen-length", type=int, help="response tokens")
    add("--block-length", type=int, help="tokens per block")
    add("--steps", type=int, help="a fixed schedule of so many steps, instead of factor-based decoding")
    add("--factor", type=float, help="of factor-based parallel decoding: larger is faster (default 1)")
    add("--threshold", type=float, help="commit what is more confident than this, instead of factor-based decoding")
    add("--cache", choices=["none", "prefix", "dual"], help="what to remember of the keys and values outside the block")
    add("--capture", action="store_true", default=None, help="on CUDA: record the cached step as a graph, and replay it")
    add("--refresh", type=int, help="steps between readings of the whole sequence (default: once a block)")
    add("--temperature", type=float, help="0 takes the most probable tokens")
    add("--cfg", type=float, help="scale of classifier-free guidance, 0 is none")
    add("--remasking", choices=["confidence", "random"], help="what a fixed schedule commits first")
    add("--seed", type=int, help="of temperature and random remasking")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="auto", choices=["auto", *DTYPES])
    return parser.parse_args(argv)


def decode_config(args: argparse.Namespace, default: DecodeConfig) -> DecodeConfig:
    """The size's way to decode, with what the command line changes. Asking for steps, for random remasking or for a
    threshold is asking for no factor."""
    names = [field.name for field in dataclasses.fields(DecodeConfig)]
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    require(sum(value is not None for value in (args.steps, args.factor, args.threshold)) <= 1,
            "--steps, --factor and --threshold exclude each other; choose one")
    if args.steps is not None or args.threshold is not None or args.remasking == "random":
        changes.setdefault("factor", None)
    if args.gen_length is not None:
        fits = args.gen_length % default.block_length == 0
        changes.setdefault("block_length", default.block_length if fits else args.gen_length)
        changes.setdefault("steps", args.gen_length)
    return dataclasses.replace(default, **changes)


def find(args: argparse.Namespace) -> tuple[Config, checkpoint.Checkpoint | None, dict[str, Path]]:
    """The config, a checkpoint of ours if there is one, and where the other weights are. Nothing large is read yet."""
    size = args.size or ("full" if args.diffa2 else "toy")
    require(not (args.diffa2 and args.checkpoint), "--diffa2 and --checkpoint exclude each other; choose one")
    given = {"whisper": args.whisper, "llada": args.llada}
    if args.diffa2 or not (args.checkpoint or SIZES[size][0].from_scratch):
        return SIZES[size][0], None, weights.locate_all(given | {"diffa2": args.diffa2}, size)
    path = args.checkpoint or Path(weights.SOURCES[size]["diffa2"])
    require(path.is_file(), f"{path}: expected a checkpoint, found none; make one with 'python train.py --size {size}'")
    trained = checkpoint.load(path)
    found = trained.config.size
    require(args.size in (None, found), f"{path}: is of size {found}, not {args.size}; leave --size out")
    return trained.config, trained, weights.locate_all(given, found)


def load_model(config: Config, trained: checkpoint.Checkpoint | None, paths: dict[str, Path], device: torch.device,
               dtype: torch.dtype) -> tuple[Diffa2, tuple[str, ...]]:
    """The model, and what it splices into the prompt."""
    model = weights.build(config, paths["whisper"], paths["llada"], device, dtype)
    if trained:
        checkpoint.restore(model, trained.model, "the checkpoint")
    parts = trained.audio if trained else weights.load_diffa2(model, paths["diffa2"])
    return model.eval().to(device), parts


def parts_of_clip(path: Path, config: Config, chunk: bool) -> list:
    """The clip [samples] as the model can hear it: whole; or its first part, or each part, if it is too long."""
    audio = config.audio
    samples = load_audio(path, audio.sample_rate, None if chunk else audio.max_seconds + 0.1)
    if len(samples) <= audio.max_samples:
        return [samples]
    if chunk:
        return [samples[i:i + audio.max_samples] for i in range(0, len(samples), audio.max_samples)]
    print(f"note: {path} is longer than the {audio.max_seconds} s that the model hears; this answers on its beginning "
          "(--chunk answers on each part)", file=sys.stderr)
    return [samples[:audio.max_samples]]


@torch.no_grad()
def ask(model: Diffa2, parts: tuple[str, ...], tokenizer: Tokenizer, samples: np.ndarray, prompt: str,
        decode: DecodeConfig, device: torch.device, dtype: torch.dtype, watch: bool) -> dict:
    """Answer one question about one clip."""
    start = time.perf_counter()
    mel = log_mel(samples, model.config.audio)[None].to(device, dtype)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        audio = model.encode(mel, torch.tensor([encoder_frames(len(samples), model.config.audio)], device=device))
        question = tokenizer.prompt(model.config.text.system, prompt)
        reader = Reader(model, model.hear(audio, parts), [question], [decode.gen_length], tokenizer.mask_id)
        steps = generate(reader, decode, tokenizer.eos_id)
        if watch:
            steps = show.watch(steps, tokenizer, lambda text: print(text, end="", flush=True), pause=0.15)
        n_steps = 0
        for step in steps:
            n_steps += 1
    tokens = step.tokens[0].tolist()
    seconds = round(time.perf_counter() - start, 3)
    return {"text": tokenizer.decode(tokens), "tokens": tokens, "steps": n_steps, "seconds": seconds}


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    config, trained, paths = find(args)
    device, dtype, _ = choose_device(args.device, args.dtype, large=not config.from_scratch)
    if device.type == "cpu" and config.from_scratch:  # a downloaded model has no memory to spare
        keep_freed_memory()
    tokenizer = weights.load_tokenizer(config, paths["llada"])
    decode = decode_config(args, config.decode)
    prompt = config.text.instruction if args.prompt is None else args.prompt
    for path in args.clips:
        duration(path)  # an error now, and not after the weights are loaded
    model, parts = load_model(config, trained, paths, device, dtype)
    for path in args.clips:
        for samples in parts_of_clip(path, model.config, args.chunk):
            answer = ask(model, parts, tokenizer, samples, prompt, decode, device, dtype, args.watch)
            if args.json:
                print(json.dumps({"audio": str(path), "prompt": prompt, **answer}))
            elif not args.watch:
                print(answer["text"] if len(args.clips) == 1 else f"{path}: {answer['text']}")


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
