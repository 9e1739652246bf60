"""Ask DIFFA-2 about a recording.

    python sample.py data/clips/three_one_four.wav
    python sample.py clip.wav --prompt "How many digits are there?" --watch
    python sample.py --record 4 --html answer.html
    python sample.py *.wav --json --checkpoint runs/mine/stage4.safetensors
"""

from diffa2_mini.command.script import Parser, begin, require_printed, run_script, unread

begin(__name__)  # Ctrl-C while the rest is imported

import argparse
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from diffa2_mini.audio import duration, load_audio
from diffa2_mini.command import flags
from diffa2_mini.command.record import record
from diffa2_mini.config import AudioConfig
from diffa2_mini.errors import require
from diffa2_mini.listen import Diffa2
from diffa2_mini.view import page, terminal


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("clips", nargs="*", type=Path, metavar="CLIP", help="wav, flac, ogg or mp3, of any rate")
    add("--record", type=float, metavar="SECONDS", help="ask about what the microphone hears")
    add("--prompt", help="the question (default: transcribe)")
    add("--chunk", action="store_true", help="answer on each part of a clip that is longer than "
        "the model takes: as few parts as there can be, all of one length")
    add("--json", action="store_true", help="print a line of JSON for each clip, or each part of "
        "it, which is from start to end (seconds)")
    add("--watch", action="store_true", help="show the answer forming; ░ is a mask, bright is sure")
    add("--html", type=Path, metavar="PAGE",
        help="write a page that shows and plays the clips, and each step of the answers")
    flags.add_model_flags(add)
    args = parser.parse_args(argv)
    require(bool(args.clips) != bool(args.record), "expected clips or --record SECONDS, got "
            f"{'both' if args.clips else 'neither'}; choose one")
    if args.html:
        require(args.html.suffix.lower() in (".html", ".htm") and args.html.parent.is_dir()
                and not args.html.is_dir(), f"--html {args.html}: expected the name of a file "
                "ending in .html, in a folder that exists")
    return args


@dataclass(frozen=True)
class Part:
    """What is asked about at once: [samples], from `start` to `end` of a clip, in seconds."""

    name: str
    samples: np.ndarray
    start: float
    end: float


def note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def parts_of_clip(path: Path, audio: AudioConfig, chunk: bool) -> list[Part]:
    """The clip as the model can take it: whole; or if it is too long, its beginning; or with
    `chunk`, as few parts as there can be, all of one length, so that none is a sliver."""
    samples = load_audio(path, audio.sample_rate, None if chunk else audio.max_seconds + 0.1, note)
    n_parts = math.ceil(len(samples) / audio.max_samples)
    if n_parts > 1 and not chunk:
        note(f"{path} is longer than the {audio.max_seconds} s that the model takes; this answers "
             "on its beginning (--chunk answers on each part)")
        samples, n_parts = samples[:audio.max_samples], 1
    parts, n_before = [], 0
    for piece in np.array_split(samples, n_parts):
        start, end = n_before / audio.sample_rate, (n_before + len(piece)) / audio.sample_rate
        n_before += len(piece)
        name = f"{path}, {start:.1f} to {end:.1f} s" if n_parts > 1 else str(path)
        parts.append(Part(name, piece, start, end))
    return parts


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    source = flags.model_source(args)
    config, n_asked, sections = source.config, 0, []
    decode = flags.decode_config(args, config.decode)
    prompt = config.text.instruction if args.prompt is None else args.prompt
    how = *flags.device_and_dtype(args, config), args.merge_lora, args.quantize
    clips = args.clips or [record(args.record, config.audio.max_seconds)]
    for path in clips:
        duration(path)  # an error now, and not after the weights are loaded
    diffa2 = Diffa2.load(source, *how)
    show, top = iter, page.TOP if args.html else 0
    if args.watch:
        show = partial(terminal.watch, tokenizer=diffa2.tokenizer, pause=0.15,
                       stream=sys.stderr if args.json else sys.stdout)
    for path in clips:
        parts = parts_of_clip(path, config.audio, args.chunk)
        is_alone = len(clips) == len(parts) == 1
        for part in parts:
            if unread() and not args.html:
                return
            if args.watch and not args.json and not is_alone:
                print(f"{part.name}:")
            (answer,) = diffa2.answer([part.samples], [prompt], decode, show, top, n_asked)
            n_asked += 1
            if args.html:
                sections.append(page.section(diffa2, part.name, part.samples, prompt, answer,
                                             decode))
            if args.json:
                row = {"audio": str(path), "start": round(part.start, 3),
                       "end": round(part.end, 3), "prompt": prompt}
                row |= {name: getattr(answer, name)
                        for name in ("text", "tokens", "steps", "seconds")}
                print(json.dumps(row))
            elif not args.watch:
                print(answer.text if is_alone else f"{part.name}: {answer.text}")
    if args.html:
        page.save(args.html, sections)
    require_printed()


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
