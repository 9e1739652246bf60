"""A whole size is measured, and what that is measured against."""

import dataclasses
import json
import math

import pytest
import torch

from diffa2_mini import config as configs
from diffa2_mini.bench import __main__ as bench
from diffa2_mini.command.script import run_script
from diffa2_mini.config import AudioConfig
from diffa2_mini.fast import measure

CPU = torch.device("cpu")


def test_a_whole_size_is_measured_stage_by_stage(config, monkeypatch, tmp_path, capsys):
    micro = dataclasses.replace(config, audio=AudioConfig(n_mels=5, max_seconds=1),
                                text=configs.SIZES["full"][0].text,
                                whisper=dataclasses.replace(config.whisper, n_positions=50),
                                llada=dataclasses.replace(config.llada, vocab_size=126_464),
                                decode=configs.DecodeConfig(gen_length=8, block_length=8, steps=8))
    monkeypatch.setitem(configs.SIZES, "full", (micro, configs.SIZES["full"][1]))
    for name in ("matmul_ceiling", "copy_bandwidth"):
        monkeypatch.setattr(bench, name, lambda *about: 1e9)
    command = ["--size", "full", "--random-weights", "--runs", "1", "--out",
               str(tmp_path / "full.json"), "--dtype", "float32"]
    assert run_script(bench.main, command) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "full.json").read_text())["rows"]
    trained = [row for row in rows[6:] if row["of"] == "of the matmul ceiling (MFU)"]
    assert [row["of"] for row in rows[:6]] == [
        *["GiB"] * 4, "real-time factor", "times the reading of the weights"]
    assert len(trained) == len(rows[6:]) and [row["variant"] for row in trained[:2]] == [
        "1 at once", "2 at once"]
    assert {row["case"] for row in trained} == {"stage 1, training", "stage 3, training"}
    assert all(row["ratio"] > 0 and math.isfinite(row["ratio"]) for row in rows)


@pytest.mark.parametrize("flags", [[], ["--only", "decoding"], ["--toy", "--data", "world"]])
def test_what_is_compared_on_a_cpu_is_said_to_be_elsewhere(flags, capsys):
    assert run_script(bench.main, flags) == 2
    error = capsys.readouterr().err
    assert "'python tutorials/speed.py'" in error and error.count("\n") == 1


def test_ceilings_are_measured():
    assert 1e8 < measure.matmul_ceiling(CPU, torch.float32) < 1e15
    assert 1e8 < measure.copy_bandwidth(CPU) < 1e13
