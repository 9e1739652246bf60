"""What the tests share: one thread, one seed, and a model small enough to build in every test."""

import os
import sys

import pytest
import torch

if not any("test_device" in argument for argument in sys.argv):  # `pytest tests/test_device.py` alone has the tests of CUDA run
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is bit-identical is so on the CPU

from diffa2_mini.config import AdapterConfig, AudioConfig, Config, LladaConfig, LoraConfig, WhisperConfig
from diffa2_mini.model import Diffa2

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def config() -> Config:
    """A micro size: every part of DIFFA-2, with a few thousand parameters."""
    return Config(
        size="micro",
        audio=AudioConfig(n_mels=5, max_seconds=1),
        whisper=WhisperConfig(n_mels=5, n_positions=16, width=8, n_layers=3, n_heads=2, taps=(0, 2, 3)),
        adapter=AdapterConfig(n_queries=3, qformer_hidden=11, n_prompts=2),
        llada=LladaConfig(vocab_size=23, width=12, n_layers=2, n_heads=3, hidden=20, rope_theta=100.0),
        lora=LoraConfig(rank=2, alpha=4.0),
    )


@pytest.fixture
def model(config) -> Diffa2:
    return Diffa2(config).eval()
