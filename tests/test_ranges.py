"""Every number of every command and config has a range, and what is outside of it is one line."""

import dataclasses
import math
from typing import get_args

import pytest

import sample
import train
from data import fsdd, kaldi, librispeech, toy, toybench
from diffa2_mini import config
from diffa2_mini.bench import __main__ as bench
from diffa2_mini.command.script import Parser, run_script
from diffa2_mini.config import SIZES, Config, from_dict
from diffa2_mini.errors import UserError
from diffa2_mini.evaluate import __main__ as evaluate
from diffa2_mini.ranges import RANGES, Ranged, out_of_range
from tutorials import build, claims, seeds, speed

COMMANDS = [train, sample, evaluate, bench, fsdd, kaldi, librispeech, toy, toybench, build, claims,
            seeds, speed]


def numeric(field) -> bool:
    return bool({int, float} & {*(get_args(field.type) or (field.type,))})


def parts() -> list:
    """One of each dataclass of config.py that has numbers."""
    full, stages = SIZES["full"]
    return [*(getattr(full, field.name) for field in dataclasses.fields(Config)[1:]), stages[3]]


def test_every_dataclass_with_numbers_is_ranged_and_every_number_has_a_finite_range():
    classes = {value for value in vars(config).values()
               if isinstance(value, type) and dataclasses.is_dataclass(value)}
    assert {type(part) for part in parts()} | {Config} == classes
    assert all(isinstance(part, Ranged) for part in parts())
    names = {field.name for part in parts() for field in dataclasses.fields(part) if numeric(field)}
    assert names <= RANGES.keys()
    assert all(math.isfinite(end) for ends in RANGES.values() for end in ends)
    assert all(least < most for least, most in RANGES.values())


@pytest.mark.parametrize("part", parts(), ids=lambda part: type(part).__name__)
def test_no_number_of_a_config_is_taken_outside_its_range(part):
    for field in (field for field in dataclasses.fields(part) if numeric(field)):
        least, most = RANGES[field.name]
        for bad in (math.nan, math.inf, -math.inf, least - 1, most + 1, "1", True, [1]):
            bad = (bad,) if isinstance(getattr(part, field.name), tuple) else bad
            with pytest.raises(UserError, match=f"{field.name.replace('_', ' ')} must be") as error:
                dataclasses.replace(part, **{field.name: bad})
            assert "\n" not in str(error.value)


def test_a_checkpoints_config_is_looked_at():
    values = dataclasses.asdict(SIZES["toy"][0])
    values["llada"]["rope_theta"] = math.inf
    with pytest.raises(UserError, match="rope theta must be from 1 to 1000000000000.0, got inf"):
        from_dict(values)


def test_whole_numbers_have_no_fraction():
    assert out_of_range("width", 1.5, True) == "a whole number from 1 to 1048576, got 1.5"
    assert out_of_range("width", 8, True) == out_of_range("lr", 1, False) == ""


def numbers_of(command, monkeypatch) -> list[tuple[str, str]]:
    """The flags of a command that take numbers, with the names of their values."""
    found = []

    def look(parser, argv):
        found.extend((action.option_strings or [""], action.dest) for action in parser._actions
                     if action.type in (int, float))
        raise UserError("looked")

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", look)
        assert run_script(command.main, []) == 2
    return [(flags[0], name) for flags, name in found]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_no_flag_takes_a_number_outside_its_range(command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    needed = {"sample": ["clip.wav"], "diffa2_mini.evaluate.__main__": ["--benchmark", "toy"]}
    for flag, name in numbers_of(command, monkeypatch):
        least, most = RANGES[name]
        for bad in (least - 1, most + 1, "nan", "inf"):
            value = f"{flag}={bad}" if flag else str(bad)
            argv = needed.get(command.__name__, []) + (["--", value] if not flag else [value])
            capsys.readouterr()
            assert run_script(command.main, argv) == 2
            error = capsys.readouterr().err
            assert (flag or name) in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())
