"""An answer that forms on a terminal of any width."""

import io
import re

import pytest
import torch

from diffa2_mini.config import ASSETS
from diffa2_mini.fast.generate import Step
from diffa2_mini.tokenizer import Tokenizer
from diffa2_mini.view.terminal import characters, watch

TOKENIZER = Tokenizer.from_ranks(ASSETS / "toy.bpe")
MASK, EOT = TOKENIZER.mask_id, TOKENIZER.eot_id


class Terminal(io.StringIO):
    """A terminal of some columns that does what it is told; `screen` is what is to be seen."""

    encoding = "utf-8"

    def __init__(self, columns):
        super().__init__()
        self.columns, self.rows, self.row, self.column = columns, [[]], 0, 0

    def isatty(self):
        return True

    def put(self, character):
        if self.column == self.columns:
            self.row, self.column = self.row + 1, 0
        self.rows += [[] for _ in range(self.row + 1 - len(self.rows))]
        line = self.rows[self.row]
        line += [" "] * (self.column + 1 - len(line))
        line[self.column] = character
        self.column += 1

    def write(self, text):
        for code, up, character in re.findall(r"(\x1b\[(?:(\d+)A|[\d;]*[Jm]))|([\s\S])", text):
            if up:
                self.row = max(0, self.row - int(up))
            elif code.endswith("J"):
                self.rows[self.row:] = [self.rows[self.row][:self.column]]
            elif character == "\n":
                self.row, self.column = self.row + 1, 0
            elif character == "\r":
                self.column = 0
            elif character:
                assert character != "\x1b"
                self.put(character)

    @property
    def screen(self):
        return "".join("".join(row) for row in self.rows)


def steps_to(text, length=None):
    """Steps that commit a response's tokens one by one, from the last to the first."""
    response = [*TOKENIZER.encode(text), EOT]
    tokens = torch.full((1, len(response)), MASK)
    for at in reversed(range(len(response))):
        tokens[0, at] = response[at]
        committed = torch.zeros_like(tokens, dtype=torch.bool)
        committed[0, at] = True
        yield Step(tokens.clone(), tokens, torch.full(tokens.shape, 0.5), committed)


@pytest.mark.parametrize("columns, lines", [(8, 50), (20, 50), (80, 24)])
def test_a_narrow_terminal_shows_the_last_step_and_no_ghosts(columns, lines, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    text = "a door, then a bell; then three digits, one after the other"
    terminal, n = Terminal(columns), 0
    for n, _ in enumerate(watch(steps_to(text), TOKENIZER, terminal, 0), start=1):
        assert terminal.screen.startswith(f"{n:3} ")
    assert terminal.screen == f"{n:3} {text}"


def test_an_answer_that_is_higher_than_the_terminal_shows_its_end(monkeypatch):
    monkeypatch.setenv("COLUMNS", "8")
    monkeypatch.setenv("LINES", "4")
    terminal = Terminal(8)
    list(watch(steps_to("one two three four five six seven eight"), TOKENIZER, terminal, 0))
    assert terminal.screen.endswith("eight") and len(terminal.rows) == 3


def test_elsewhere_each_step_is_a_line_of_plain_text():
    out = io.StringIO()
    steps = list(watch(steps_to("a bell"), TOKENIZER, out, 0))
    lines = out.getvalue().splitlines()
    assert len(lines) == len(steps) and lines[-1].split(maxsplit=1)[1] == "a bell"
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue() and "░" in lines[0]


@pytest.mark.parametrize("text", ["中文和 English", "naïve café 🔔"])
def test_half_a_character_waits_for_its_other_half(text):
    tokens = TOKENIZER.encode(text)
    assert len(tokens) > len(text)  # some characters are several tokens
    for step in steps_to(text):
        shown = "".join(each
                        for each, _ in characters(step.tokens[0].tolist(), [0.5] * 99, TOKENIZER))
        assert "\ufffd" not in shown and {*shown} <= {*text, "░"}
    assert shown == text
    assert TOKENIZER.decode([tokens[0], EOT]) == "".join(
        c for c, _ in characters([tokens[0], EOT], [0.5, 0.5], TOKENIZER))


def test_text_of_a_model_cannot_steer_the_terminal():
    tokens = TOKENIZER.encode("a\x1b[2Jb\rc")
    assert "".join(each for each, _ in characters(tokens, [0.5] * 99, TOKENIZER)) == "a [2Jb c"
