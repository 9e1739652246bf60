"""What the tests share: one thread, one seed, and a model small enough to build in every test."""

import io
import json
import os
import signal
import sys
from contextlib import redirect_stdout

import pytest
import torch

# `pytest tests/test_device.py` alone has the tests of CUDA run
if not any("test_device" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is bit-identical is so on the CPU

from mini import train_here

from data import toy
from diffa2_mini.command import flags
from diffa2_mini.config import (
    AdapterConfig,
    AudioConfig,
    Config,
    LladaConfig,
    LoraConfig,
    WhisperConfig,
)
from diffa2_mini.data import read_manifest
from diffa2_mini.fast import measure
from diffa2_mini.model import Diffa2Model

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def memory_as_it_is(monkeypatch):
    # how memory is kept is a matter of the whole process
    for module in (flags, measure):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: None)


@pytest.fixture
def nothing_downloaded(tmp_path, monkeypatch):
    """Neither here nor in the hub's cache are there published weights, whatever there is."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.fixture
def config() -> Config:
    """A micro size: every part of DIFFA-2, with a few thousand parameters."""
    return Config(
        size="micro",
        audio=AudioConfig(n_mels=5, max_seconds=1),
        whisper=WhisperConfig(n_mels=5, n_positions=16, width=8, n_layers=3, n_heads=2,
                              taps=(0, 2, 3)),
        adapter=AdapterConfig(n_queries=3, qformer_hidden=11, n_prompts=2),
        llada=LladaConfig(vocab_size=23, width=12, n_layers=2, n_heads=3, hidden=20,
                          rope_theta=100.0),
        lora=LoraConfig(rank=2, alpha=4.0),
    )


@pytest.fixture
def model(config) -> Diffa2Model:
    return Diffa2Model(config).eval()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The toy world with a handful of clips, and six questions to measure on."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SPLITS",
                      {"stage0": (4, 3, 3), "train": (8, 4, 4), "evaluation": (2, 2, 2)})
        patch.setattr(toy, "N_PER_TYPE", 1)
        patch.setattr(toy, "N_PAIRS", 8)
        toy.make_stage0(toy.make_world(folder))
    validation = folder / "validation.json"
    validation.write_text(json.dumps(read_manifest(validation)[::6]))
    return folder


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """A run of all four stages that nothing disturbs; its folder, and what it printed."""
    out, printed = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    with redirect_stdout(printed):
        train_here(world, out)
    return out, printed.getvalue()


@pytest.fixture
def handlers():
    """Signals do afterwards what they did before."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    if before.get("SIGHUP") == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests themselves run under nohup
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)
