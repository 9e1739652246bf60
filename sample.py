"""Ask DIFFA-2 about a recording.

    python sample.py data/clips/three_one_four.wav
    python sample.py clip.wav --prompt "How many digits are there?" --watch
    python sample.py clip.wav --html answer.html
    python sample.py *.wav --json --checkpoint runs/mine/stage4.safetensors
"""

from diffa2_mini.command.script import begin, run_script, unread

begin(__name__)  # Ctrl-C while the rest is imported

import argparse
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffa2_mini import weights
from diffa2_mini.audio import duration, encoder_frames, load_audio, log_mel
from diffa2_mini.command.flags import (
    add_decode_flags,
    add_model_flags,
    choose,
    decode_config,
    find,
    load_model,
)
from diffa2_mini.command.script import Parser
from diffa2_mini.config import Config, DecodeConfig
from diffa2_mini.fast.device import autocast
from diffa2_mini.fast.generate import generate
from diffa2_mini.fast.state import DecodingState
from diffa2_mini.model import Diffa2Model
from diffa2_mini.tokenizer import Tokenizer
from diffa2_mini.view import page, terminal


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("clips", nargs="+", type=Path, metavar="CLIP", help="wav, flac, ogg or mp3, of any rate")
    add("--prompt", help="the question (default: transcribe)")
    add_model_flags(add)
    add("--chunk", action="store_true", help="answer on each part of a clip that is longer than "
        "the model hears: as few parts as there can be, all of one length")
    add("--json", action="store_true",
        help="print a line of JSON for each clip, or each part of it, "
        "which is from start to end (seconds)")
    add("--watch", action="store_true",
        help="show the answer forming; ░ is a mask, bright is confident")
    add("--html", type=Path, metavar="PAGE",
        help="write a page that shows and plays the clips, and each step of the answers")
    add_decode_flags(add)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Part:
    """What the model hears at once: [samples], from `start` to `end` of a clip, in seconds."""

    name: str
    samples: np.ndarray
    start: float
    end: float


def parts_of_clip(path: Path, config: Config, chunk: bool) -> list[Part]:
    """The clip as the model can hear it: whole; or if it is too long, its beginning; or with
    `chunk`, as few parts as there can be, all of one length, so that none is a sliver."""
    audio = config.audio
    samples = load_audio(path, audio.sample_rate, None if chunk else audio.max_seconds + 0.1, tell)
    n_parts = math.ceil(len(samples) / audio.max_samples)
    if n_parts > 1 and not chunk:
        tell(f"{path} is longer than the {audio.max_seconds} s that the model hears; this answers "
             "on its beginning (--chunk answers on each part)")
        samples, n_parts = samples[:audio.max_samples], 1
    parts, n_before = [], 0
    for piece in np.array_split(samples, n_parts):
        start, n_before = n_before / audio.sample_rate, n_before + len(piece)
        end = n_before / audio.sample_rate
        name = f"{path}, {start:.1f} to {end:.1f} s" if n_parts > 1 else str(path)
        parts.append(Part(name, piece, start, end))
    return parts


def tell(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


@torch.no_grad()
def ask(model: Diffa2Model, parts: tuple[str, ...], tokenizer: Tokenizer, samples: np.ndarray,
        prompt: str, decode: DecodeConfig, device: torch.device, dtype: torch.dtype, watch: bool,
        frames: list | None = None, number: int = 0) -> dict:
    """Answer one question about one clip, the `number`-th of all that are asked. What each step did
    is added to `frames`, as `page.record` tells."""
    start = time.perf_counter()
    mel = log_mel(samples, model.config.audio)[None].to(device, dtype)
    n_frames = torch.tensor([encoder_frames(len(samples), model.config.audio)], device=device)
    audio = model.encode(mel, n_frames)
    with autocast(device, dtype):
        question = tokenizer.prompt(model.config.text.system, prompt)
        state = DecodingState(model, model.embed_audio(audio, parts), [question],
                              [decode.gen_length], tokenizer.mask_id)
        steps = generate(state, decode, tokenizer.eos_id, 0 if frames is None else page.TOP,
                         numbers=[number])
        if frames is not None:
            steps = page.record(steps, tokenizer, frames)
        if watch:
            steps = terminal.watch(steps, tokenizer, sys.stdout, pause=0.15)
        n_steps = 0
        for step in steps:
            n_steps += 1
    tokens = step.tokens[0].tolist()
    seconds = round(time.perf_counter() - start, 3)
    return {
        "text": tokenizer.decode(tokens), "tokens": tokens, "steps": n_steps, "seconds": seconds}


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.html:
        page.check(args.html)
    config, trained, paths = find(args)
    device, dtype = choose(args, config)
    tokenizer = weights.load_tokenizer(config, paths["llada"])
    decode = decode_config(args, config.decode)
    prompt = config.text.instruction if args.prompt is None else args.prompt
    for path in args.clips:
        duration(path)  # an error now, and not after the weights are loaded
    model, parts = load_model(config, trained, paths, device, dtype, args.merge_lora)
    sections, numbers = [], itertools.count()
    for path in args.clips:
        audio_embeddings = parts_of_clip(path, model.config, args.chunk)
        alone = len(args.clips) == len(audio_embeddings) == 1
        for part in audio_embeddings:
            if unread() and not args.html:
                return
            frames = [] if args.html else None
            if args.watch and not args.json and not alone:
                print(f"{part.name}:")
            answer = ask(model, parts, tokenizer, part.samples, prompt, decode, device, dtype,
                         args.watch, frames, next(numbers))
            if args.html:
                sections.append(page.section(part.name, part.samples, model.config.audio, prompt,
                                             answer, frames, decode))
            if args.json:
                where = {"start": round(part.start, 3), "end": round(part.end, 3)}
                print(json.dumps({"audio": str(path), **where, "prompt": prompt, **answer}))
            elif not args.watch:
                print(answer["text"] if alone else f"{part.name}: {answer['text']}")
    if args.html:
        page.save(args.html, sections)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
