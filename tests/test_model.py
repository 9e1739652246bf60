"""Encoder, adapters and backbone together: the audio lands in its place, and a batch is its clips one by one."""

import pytest
import torch

from diffa2_mini.model import part_of
from diffa2_mini.tokenizer import Prompt

MASK = 22
PROMPTS = [Prompt([1, 2, 3, 4, 5], 2), Prompt([6, 7, 8], 1), Prompt([9, 10, 11, 12, 13, 14, 15], 6)]
LENGTHS = [16, 3, 9]  # encoder frames that hold sound: 4, 0 and 2 semantic embeddings
RESPONSE = torch.tensor([[16, 17, 18, MASK], [19, MASK, 0, 0], [MASK, MASK, 20, 0]])
REAL = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [True] * 3 + [False]])
PARTS = [("prompts", "semantic"), ("acoustic", "semantic")]


@pytest.fixture
def audio(model):
    return model.encode(torch.randn(3, 5, 32), torch.tensor(LENGTHS))


def clip(audio, i):
    return type(audio)(audio.final[i:i + 1], audio.taps[i:i + 1], audio.n_frames[i:i + 1])


def test_encode_keeps_no_graph(model, audio):
    model.requires_grad_(True)
    encoded = model.encode(torch.randn(1, 5, 32), torch.tensor([16]))
    assert not encoded.final.requires_grad and not encoded.taps.requires_grad
    assert audio.final.shape == (3, 16, 8) and audio.taps.shape == (3, 3, 16, 8)


@pytest.mark.parametrize("parts, lengths", [(PARTS[0], [6, 2, 4]), (PARTS[1], [7, 3, 5])])
def test_each_clip_is_heard_in_its_own_length(model, audio, parts, lengths):
    assert [len(row) for row in model.hear(audio, parts)] == lengths


@pytest.mark.parametrize("first", ["prompts", "acoustic"])
def test_the_parts_are_heard_in_order(model, audio, first):
    pieces = [model.hear(audio, (part,)) for part in (first, "semantic")]
    for both, one, other in zip(model.hear(audio, (first, "semantic")), *pieces):
        assert torch.equal(both, torch.cat([one, other]))
    if first == "prompts":
        assert all(torch.equal(row, model.trainable_prompts.weight) for row in pieces[0])


def test_the_audio_lands_at_audio_at_and_the_response_at_the_end(model, audio):
    heard = model.hear(audio, PARTS[1])
    x, x_real, at = model.splice(heard, PROMPTS, RESPONSE, REAL)
    embed = model.llada.wte
    for b, (embeddings, prompt) in enumerate(zip(heard, PROMPTS)):
        end = prompt.audio_at + len(embeddings)
        assert torch.equal(x[b, :prompt.audio_at], embed(torch.tensor(prompt.ids[:prompt.audio_at])))
        assert torch.equal(x[b, prompt.audio_at:end], embeddings)
        rest = torch.tensor(prompt.ids[prompt.audio_at:])
        assert torch.equal(x[b, end:end + len(rest)], embed(rest))
        assert at[b].tolist() == list(range(end + len(rest), end + len(rest) + 4))
        assert torch.equal(x[b, at[b]], embed(RESPONSE[b]))
        assert x_real[b].tolist() == [i < at[b, 0] + REAL[b].sum() for i in range(x.shape[1])]


@pytest.mark.parametrize("parts", PARTS)
def test_a_batch_equals_its_clips_one_by_one(model, audio, parts):
    batch = model(audio, parts, PROMPTS, RESPONSE, REAL, REAL).split(REAL.sum(1).tolist())
    for i, logits in enumerate(batch):
        n, response = REAL[i].sum(), RESPONSE[i:i + 1]
        everything = torch.ones(1, n, dtype=torch.bool)
        alone = model(clip(audio, i), parts, PROMPTS[i:i + 1], response[:, :n], everything, everything)
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)


def test_the_audio_of_a_row_reaches_its_own_response_and_no_other(model, audio):
    before = model(audio, PARTS[1], PROMPTS, RESPONSE, REAL, REAL).split(REAL.sum(1).tolist())
    audio.final[0] += torch.randn(16, 8)
    audio.taps[0] += torch.randn(3, 16, 8)
    after = model(audio, PARTS[1], PROMPTS, RESPONSE, REAL, REAL).split(REAL.sum(1).tolist())
    assert not torch.allclose(before[0], after[0], atol=1e-4)
    assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])


def test_logits_come_at_the_selected_tokens_in_row_order(model, audio):
    everything = torch.ones_like(REAL)
    full = model(audio, PARTS[1], PROMPTS, RESPONSE, REAL, everything).view(3, 4, 23)
    select = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]]).bool()
    some = model(audio, PARTS[1], PROMPTS, RESPONSE, REAL, select)
    torch.testing.assert_close(some, torch.stack([full[0, 1], full[0, 3], full[2, 0], full[2, 2]]))


def test_n_responses_to_a_clip_equal_the_clip_n_times(model, audio):
    response, real = RESPONSE.repeat_interleave(2, 0), REAL.repeat_interleave(2, 0)
    response[1::2] = response[1::2].flip(1)
    real[:] = True
    twice = type(audio)(*(part.repeat_interleave(2, 0) for part in (audio.final, audio.taps, audio.n_frames)))
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    shared = model(audio, PARTS[1], PROMPTS, response, real, real)
    torch.testing.assert_close(shared, model(twice, PARTS[1], prompts, response, real, real))


@pytest.mark.parametrize("parts", [(), ("semantic",), *PARTS, ("acoustic", "semantic", "lora")])
def test_train_only_frees_exactly_the_named_parts(model, parts):
    model.add_lora()
    model.requires_grad_(True)
    trained = model.train_only(parts)
    assert set(trained) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {part_of(name) for name in trained} == set(parts)
    assert set(trained) == {name for name, _ in model.named_parameters() if part_of(name) in parts}


@pytest.mark.parametrize("parts", [*PARTS, ("acoustic", "semantic", "lora")])
def test_the_loss_reaches_every_part_that_a_stage_trains(model, audio, parts):
    model.add_lora()
    trained = model.train_only(parts)
    model(audio, parts[:2], PROMPTS, RESPONSE, REAL, REAL).square().sum().backward()
    reached = {part_of(name) for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == set(parts) and all(p.grad is not None for p in trained.values())


def test_everything_is_frozen_at_first_and_lora_starts_as_the_identity(model, audio):
    assert not any(p.requires_grad for p in model.parameters())
    before = model(audio, PARTS[1], PROMPTS, RESPONSE, REAL, REAL)
    model.add_lora()
    assert torch.equal(model(audio, PARTS[1], PROMPTS, RESPONSE, REAL, REAL), before)


def test_the_unconditional_prediction_hears_the_audio_but_reads_no_prompt(model, audio):
    heard = model.hear(audio, PARTS[1])
    predict = model.predictor(heard, PROMPTS, MASK)
    other = model.predictor(heard, [Prompt([21] * len(p.ids), p.audio_at) for p in PROMPTS], MASK)
    deaf = model.predictor([torch.zeros_like(row) for row in heard], PROMPTS, MASK)
    everything = torch.ones_like(REAL)
    assert torch.equal(predict(RESPONSE).flatten(0, 1), model.read(heard, PROMPTS, RESPONSE, everything, everything))
    assert not torch.allclose(predict(RESPONSE), other(RESPONSE), atol=1e-4)
    assert torch.equal(predict(RESPONSE, conditional=False), other(RESPONSE, conditional=False))
    assert not torch.allclose(predict(RESPONSE, conditional=False), deaf(RESPONSE, conditional=False), atol=1e-4)
