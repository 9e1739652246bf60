"""What runs on a Mac's GPU makes no float64 there, and mixes nothing with what is on the CPU."""

import json
import math

import pytest
import torch
from mac import GPU, mac
from mini import ROOT, logged, train_here

import sample
import train
from data.pretraining import backbone, stage0
from data.pretraining.config import PretrainConfig
from data.pretraining.encoder import LabelledClips, pretrain_encoder
from diffa2_mini.command import flags as model_flags
from diffa2_mini.command.script import run_script
from diffa2_mini.config import SIZES
from diffa2_mini.evaluate import __main__ as evaluate
from diffa2_mini.model import Diffa2Model

CLIP = ROOT / "data" / "clips" / "three_one_four.wav"


@pytest.fixture
def on_mac(monkeypatch):
    """Commands choose the pretended GPU."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast",
                        lambda kind, *rest, **named: autocast("cpu", *rest, **named))
    for module in (model_flags, train, stage0):
        monkeypatch.setattr(module, "choose_device", lambda *rest, **named:
                            (GPU, torch.float32, "pretended"))
    with mac():
        yield


@pytest.mark.parametrize("make", [
    lambda: torch.ones(2, device=GPU).double(),
    lambda: torch.ones(2, device=GPU).to(torch.float64),
    lambda: torch.ones(2, dtype=torch.float64).to(GPU),
    lambda: torch.arange(2, device=GPU, dtype=torch.float64),
    lambda: torch.ones(2, device=GPU).cumsum(0, dtype=torch.float64),
    lambda: torch.ones(2, device=GPU) + torch.ones(2),
    lambda: torch.ones(2).where(torch.ones(2, device=GPU) > 0, 0.0),
])
def test_the_pretended_gpu_refuses_what_the_real_one_does(on_mac, make):
    with pytest.raises(AssertionError, match="no float64|and on the CPU"):
        make()


@pytest.mark.parametrize(
    "flags", [[], ["--temperature", "3"], ["--steps", "4", "--remasking", "random"],
              ["--cfg", "1", "--threshold", "0.9"], ["--cache", "prefix", "--temperature", "1"],
              ["--cache", "dual", "--refresh", "2"]])
def test_answers_are_those_of_the_cpu(flags, request, capsys):
    answers = []
    for _ in range(2):
        assert run_script(sample.main, [str(CLIP), str(CLIP), "--json", *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        answers.append([json.loads(line)["tokens"] for line in lines])
        request.getfixturevalue("on_mac")
    assert answers[0] == answers[1]


def test_a_benchmark_is_asked_there(on_mac, world, capsys, tmp_path):
    row = {
        "id": "a", "audio_id": str(CLIP), "question": "What is said?",
        "choices": ["three one four", "three"], "answer": "three", "task": "speech",
        "difficulty": "free"}
    (tmp_path / "toy.json").write_text(json.dumps([row]))
    where = [
        "--benchmark", "toy", "--file", tmp_path / "toy.json", "--out", tmp_path / "answers.jsonl"]
    assert run_script(evaluate.main, [*map(str, where)]) == 0, capsys.readouterr()
    assert json.loads((tmp_path / "answers.jsonl").read_text())["response"]


@pytest.mark.slow
def test_each_stage_takes_a_step_there(on_mac, world, tmp_path, capsys):
    (tmp_path / "one.json").write_text(
        json.dumps([{"audio_filepath": str(CLIP), "target": "three"}]))
    train_here(world, tmp_path / "out", "--no-cache-audio", "--steps", "1",
               "--validation", str(tmp_path / "one.json"))
    losses = [row["loss"] for row in logged(tmp_path / "out") if "loss" in row]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    assert "pretended, 1 process" in capsys.readouterr().out


@pytest.mark.slow
def test_stage_0_trains_there(on_mac, world):
    config = PretrainConfig(recall_steps=1, backbone_steps=1, silence_steps=1, encoder_steps=1,
                            backbone_batch=2, encoder_batch=2, n_held_out=4)
    toy_size = SIZES["toy"][0]
    model = Diffa2Model(toy_size).to(GPU)
    loss = backbone.pretrain_backbone(model, config, 0)
    assert math.isfinite(loss) and model.llada.wte.weight.device == GPU
    clips = LabelledClips.load(world / "stage0.json", toy_size.audio)
    pretrain_encoder(model.whisper, clips, config, 0)
