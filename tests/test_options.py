"""Flags that cannot be are refused before anything is done."""

import pytest

import train
from diffa2_mini.config import run_script


@pytest.mark.parametrize("flag, message", [
    ("--workers=-1", "--workers must be from 0 to 256, got -1"), ("--workers=1000", "--workers must be from 0 to 256, got 1000"),
    ("--threads=100000000000", "--threads must be from 0 to 1024"), ("--threads=0", "--threads must be positive, got 0"),
    ("--eval-every=-1", "--eval-every must be from 0 to inf, got -1"), ("--save-every=0", "--save-every must be positive"),
    ("--lora-dropout=1", "--lora-dropout must be from 0 to below 1"), ("--lr=nan", "--lr must be positive, got nan")])
def test_a_number_that_cannot_be_is_one_line(flag, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_script(train.main, ["--out", str(out), flag]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()
