"""Encoder, adapters and backbone together: the audio lands in its place, and a batch is its clips
one by one."""

import pytest
import torch

from diffa2_mini.config import DecodeConfig
from diffa2_mini.fast.state import DecodingState
from diffa2_mini.model import lay_out, part_of
from diffa2_mini.tokenizer import Prompt

MASK = 22
PROMPTS = [Prompt([1, 2, 3, 4, 5], 2), Prompt([6, 7, 8], 1), Prompt([9, 10, 11, 12, 13, 14, 15], 6)]
LENGTHS = [16, 3, 9]  # encoder frames that hold sound: 4, 0 and 2 semantic embeddings
RESPONSE = torch.tensor([[16, 17, 18, MASK], [19, MASK, 0, 0], [MASK, MASK, 20, 0]])
VALID = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [True] * 3 + [False]])
DUAL = DecodeConfig(cache="dual")
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
def test_each_clip_has_the_embeddings_of_its_own_length(model, audio, parts, lengths):
    assert [len(row) for row in model.embed_audio(audio, parts)] == lengths


@pytest.mark.parametrize("first", ["prompts", "acoustic"])
def test_the_parts_come_in_order(model, audio, first):
    pieces = [model.embed_audio(audio, (part,)) for part in (first, "semantic")]
    for both, one, other in zip(model.embed_audio(audio, (first, "semantic")), *pieces):
        assert torch.equal(both, torch.cat([one, other]))
    if first == "prompts":
        assert all(torch.equal(row, model.trainable_prompts.weight) for row in pieces[0])


def test_the_audio_lands_at_audio_at_and_the_prompt_is_padded_behind(model, audio):
    audio_embeddings = model.embed_audio(audio, PARTS[1])
    x, lengths = model.splice(audio_embeddings, PROMPTS)
    embed = model.llada.wte
    for row, embeddings, prompt, length in zip(x, audio_embeddings, PROMPTS, lengths):
        end = prompt.audio_at + len(embeddings)
        assert length == len(prompt.ids) + len(embeddings)
        assert torch.equal(row[:prompt.audio_at], embed(torch.tensor(prompt.ids[:prompt.audio_at])))
        assert torch.equal(row[prompt.audio_at:end], embeddings)
        assert torch.equal(row[end:length], embed(torch.tensor(prompt.ids[prompt.audio_at:])))
        assert not row[length:].any()


def test_positions_count_on_from_prompt_to_response_as_if_there_were_no_padding():
    positions, valid = lay_out(torch.tensor([2, 4]), 4,
                               torch.tensor([[True, True, False], [True, False, False]]))
    assert positions.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]
    assert valid.long().tolist() == [[1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("parts", PARTS)
def test_a_batch_equals_its_clips_one_by_one(model, audio, parts):
    batch = model(audio, parts, PROMPTS, RESPONSE, VALID, VALID).split(VALID.sum(1).tolist())
    for i, states in enumerate(batch):
        n, response = VALID[i].sum(), RESPONSE[i:i + 1]
        everything = torch.ones(1, n, dtype=torch.bool)
        alone = model(clip(audio, i), parts, PROMPTS[i:i + 1], response[:, :n], everything,
                      everything)
        torch.testing.assert_close(states, alone, atol=1e-5, rtol=0)


def test_the_audio_of_a_row_reaches_its_own_response_and_no_other(model, audio):
    before = model(audio, PARTS[1], PROMPTS, RESPONSE, VALID, VALID).split(VALID.sum(1).tolist())
    audio.final[0] += torch.randn(16, 8)
    audio.taps[0] += torch.randn(3, 16, 8)
    after = model(audio, PARTS[1], PROMPTS, RESPONSE, VALID, VALID).split(VALID.sum(1).tolist())
    assert not torch.allclose(before[0], after[0], atol=1e-4)
    assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])


def test_states_come_at_the_selected_tokens_in_row_order(model, audio):
    everything = torch.ones_like(VALID)
    full = model(audio, PARTS[1], PROMPTS, RESPONSE, VALID, everything).view(3, 4, 12)
    select = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]]).bool()
    some = model(audio, PARTS[1], PROMPTS, RESPONSE, VALID, select)
    torch.testing.assert_close(some, torch.stack([full[0, 1], full[0, 3], full[2, 0], full[2, 2]]))


def test_n_responses_to_a_clip_equal_the_clip_n_times(model, audio):
    response, valid = RESPONSE.repeat_interleave(2, 0), VALID.repeat_interleave(2, 0)
    response[1::2] = response[1::2].flip(1)
    valid[:] = True
    twice = type(audio)(*(part.repeat_interleave(2, 0)
                          for part in (audio.final, audio.taps, audio.n_frames)))
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    shared = model(audio, PARTS[1], PROMPTS, response, valid, valid)
    torch.testing.assert_close(shared, model(twice, PARTS[1], prompts, response, valid, valid))


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
    model(audio, parts[:2], PROMPTS, RESPONSE, VALID, VALID).square().sum().backward()
    reached = {
        part_of(name)
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.any()}
    assert reached == set(parts) and all(p.grad is not None for p in trained.values())


def test_everything_is_frozen_at_first_and_lora_starts_as_the_identity(model, audio):
    assert not any(p.requires_grad for p in model.parameters())
    before = model(audio, PARTS[1], PROMPTS, RESPONSE, VALID, VALID)
    model.add_lora()
    assert torch.equal(model(audio, PARTS[1], PROMPTS, RESPONSE, VALID, VALID), before)


def state(model, audio_embeddings, prompts=PROMPTS, lengths=(4, 2, 3)):
    return DecodingState(model, audio_embeddings, prompts, list(lengths), MASK)


def test_the_unconditional_state_has_the_audio_and_no_prompt(model, audio):
    audio_embeddings = model.embed_audio(audio, PARTS[1])
    others = [Prompt([21] * len(p.ids), p.audio_at) for p in PROMPTS]
    unreadable = [torch.zeros_like(row) for row in audio_embeddings]
    assert not torch.allclose(
        state(model, audio_embeddings).forward_all(RESPONSE),
        state(model, audio_embeddings, others).forward_all(RESPONSE), atol=1e-4)
    unconditional = state(model, audio_embeddings).unconditional().forward_all(RESPONSE)
    assert torch.equal(unconditional,
                       state(model, audio_embeddings, others).unconditional().forward_all(RESPONSE))
    assert not torch.allclose(unconditional,
                              state(model, unreadable).unconditional().forward_all(RESPONSE),
                              atol=1e-4)


def test_decoding_computes_what_training_does_and_its_rows_as_if_alone(model, audio):
    audio_embeddings = model.embed_audio(audio, PARTS[1])
    read = state(model, audio_embeddings).forward_all(RESPONSE)
    expected = model.hidden_states(audio_embeddings, PROMPTS, RESPONSE, VALID)
    torch.testing.assert_close(read[VALID], expected[VALID])
    for i in range(3):
        n = int(VALID[i].sum())
        alone = state(model, audio_embeddings).rows([i])
        assert (alone.valid is None) and alone.response.shape == (1, n)
        torch.testing.assert_close(
            alone.forward_all(RESPONSE[i:i + 1, :n])[0], read[i, :n], atol=1e-5, rtol=0)


def test_a_cached_block_is_exact_if_nothing_else_has_changed_and_depends_on_the_cache(model, audio):
    other = RESPONSE.clone()
    other[:, 1] = 5
    again = state(model, model.embed_audio(audio, PARTS[1]))
    before = again.forward_all(RESPONSE, DUAL)
    torch.testing.assert_close(again.forward_block(RESPONSE, 1, 3), before[:, 1:3], atol=1e-5,
                               rtol=0)
    changed = again.forward_block(other, 1, 2)  # the cached others do not know of the change
    assert not torch.allclose(changed, before[:, 1:2], atol=1e-4)
    assert not torch.allclose(changed, again.forward_all(other)[:, 1:2], atol=1e-6)
    first = again.forward_block(RESPONSE, 0, 1)  # and what is cached of the changed one is new
    assert not torch.allclose(first, before[:, :1], atol=1e-6)
    again.forward_all(other, DUAL)
    torch.testing.assert_close(again.forward_block(other, 1, 2),
                               again.forward_all(other)[:, 1:2], atol=1e-5, rtol=0)


def test_the_cache_is_in_the_dtype_of_the_computation(model, audio):
    model.add_lora()
    for dtype, autocast in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True)):
        model.llada.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            again = state(model, model.embed_audio(audio, PARTS[1]))
            again.forward_all(RESPONSE, DUAL)
            assert again.caches[0].keys.dtype == (torch.bfloat16 if autocast else torch.float32)
            assert again.forward_block(RESPONSE, 1, 3).shape == (3, 2, 12)
