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
    """A response up to its end; ░ is a mask. A token may hold a part of a character: it is decoded
    with its neighbours, and left out where one of them is still a mask."""
    decoder, found, after_mask = codecs.getincrementaldecoder("utf-8")("replace"), [], False
    for token, c in zip(tokens, confidence):
        if token in (tokenizer.eot_id, tokenizer.eos_id):
            break
        if token == tokenizer.mask_id:
            decoder.reset()
            found.append(("░", None))
            after_mask = True
            continue
        spelled = tokenizer.tokens.get(token, b"\xff")
        if after_mask:  # no character begins with one of these bytes
            spelled = spelled.lstrip(bytes(range(0x80, 0xC0)))
            after_mask = not spelled
        found += [(character, c) for character in decoder.decode(spelled)]
    found += [(character, None) for character in decoder.decode(b"", final=True)]
    return [(" " if category(each) == "Cc" and each != "\n" else each, c) for each, c in found]


def lay_out(cells: list[Cell], columns: int) -> list[list[Cell]]:
    """The rows that cells take, each of so many columns at most."""
    rows, used = [[]], 0
    for character, c in cells:
        wide = east_asian_width(character) in ("W", "F")
        taken = 0 if category(character) in ("Mn", "Me", "Cf") else 1 + wide
        if character == "\n" or used + taken > columns:
            rows.append([])
            used = 0
        if character != "\n":
            rows[-1].append((character, c))
            used += taken
    return rows


def paint(row: list[Cell]) -> str:
    """A row of text, in a grey that is the brighter the more confident a character is."""
    return "".join(
        character if c is None else
        f"\x1b[38;5;{round(DARKEST + (BRIGHTEST - DARKEST) * c)}m{character}\x1b[0m"
        for character, c in row)


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
            # no more than it can take back
            rows = lay_out(cells, max(2, columns - 1))[-max(1, lines - 1):]
            stream.write(f"{back}\x1b[J" + "\n".join(map(paint, rows)))
            stream.flush()
            back = f"\r\x1b[{len(rows) - 1}A" if len(rows) > 1 else "\r"
            time.sleep(pause)
        else:
            stream.write("".join(character for character, _ in cells) + "\n")
        yield step
    if stream.isatty():
        stream.write("\n")
