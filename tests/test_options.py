"""Flags that cannot be are refused before anything is done."""

import pytest

import train
from diffa2_mini.command.script import run_script
from diffa2_mini.config import SIZES
from diffa2_mini.training.dry_run import number_of_steps
from diffa2_mini.training.options import parse_arguments, stage_config


@pytest.mark.parametrize("flag, message", [
    ("--workers=-1", "--workers must be from 0 to 256, got -1"),
    ("--workers=1000", "--workers must be from 0 to 256, got 1000"),
    ("--threads=100000000000", "--threads must be from 1 to 1024"),
    ("--threads=0", "--threads must be from 1 to 1024, got 0"),
    ("--eval-every=-1", "--eval-every must be from 0 to 1000000000, got -1"),
    ("--save-every=0", "--save-every must be from 1 to"),
    ("--lora-dropout=1", "--lora-dropout must be from 0 to 0.99, got 1.0"),
    ("--adapter-dropout=-0.1", "--adapter-dropout must be from 0 to 0.99, got -0.1"),
    ("--lr=nan", "--lr must be from 1e-12 to 10, got nan"),
    ("--lr=inf", "--lr must be from 1e-12 to 10, got inf"),
    ("--warmup=-1", "--warmup must be from 0 to 1000000000, got -1")])
def test_a_number_that_cannot_be_is_one_line(flag, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_script(train.main, ["--out", str(out), flag]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("flags, n_steps", [
    ([], 1200), (["--steps", "7"], 7), (["--epochs", "3"], 75),
    (["--epochs", "3", "--batch-size", "7"], 43)])
def test_steps_or_else_epochs_say_how_long_a_stage_is(flags, n_steps):
    stage = stage_config(parse_arguments(["--stage", "1", *flags], None), 1)
    assert number_of_steps(stage, n_examples=100) == n_steps


@pytest.mark.parametrize("stage, flag, message", [
    (4, "--lora-dropout", "--lora-dropout: stage 4 has no such dropout"),
    (4, "--adapter-dropout", "--adapter-dropout: stage 4 has no such dropout"),
    (2, "--lora-dropout", "--lora-dropout: stage 2 has no such dropout"),
    (1, "--adapter-dropout", "--adapter-dropout: stage 1 has no such dropout")])
def test_a_stage_without_a_dropout_refuses_it(stage, flag, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_script(train.main, ["--out", str(out), "--stage", str(stage), flag, "0.3"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


def test_of_all_stages_those_that_have_a_masking_get_it():
    """Stage 4 has another kind."""
    args = parse_arguments(["--masking", "low-variance"], "")
    assert [stage_config(args, n).masking for n in (1, 2, 3, 4)] == ["low-variance"] * 3 + [
        SIZES["toy"][1][4].masking]
    args = parse_arguments(["--masking", "all-masked", "--size", "full"], "")
    assert [stage_config(args, n).vrpo_samples for n in (3, 4)] == [4, 1]  # all would be the same


@pytest.mark.parametrize("flags, message", [
    (["--stage", "4", "--masking", "half-masked"], "stage 4 has published or all-masked samples"),
    (["--steps", "3", "--epochs", "2"], "--steps and --epochs exclude each other"),
    (["--parts", "llada"], "--parts is of --stage 0"),
    (["--stage", "1", "--random-weights", "--whisper", "a"], "--random-weights reads no others"),
    (["--random-weights", "--validation", "a"], "--random-weights reads no others"),
    (["--random-weights", "--eval-every", "1"], "measures nothing; leave out --eval-every"),
    (["--random-weights", "--diffa2", "a", "--test", "b"], "leave out --diffa2, --test")])
def test_what_would_be_asked_in_vain_is_refused(flags, message, tmp_path, capsys):
    assert run_script(train.main, ["--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_of_all_stages_those_that_have_a_dropout_get_it():
    flags = ["--lora-dropout", "0.3", "--adapter-dropout", "0.2"]
    args = parse_arguments(flags, "")
    stages = [stage_config(args, number) for number in (1, 2, 3, 4)]
    assert [stage.lora_dropout for stage in stages] == [0, 0, 0.3, 0]
    assert [stage.adapter_dropout for stage in stages] == [0, 0.2, 0.2, 0]
    zero = parse_arguments(["--stage", "4", "--lora-dropout", "0"], "")  # is what it has
    assert stage_config(zero, 4).lora_dropout == 0
