"""What a person looks at: the answer forming in the terminal, and the curves of a run."""

import codecs
import json
import shutil
import time
from pathlib import Path
from typing import Iterator, TextIO
from unicodedata import category, east_asian_width

from .fast.generate import Step
from .faults import append, write
from .script import shown
from .tokenizer import Tokenizer

DARKEST, BRIGHTEST = 238, 255  # greys of a 256-colour terminal
Cell = tuple[str, float | None]  # a character, and the confidence of the token that completed it


def characters(tokens: list[int], confidence: list[float], tokenizer: Tokenizer) -> list[Cell]:
    """A response as far as it is known, up to its end; ░ is a mask. A token may hold a part of a
    character: it is decoded with its neighbours, and beside a mask it is left out until they come."""
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


def columns_of(character: str) -> int:
    """How many columns of a terminal a character takes."""
    wide = east_asian_width(character) in ("W", "F")
    return 0 if category(character) in ("Mn", "Me", "Cf") else 1 + wide


def lay_out(cells: list[Cell], columns: int) -> list[list[Cell]]:
    """The rows that cells take, each of so many columns at most."""
    rows, used = [[]], 0
    for cell in cells:
        taken = columns_of(cell[0])
        if cell[0] == "\n" or used + taken > columns:
            rows.append([])
            used = 0
        if cell[0] != "\n":
            rows[-1].append(cell)
            used += taken
    return rows


def paint(row: list[Cell]) -> str:
    """A row of text, in a grey that is the brighter the more confident a character is."""
    def shade(cell: Cell) -> str:
        text, confidence = cell
        grey = confidence is not None and round(DARKEST + (BRIGHTEST - DARKEST) * confidence)
        return f"\x1b[38;5;{grey}m{text}\x1b[0m" if grey else text

    return "".join(map(shade, row))


def watch(steps: Iterator[Step], tokenizer: Tokenizer, stream: TextIO, pause: float) -> Iterator[Step]:
    """Show each step of decoding one response, then hand it on: on a terminal in the place of the
    step before, for `pause` seconds; elsewhere as plain text, on a line of its own."""
    terminal, drawn, confidence = stream.isatty(), 1, None
    for number, step in enumerate(steps, start=1):
        confidence = confidence or [0.0] * step.tokens.shape[1]
        for i, committed in enumerate(step.committed[0].tolist()):
            if committed:
                confidence[i] = float(step.confidence[0, i])
        cells = [(character, None) for character in f"{number:3} "]
        for text, c in characters(step.tokens[0].tolist(), confidence, tokenizer):
            cells += [(character, c) for character in shown(text, stream.encoding)]
        if terminal:
            columns, lines = shutil.get_terminal_size()
            rows = lay_out(cells, max(2, columns - 1))[-max(1, lines - 1):]  # no more than it can take back
            back = f"\x1b[{drawn - 1}A" if drawn > 1 else ""
            stream.write(f"\r{back}\x1b[J" + "\n".join(map(paint, rows)))
            stream.flush()
            drawn = len(rows)
            time.sleep(pause)
        else:
            stream.write("".join(character for character, _ in cells) + "\n")
        yield step
    if terminal:
        stream.write("\n")


def read_row(line: bytes) -> dict | None:
    """A line of log.jsonl as `Log` writes it, or None: others may have written there too."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no text, a number too long, or depth
        return None
    ours = isinstance(row, dict) and all(type(row.get(name)) is int for name in ("stage", "step"))
    return row if ours and max(abs(row["stage"]), abs(row["step"])) < 2**53 else None


def points(rows: list[dict], name: str) -> list[tuple[int, float]]:
    """Steps and values of a figure, where a row has it and it is a number that can be drawn."""
    return [(row["step"], float(row[name])) for row in rows
            if type(row.get(name)) in (int, float) and not abs(row[name]) > 1e300]


class Log:
    """A run's log.jsonl: a line of JSON for each step, and for each measurement. Of several processes one `writes` it."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes

    def add(self, **row) -> None:
        if self.writes:
            append(self.path, json.dumps(row) + "\n")

    def forget_after(self, stage: int, step: int) -> None:
        """Drop what was logged of a stage after a checkpoint: the resumed run will log it again. What came of later stages stays:
        they may be done, and this one have gone back to an earlier save."""
        *lines, half = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        lines += [half] if read_row(half) else []  # or what a killed run wrote half of
        rows = [(line + b"\n", read_row(line)) for line in lines]
        kept = [line for line, row in rows
                if not row or row["stage"] != stage or row["step"] <= step]
        write(self.path, lambda temporary: temporary.write_bytes(b"".join(kept)))


def draw_curves(log: Path, picture: Path) -> bool:
    """Draw the loss and the validation figures of a run's log.jsonl. False where there are none, or
    where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = log.read_bytes().split(b"\n") if log.exists() else []
    rows = [row for line in lines if (row := read_row(line))]
    stages = sorted({row["stage"] for row in rows})
    if not stages:
        return False
    figure, axes = pyplot.subplots(1, len(stages), figsize=(4 * len(stages), 3.2), squeeze=False, layout="constrained")
    for axis, stage in zip(axes[0], stages):
        of_stage = [row for row in rows if row["stage"] == stage]
        losses = points(of_stage, "loss")
        if losses:
            axis.plot(*zip(*losses), color="tab:blue", label="loss")
        right = axis.twinx()
        for name, colour in (("open", "tab:green"), ("lettered", "tab:olive"), ("wer", "tab:red")):
            measured = points(of_stage, name)
            if measured:
                right.plot(*zip(*measured), "o-", color=colour, label=name)
        right.set_ylim(0, 1)
        axis.set(title=f"stage {stage}", xlabel="step")
        figure.legend(*[a + b for a, b in zip(axis.get_legend_handles_labels(), right.get_legend_handles_labels())],
                      loc="outside lower center", ncols=4) if stage == stages[-1] else None
    write(picture, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    pyplot.close(figure)
    return True
