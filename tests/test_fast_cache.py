"""Recorded decoding, simulated on the CPU: rounded shapes, fused weights and memory that is handed
on give the tokens of plain decoding."""

from types import SimpleNamespace

import pytest
import torch
from test_generate import EOS, random_state, restless_model  # noqa: F401  (a fixture)

from diffa2_mini.config import DecodeConfig, LladaConfig
from diffa2_mini.fast import state
from diffa2_mini.fast.cache import N_SLOTS, Slot
from diffa2_mini.fast.compiling import Captured, compiled
from diffa2_mini.fast.generate import generate
from diffa2_mini.fast.llada import FastLlada, fuse
from diffa2_mini.fast.state import DecodingState
from diffa2_mini.quantize import quantize_linears
from diffa2_mini.tokenizer import Prompt


@pytest.fixture
def recorded(monkeypatch):
    """Recording works on the CPU, with a graph that computes anew from its own inputs into its own
    output, as a CUDA graph does. The shapes that were recorded."""
    shapes = []

    def record(self, inputs):
        shapes.append([*inputs[0].shape])
        output = self.function(*inputs)
        return inputs, SimpleNamespace(replay=lambda: output.copy_(self.function(*inputs))), output

    monkeypatch.setattr(Captured, "record", record)
    monkeypatch.setattr(state, "CAPTURES_ON", ("cpu",))
    return shapes


def settings(capture, **changes):
    return DecodeConfig(**dict(gen_length=8, block_length=4, steps=8, factor=None, cache="dual",
                               capture=capture) | changes)


def batch_of(model, n_rows, n_audio):
    """Clips of one length, with answers of 8 tokens."""
    audio_embeddings = [*torch.randn(n_rows, n_audio, 12)]
    return DecodingState(model, audio_embeddings, [Prompt([7] * 5, 1)] * n_rows, [8] * n_rows, 22)


def decoded(batch, capture, **changes):
    return list(generate(batch, settings(capture, **changes), EOS))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("weights", ["plain", "lora", "int8"])
@torch.no_grad()
def test_recorded_decoding_gives_the_tokens_of_plain_decoding(restless_model, recorded, cache,
                                                              weights):
    if weights == "int8":
        kept = {name: each.clone() for name, each in restless_model.llada.state_dict().items()}
        quantize_linears(restless_model.llada, "int8", kept.get)
    if weights == "lora":
        restless_model.add_lora()
        for name, parameter in restless_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    answers = set()
    for seed in range(30):
        changes = [dict(), dict(factor=1.0), dict(steps=4), dict(threshold=0.5), dict(refresh=2),
                   dict(cfg=0.5), dict(temperature=1.0, seed=seed),
                   dict(threshold=0.5, eos_threshold=0.1, revise=0.3, refresh=2)][seed % 8]
        plain, fast = (decoded(random_state(restless_model, seed), capture, cache=cache, **changes)
                       for capture in (False, True))
        for one, other in zip(plain, fast, strict=True):
            assert torch.equal(one.tokens, other.tokens), seed
            here = one.committed if "eos_threshold" in changes else ...  # columns that are read
            torch.testing.assert_close(one.confidence[here], other.confidence[here], atol=1e-4,
                                       rtol=1e-4)
        answers.add(tuple(plain[-1].tokens.flatten().tolist()))
    assert len(answers) > 25 and recorded
    slot = restless_model.llada.slots[0]
    assert all((each is None) == (weights == "int8") for each in slot.weights)
    assert len(restless_model.llada.slots) <= N_SLOTS


@torch.no_grad()
def test_the_next_clip_and_block_use_what_was_recorded(restless_model, recorded):
    for n_audio in (0, 3, 9, 40):
        for n_rows in (3, 4, 3):
            list(generate(batch_of(restless_model, n_rows, n_audio), settings(True), eos_id=-1))
    assert recorded == [[4, 4, 12]] and len(restless_model.llada.slots) == 1


@pytest.fixture
def graphs(monkeypatch):
    """What was compiled."""
    graphs = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx",
                        lambda graph, inputs: graphs.append(graph) or graph)
    torch._dynamo.reset()
    compiled.cache_clear()
    return graphs


@pytest.mark.parametrize("lora", [False, True])
@torch.no_grad()
def test_a_block_is_compiled_once_for_each_rounded_shape(restless_model, recorded, graphs, lora):
    """And once for the steps that read all: twice for each rounded length."""
    if lora:
        restless_model.add_lora()
    for n_audio, n_compiled in ((3, 2), (20, 2), (70, 4), (9, 4)):
        batch = batch_of(restless_model, 1, n_audio)
        plain, fast = (decoded(batch, capture, compile=capture) for capture in (False, True))
        assert torch.equal(plain[-1].tokens, fast[-1].tokens)
        assert len(graphs) == n_compiled
    decoded(batch_of(restless_model, 1, 3), True)  # not to be compiled, so in a slot of its own
    assert [slot.compiles for slot in restless_model.llada.slots] == [True, True, False]


@torch.no_grad()
def test_the_eleventh_shape_is_compiled_too(restless_model, recorded, graphs):
    """Torch alone would stop at eight, and say nothing."""
    slots = [Slot(restless_model.llada, 1, n, compiles=True) for n in range(1, 12)]
    for slot in slots:
        slot.read_all(torch.randn(1, slot.shape[1], 12), None, torch.arange(slot.shape[1])[None])
    assert len(graphs) == 11


@torch.no_grad()
def test_a_block_in_float8_is_fused_too():
    config = LladaConfig(vocab_size=23, width=32, n_layers=1, n_heads=2, hidden=48)
    llada = FastLlada(config).bfloat16()
    kept = {name: each.clone() for name, each in llada.state_dict().items()}
    quantize_linears(llada, "fp8", kept.get)
    x, positions = torch.randn(2, 8, 32).bfloat16(), torch.arange(8).expand(2, -1)
    try:
        plain = llada(x, None, positions)
    except (NotImplementedError, RuntimeError):
        pytest.skip("this torch has no such product on the CPU")
    slot = Slot(llada, 2, 8)
    assert len(slot.weights[0][2][0]) == 2  # codes and scales
    torch.testing.assert_close(slot.read_all(x, None, positions), plain, atol=0.02, rtol=0.02)


@torch.no_grad()
def test_batches_at_the_same_time_have_memory_of_their_own(restless_model, recorded):
    batches = [random_state(restless_model, 1).rows([i]) for i in (0, 1)]
    alone = [decoded(random_state(restless_model, 1).rows([i]), False)[-1].tokens for i in (0, 1)]
    runs = [generate(batch, settings(True), EOS) for batch in batches]
    last = [None, None]
    for _ in range(8):
        for i, run in enumerate(runs):
            last[i] = next(run, last[i])
    assert all(torch.equal(step.tokens, tokens) for step, tokens in zip(last, alone))
    assert len(restless_model.llada.slots) == 2


@torch.no_grad()
def test_fused_weights_are_the_models_own_and_follow_it(restless_model, recorded):
    llada, one = restless_model.llada, random_state(restless_model, 5).rows([0])
    before = {name: each.clone() for name, each in llada.state_dict().items()}
    first = decoded(one, True)[-1].tokens
    assert all(torch.equal(each, before[name]) for name, each in llada.state_dict().items())
    ((qkv,), _), same = fuse(llada.blocks[0])[2], llada.slots[0].weights[0][2][0][0]
    assert qkv.data_ptr() == same.data_ptr()
    llada.blocks[0].k_proj.weight.mul_(-3)  # in place, as an optimizer does
    assert torch.equal(qkv[12:24], llada.blocks[0].k_proj.weight)
    other = decoded(random_state(restless_model, 5).rows([0]), True)[-1].tokens
    assert torch.equal(other, decoded(random_state(restless_model, 5).rows([0]), False)[-1].tokens)
    restless_model.add_lora()
    for name, parameter in restless_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    learned = decoded(random_state(restless_model, 5).rows([0]), True)[-1].tokens
    plain = decoded(random_state(restless_model, 5).rows([0]), False)[-1].tokens
    assert torch.equal(learned, plain)
    for block in llada.blocks:  # other memory, as after a move to another device
        block.q_proj.weight.data = block.q_proj.weight.data.clone() * 2
    moved = decoded(random_state(restless_model, 5).rows([0]), True)[-1].tokens
    assert torch.equal(moved, decoded(random_state(restless_model, 5).rows([0]), False)[-1].tokens)
    assert len({tuple(each[0].tolist()) for each in (first, other, learned, moved)}) > 2
