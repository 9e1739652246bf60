"""Loading needs no more memory than the weights and little beside them, and dtypes do what they
promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_published import write_shards

from diffa2_mini.config import LladaConfig, WhisperConfig
from diffa2_mini.llada import Block, Llada, rotary
from diffa2_mini.training.random_weights import fill_at_random
from diffa2_mini.whisper import EncoderBlock

MEMORY = """
import json, sys, threading, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from diffa2_mini.config import LladaConfig
from diffa2_mini.llada import Llada
from diffa2_mini.weights import load_part

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

peak, done = [anonymous()], threading.Event()
def watch():
    while not done.is_set():
        peak.append(anonymous())
        time.sleep(0.001)
before = anonymous()
with torch.device("meta"):
    model = Llada(LladaConfig(**json.loads(sys.argv[3])))
thread = threading.Thread(target=watch)
thread.start()
load_part(model, "llada", Path(sys.argv[2]), dtype=getattr(torch, sys.argv[4]))
done.set()
thread.join()
assert model.ff_out.weight.dtype == getattr(torch, sys.argv[4])
print(max(peak) - before)
"""


def fill_shards(folder: Path, numbers: dict, dtype: torch.dtype, layout: str) -> int:
    """Write two shards of a backbone of such sizes, of random weights; returns their bytes."""
    with torch.device("meta"):
        model = Llada(LladaConfig(**numbers))
    fill_at_random(torch.device("cpu"), dtype, model)
    write_shards(folder, {f"model.transformer.{name}": tensor
                          for name, tensor in model.state_dict().items()}, layout)
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(),
                    reason="anonymous memory is read from Linux's /proc")
@pytest.mark.parametrize(
    "layout, dtype", [("model.safetensors", torch.bfloat16), ("pytorch_model.bin", torch.float16)])
def test_loading_needs_little_more_memory_than_the_weights(tmp_path, layout, dtype):
    """1.07 GiB of shards, loaded in bfloat16: as much again in memory, and less than 300 MiB beside
    it. (1.5 GiB would do.)"""
    numbers = dict(vocab_size=32_000, width=2048, n_layers=10, n_heads=16, hidden=5632)
    size = fill_shards(tmp_path / "llada", numbers, dtype, layout)
    assert 2**30 < size < 2**31
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-c", MEMORY, root, str(tmp_path / "llada"), json.dumps(numbers),
               "bfloat16"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert size - 2**20 < int(run.stdout) < size + 300 * 2**20


@pytest.mark.parametrize("part", ["whisper", "llada"])
def test_bfloat16_is_close_to_float32_at_full_width(part):
    """One block as wide as at full size: within 2e-2 of the largest value."""
    if part == "whisper":
        config = WhisperConfig()
        block, x = EncoderBlock(config.width, config.n_heads), torch.randn(1, 50, config.width)
        rest = ()
    else:
        config = LladaConfig()
        block, x = Block(config), torch.randn(1, 50, config.width)
        rest = (rotary(torch.arange(50), config.width // config.n_heads, config.rope_theta), None)
    with torch.no_grad():
        y = block(x, *rest)
        y16 = block.bfloat16()(x.bfloat16(), *rest)
    assert y16.dtype == torch.bfloat16
    assert float((y - y16.float()).abs().max()) <= 2e-2 * float(y.abs().max())
