"""The comparisons of speed run, and what they compare does the same thing."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from mini import ROOT

from diffa2_mini import config as configs
from diffa2_mini.audio import log_mel
from diffa2_mini.command.script import run_script
from diffa2_mini.config import AudioConfig, LladaConfig
from diffa2_mini.data import Example
from diffa2_mini.fast.generate import generate
from diffa2_mini.fast.state import DecodingState
from diffa2_mini.tokenizer import Prompt
from tutorials import speed

CPU = torch.device("cpu")


@pytest.fixture
def backbone(monkeypatch):
    monkeypatch.setattr(speed, "BACKBONE",
                        LladaConfig(vocab_size=300, width=16, n_layers=2, n_heads=2, hidden=24))
    monkeypatch.setattr(speed, "N_AUDIO", 9)
    return speed.random_backbone(CPU)


def test_the_released_way_and_ours_without_a_cache_give_the_same_answer(backbone):
    for parameter in backbone.llada.parameters():
        torch.nn.init.normal_(parameter)
    config = dataclasses.replace(speed.SCHEDULE, cache="none")
    released, ours = (
        list(generate(state(backbone, [torch.ones(9, 16)], [Prompt([7] * 6, 2)], [128], 5), config,
                      -1))
        for state in (speed.ReleasedDecoding, DecodingState))
    assert len(released) == 32 and len(set(released[-1].tokens[0].tolist())) > 5
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(released, ours, strict=True))


def test_both_losses_are_the_same(backbone):
    audio, response = torch.randn(9, 16), torch.randint(10, 300, (1, 20))
    ours, theirs = (speed.answer_loss(backbone, audio, response, released)
                    for released in (False, True))
    torch.testing.assert_close(ours, theirs)


def test_the_naive_log_mel_is_ours():
    config = AudioConfig(max_seconds=1)
    x = np.random.default_rng(0).normal(0, 0.1, config.max_samples).astype(np.float32)
    np.testing.assert_allclose(speed.naive_log_mel(x, config),
                               log_mel(x, config).numpy(), atol=1e-4)


def test_the_figures_are_medians_and_are_printed_and_written(
        backbone, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "naive_log_mel", lambda x, config: None)
    monkeypatch.setattr(speed, "memory_above", lambda step, device: 2**20)
    out = ["--out", str(tmp_path / "bench.json"), "--device", "cpu"]
    assert run_script(speed.main, ["--runs", "2", *out]) == 0
    written = json.loads((tmp_path / "bench.json").read_text())
    printed = capsys.readouterr().out
    assert written["machine"]["torch"] == torch.__version__ and written["arguments"][0] == "--runs"
    rows = {(row["case"], row["variant"]): row for row in written["rows"]}
    answer = "answer of 128 tokens, blocks of 32 in 8 steps"
    for variant in ("as released", "ours, no cache", "prefix cache", "dual cache"):
        row = rows[answer, variant]
        assert len(row["seconds"]) == 2 and row["median"] == pytest.approx(sum(row["seconds"]) / 2)
        assert row["ratio"] == pytest.approx(rows[answer, "as released"]["median"] / row["median"])
        assert f"{row['median']:.4g}" in printed
    assert {row["target"] for row in rows.values()} >= {">= 4", ">= 6", ">= 2", ">= 3", ">= 1.5"}
    assert run_script(speed.main, ["--only", "log-mel", "--runs", "1", *out]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {"log-mel of 30 s"}


@pytest.mark.slow
def test_the_caches_are_measured_on_the_toys_questions(monkeypatch, tmp_path, capsys):
    clip = configs.DATA / "clips" / "three_one_four.wav"
    few = [Example(clip, "How many digits are there?", "3", "", "n", "speech")] * 11
    monkeypatch.setattr(speed, "load_examples", lambda *about: few)
    command = ["--toy", "--data", str(tmp_path), "--runs", "1", "--out", str(tmp_path / "toy.json"),
               "--device", "cpu"]
    assert run_script(speed.main, command) == 2
    assert "'python data/toy.py' makes it, or name it: --data" in capsys.readouterr().err
    (tmp_path / "validation.json").touch()
    assert run_script(speed.main, command) == 0
    rows = json.loads((tmp_path / "toy.json").read_text())["rows"]
    assert len(rows) == 3 * (4 + 4 + 1)
    assert all(len(row["seconds"]) == 1 and 0 <= row["ratio"] <= 1 for row in rows)
    assert rows[-1]["case"].endswith("2 questions, 1 at once")
    n_passes = [int(re.fullmatch(r"right, (\d+) forward passes", row["of"])[1]) for row in rows]
    assert n_passes[-1] >= 2 and rows[0]["ratio"] == 1
    assert rows[0]["of"] in capsys.readouterr().out


def test_memory_is_measured():
    """In a process of its own: what other tests have freed may be there to be taken again."""
    code = ("import torch; from tutorials.speed import memory_above\n"
            "buffer = lambda: torch.ones(2**26, dtype=torch.uint8).max()\n"
            "print(memory_above(buffer, torch.device('cpu')))")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    used = run.stdout.strip()
    assert used == "None" or 2**26 <= int(used) < 2**27  # and what the process does beside
