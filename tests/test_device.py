"""Compiling and capturing change speed and nothing else; where they cannot be had, nothing
breaks."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from mini import ROOT, SECONDS

from diffa2_mini.config import DecodeConfig
from diffa2_mini.errors import UserError
from diffa2_mini.fast.compiling import Captured, compile_blocks
from diffa2_mini.fast.device import choose_device
from diffa2_mini.fast.generate import generate
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.fast.state import DecodingState
from diffa2_mini.model import Diffa2Model
from diffa2_mini.tokenizer import Prompt

COMPILE = """
import torch
from diffa2_mini.config import LladaConfig
from diffa2_mini.llada import Llada
from diffa2_mini.fast.compiling import compile_blocks
torch.manual_seed(0)
model = Llada(LladaConfig(vocab_size=23, width=12, n_layers=1, n_heads=3, hidden=20))
x = torch.randn(2, 7, 12, requires_grad=True)
plain = model(x)
(gradient,) = torch.autograd.grad(plain.sum(), x)
compile_blocks(model.blocks)
again = model(x)
torch.testing.assert_close(again, plain)
torch.testing.assert_close(torch.autograd.grad(again.sum(), x)[0], gradient)
print("compiled", torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
@pytest.mark.slow
@pytest.mark.parametrize("compiler", [None, "/no/such/compiler"])
def test_compiled_blocks_compute_the_same_and_without_a_compiler_run_as_they_are(
        compiler, tmp_path):
    there = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE],
                          env=there | ({"CXX": compiler} if compiler else {}), capture_output=True,
                          text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0
    assert done.stderr.count("could not be compiled, goes on without") == (compiler is not None)


def test_blocks_that_cannot_be_compiled_are_one_line(monkeypatch, capfd):
    """The first compiler refuses the second block for another shape: it goes on as it is, and the
    first stays compiled. The second compiler refuses everything, and is asked once."""
    def run(refused):
        calls = []

        def backend(graph, inputs):
            calls.append(graph)
            if len(calls) in refused:
                raise ValueError("no such kernel\n" + 99 * "and more\n")
            return graph

        torch._dynamo.reset()
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", backend)
        blocks = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.LayerNorm(3)])
        inputs = [torch.randn(*shape, 3) for shape in ((2,), (4, 5), (4, 5), (2,))]
        wanted = [blocks[1](blocks[0](x)) for x in inputs]
        compile_blocks(blocks)
        for x, plain in zip(inputs, wanted):
            torch.testing.assert_close(blocks[1](blocks[0](x)), plain)
        return len(calls)

    assert run(refused=[4]) == 4
    assert run(refused=range(99)) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2, lines
    assert all("could not be compiled, goes on without (" in line for line in lines)


def test_a_device_that_is_not_there_is_refused_and_the_choice_is_explained(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="mps"):
        choose_device("mps", "auto")
    device, dtype, why = choose_device("cpu", "auto", large=True)
    assert (device.type, dtype) == ("cpu", torch.bfloat16) and "cpu" in why and "bfloat16" in why


def test_float64_on_a_macs_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match="no float64; use float32, or --device cpu"):
        choose_device("mps", "float64")
    assert choose_device("mps", "auto")[:2] == (torch.device("mps"), torch.float32)


def answer(model, device, capture):
    config = DecodeConfig(gen_length=8, block_length=4, steps=8, factor=None, cache="dual",
                          capture=capture)
    audio_embeddings = [torch.ones(5, model.config.llada.width, device=device)]
    return list(
        generate(DecodingState(model, audio_embeddings, [Prompt([7] * 6, 2)], [8], 22), config,
                 eos_id=-1))


def test_asking_for_a_capture_does_nothing_on_the_cpu(model):
    for plain, captured in zip(answer(model, "cpu", False), answer(model, "cpu", True),
                               strict=True):
        assert torch.equal(plain.tokens, captured.tokens)
        assert torch.equal(plain.confidence, captured.confidence)


def test_what_cannot_be_captured_runs_as_it_is(monkeypatch):
    def refuse(self, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(Captured, "record", refuse)
    double = Captured(lambda x: 2 * x)
    with pytest.warns(UserWarning, match="not recorded, goes on without .operation not permitted"):
        assert double(torch.ones(2)).tolist() == [2, 2]
    assert double(torch.ones(3)).tolist() == [2, 2, 2]  # and is not tried again


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")
def test_what_is_captured_is_replayed_on_other_inputs(model):
    model.cuda()
    for plain, captured in zip(answer(model, "cuda", False), answer(model, "cuda", True),
                               strict=True):
        assert torch.equal(plain.tokens, captured.tokens)
        torch.testing.assert_close(plain.confidence, captured.confidence)
    double = Captured(lambda x: 2 * x)
    for shape in ((3,), (4, 2), (3,)):
        x = torch.randn(shape, device="cuda")
        assert torch.equal(double(x), 2 * x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")
def test_recorded_decoding_on_cuda_gives_the_tokens_of_plain_decoding(config):
    """Batch after batch, of one rounded shape and of others, in float32."""
    model = Diffa2Model(config, llada=FastLlada).eval().cuda()
    for parameter in model.llada.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.7)
    decode = DecodeConfig(gen_length=8, block_length=4, steps=8, factor=None, cache="dual")
    for n_rows, n_audio in ((1, 3), (1, 20), (3, 50), (4, 9), (1, 40)):
        clips = [*torch.randn(n_rows, n_audio, 12, device="cuda")]
        batch = DecodingState(model, clips, [Prompt([7] * 6, 2)] * n_rows, [8] * n_rows, 22)
        plain = list(generate(batch, decode, eos_id=-1))
        fast = list(generate(batch, replace(decode, capture=True), eos_id=-1))
        assert torch.equal(plain[-1].tokens, fast[-1].tokens), (n_rows, n_audio)
    assert {slot.shape for slot in model.llada.slots} == {(1, 64), (4, 64)}
    assert not any(slot.captured.fails for slot in model.llada.slots)
