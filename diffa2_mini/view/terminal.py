"""An answer forming in the terminal."""

import codecs
import shutil
import time
from collections.abc import Iterator
from typing import TextIO
from unicodedata import category, east_asian_width

import torch

from ..command.script import shown
from ..fast.generate import Step
from ..tokenizer import Tokenizer

DARKEST, BRIGHTEST = 238, 255  # greys of a 256-colour terminal
Cell = tuple[str, float | None]  # a character, and the confidence of the token that completed it


def characters(tokens: list[int], confidence: list[float], tokenizer: Tokenizer) -> list[Cell]:
    """A response up to its end; ░ is a mask. A character may take several tokens: it is left out
    while one of them is a mask."""
    ends = [at for at, token in enumerate(tokens) if token in (tokenizer.eot_id, tokenizer.eos_id)]
    tokens, found = tokens[:ends[0]] if ends else tokens, []
    errors = "ignore" if tokenizer.mask_id in tokens else "replace"
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    for token, c in zip(tokens, confidence):
        if token == tokenizer.mask_id:
            spelled, c = "░".encode(), None
        else:
            spelled = tokenizer.tokens.get(token, b"\xff")
        found += [(character, c) for character in decoder.decode(spelled)]
    found += [(character, None) for character in decoder.decode(b"", final=True)]
    return [(" " if category(each) == "Cc" and each != "\n" else each, c) for each, c in found]


def lay_out(cells: list[Cell], columns: int) -> list[str]:
    """The rows that cells take, each so many columns at most; the more confident, the brighter."""
    rows, used = [""], 0
    for character, c in cells:
        wide = east_asian_width(character) in ("W", "F")
        taken = 0 if category(character) in ("Mn", "Me", "Cf") else 1 + wide
        if character == "\n" or used + taken > columns:
            rows.append("")
            used = 0
        if character != "\n":
            grey = round(DARKEST + (BRIGHTEST - DARKEST) * (c or 0))
            rows[-1] += character if c is None else f"\x1b[38;5;{grey}m{character}\x1b[0m"
            used += taken
    return rows


def watch(steps: Iterator[Step], tokenizer: Tokenizer, stream: TextIO,
          pause: float) -> Iterator[Step]:
    """Show each step of decoding one response, then hand it on: on a terminal in the place of the
    step before, for `pause` seconds; elsewhere as plain text, on a line of its own."""
    back, confidence = "\r", 0.0
    for number, step in enumerate(steps, start=1):
        confidence = torch.where(step.committed[0], step.confidence[0], confidence)  # [R]
        cells = [(character, None) for character in f"{number:3} "]
        for text, c in characters(step.tokens[0].tolist(), confidence.tolist(), tokenizer):
            cells += [(character, c) for character in shown(text, stream.encoding)]
        if stream.isatty():
            columns, lines = shutil.get_terminal_size()
            rows = lay_out(cells, max(2, columns - 1))[-max(1, lines - 1):]  # what it can take back
            print(f"{back}\x1b[J" + "\n".join(rows), end="", file=stream, flush=True)
            back = f"\r\x1b[{len(rows) - 1}A" if len(rows) > 1 else "\r"
            time.sleep(pause)
        else:
            stream.write("".join(character for character, _ in cells) + "\n")
        yield step
    if stream.isatty():
        stream.write("\n")
