"""Batches: what an example gets depends on itself alone."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from diffa2_mini.config import SIZES, AdapterConfig, LladaConfig, WhisperConfig
from diffa2_mini.data import BatchDataset, Entry, Example
from diffa2_mini.diffusion import EPSILON
from diffa2_mini.model import Diffa2Model
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.training.features import FeatureCache
from diffa2_mini.training.loader import batches

TOY, STAGES = SIZES["toy"]
MICRO = replace(  # the toy's front end and tokenizer, little else
    TOY, audio=replace(TOY.audio, max_seconds=1, n_mels=16),
    adapter=AdapterConfig(n_queries=2, qformer_hidden=8), whisper=WhisperConfig(
        n_mels=16, n_positions=50, width=8, n_layers=2, n_heads=2, taps=(1, 2)), llada=LladaConfig(
            vocab_size=TOY.llada.vocab_size, width=8, n_layers=1, n_heads=2, hidden=16))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Diffa2Model(MICRO).eval()


def features_of(model, keep):
    return FeatureCache(model, torch.device("cpu"), torch.float32, keep)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Eight clips of 0.1 to 0.8 s, with answers of 16, 16 and 32 tokens."""
    folder = tmp_path_factory.mktemp("clips")
    words = ["one", "two three four", "a high voice says " + "nine " * 20]
    for i in range(8):
        soundfile.write(folder / f"{i}.wav",
                        np.random.default_rng(i).normal(0, 0.1, 1600 * (i + 1)), 16_000)
    return [
        Example(folder / f"{i}.wav", "What is said?", words[i % 3], words[(i + 1) % 3], "asr",
                "speech", (i + 1) / 10) for i in range(8)]


def batch_of(pairs, examples, model, stage, seed=42, keep=True):
    batch = dataset_of(examples, stage, seed)[pairs]
    return batch.encoded(features_of(model, keep), torch.device("cpu"))


def dataset_of(examples, stage, seed=42, load=False):
    stage = STAGES[stage] if isinstance(stage, int) else stage
    return BatchDataset(examples, seed, stage, MICRO, load_tokenizer(MICRO), load)


@pytest.mark.parametrize("stage", [2, 4])
def test_text_is_cut_at_so_many_tokens(model, examples, stage):
    # the answer of example 2 has 32 tokens
    prompt = len(batch_of([Entry(0, 2)], examples, model, stage).prompts[0].ids)
    for limit, length in ((prompt + 32, 32), (prompt + 31, 31), (prompt + 1, 1), (prompt - 5, 1)):
        cut = replace(STAGES[stage], max_tokens=limit)
        batch = dataset_of(examples, cut)[[Entry(0, 2)]]
        assert batch.valid.sum(1)[0] == length and torch.equal(
            batch.response[0, :length],
            batch_of([Entry(0, 2)], examples, model, stage).response[0, :length])


@pytest.mark.parametrize("stage", [2, 4])
def test_what_an_example_gets_does_not_depend_on_its_batch(model, examples, stage):
    pairs = [Entry(1, 0), Entry(0, 5), Entry(0, 2), Entry(3, 1)]
    whole, n = batch_of(pairs, examples, model, stage), 2 if stage == 4 else 1
    for i, pair in enumerate(pairs):
        alone = batch_of([pair], examples, model, stage)
        R, rows = alone.response.shape[1], slice(n * i, n * i + n)
        assert alone.prompts == whole.prompts[i:i + 1] and alone.examples == whole.examples[i:i + 1]
        assert torch.equal(alone.response, whole.response[rows, :R])
        assert torch.equal(alone.valid, whole.valid[rows, :R])
        torch.testing.assert_close(alone.audio.final, whole.audio.final[i:i + 1])
        if stage == 4:
            assert torch.equal(alone.masked, whole.masked[rows, :, :R])
        else:
            assert torch.equal(alone.weight, whole.weight[rows])
            assert torch.equal(alone.masked, whole.masked[rows, :R])
            assert torch.equal(alone.noisy, whole.noisy[rows, :R])


@pytest.mark.parametrize("stage", [2, 4])
def test_noise_is_keyed_by_seed_stage_epoch_and_number(model, examples, stage):
    def noise(seed, epoch, number, by=stage, kind="answers"):
        row = replace(STAGES[stage], number=by, masking="published")
        dataset = BatchDataset([examples[0]] * 8, seed, row, MICRO, load_tokenizer(MICRO),
                               noise=kind)
        batch = dataset[[Entry(epoch, number)]]
        return batch.masked if stage == 4 else batch.weight

    assert torch.equal(noise(1, 2, 3), noise(1, 2, 3))
    others = ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2), (1, 2, 3, 3),
              (1, 2, 3, stage, "held-out answers"))
    for other in others:
        assert not torch.equal(noise(1, 2, 3), noise(*other))


def test_stage_3_replays_neither_the_noise_nor_the_order_of_stage_2(examples):
    (_, second), (_, third) = (next(batches(8, 8, 1, 0, 42, stage)) for stage in (2, 3))
    numbers = [[entry.number for entry in entries] for entries in (second, third)]
    assert numbers[0] != numbers[1] and sorted(numbers[0]) == sorted(numbers[1])
    second, third = (dataset_of(examples, replace(STAGES[n], masking="published"))[sorted(second)]
                     for n in (2, 3))
    assert torch.equal(second.response, third.response)
    assert not (second.weight == third.weight).any()
    assert not torch.equal(second.masked, third.masked)


@pytest.mark.parametrize("masking", ["published", "low-variance"])
def test_times_are_uniform(examples, masking):
    stage = replace(STAGES[2], masking=masking, batch_size=8)
    dataset = dataset_of([replace(example, answer="one") for example in examples], stage)
    batch = dataset[[Entry(epoch, i, i) for epoch in range(125) for i in range(8)]]
    if masking == "published":
        times = (1 / batch.weight - EPSILON) / (1 - EPSILON)
    else:  # k of 16 tokens, k from 1 to 16: as if a time of each 16th part of 0 ... 1 were rounded
        k = batch.masked.sum(1)
        torch.testing.assert_close(batch.weight, 16 / k)
        times = (k - torch.rand(1000)) / 16
    # Kolmogorov-Smirnov, 1 %
    assert (times.sort().values - torch.linspace(0, 1, 1000)).abs().max() < 1.63 / 1000 ** 0.5


@pytest.mark.parametrize("stage", [2, 4])
def test_training_has_a_system_prompt_of_its_own(examples, stage):
    text = replace(MICRO.text, train_system="Imagine.", system="Listen.")
    tokenizer = load_tokenizer(MICRO)
    dataset = BatchDataset(examples, 0, STAGES[stage], replace(MICRO, text=text), tokenizer)
    assert dataset[[Entry(0, 0)]].prompts == (tokenizer.prompt("Imagine.", "What is said?"),)


@pytest.mark.parametrize("stage", [2, 4])
def test_padding_is_eos_and_never_masked(model, examples, stage):
    batch = batch_of([Entry(0, i) for i in range(8)], examples, model, stage)
    padding = ~batch.valid
    assert padding.any(1).sum() > 2
    assert (batch.response[padding] == load_tokenizer(MICRO).eos_id).all()
    assert (batch.valid.sum(1) % MICRO.text.response_multiple == 0).all()
    assert (batch.valid.long().diff(dim=1) <= 0).all()  # padding is on the right
    if stage == 4:
        assert batch.masked.shape == (16, STAGES[4].vrpo_samples, batch.response.shape[1])
        assert not (batch.masked & padding[:, None]).any() and batch.masked.any(2).all()
        decoded = [load_tokenizer(MICRO).decode(row) for row in batch.response[:2].tolist()]
        assert decoded == [examples[0].answer, examples[0].rejected]
    else:
        assert not (batch.masked & padding).any() and batch.masked.any()
        mask_id = load_tokenizer(MICRO).mask_id
        assert torch.equal(batch.noisy, batch.response.masked_fill(batch.masked, mask_id))


@pytest.mark.parametrize("stage", [1, 2, 4])
def test_lengths_are_those_of_what_is_spliced(model, examples, stage):
    for number in (0, 2, 7):
        batch = batch_of([Entry(0, number)], examples, model, stage)
        lengths = dataset_of(examples, stage).lengths(number)
        _, (before, ) = model.splice(model.embed_audio(batch.audio, STAGES[stage].audio),
                                     batch.prompts)
        assert lengths == [(before, n) for n in batch.valid.sum(1)]


def test_times_of_low_variance_are_spread_over_a_step_and_do_not_depend_on_its_pieces(examples):
    stage = replace(STAGES[2], masking="low-variance", batch_size=8)
    dataset = BatchDataset(examples, 42, stage, MICRO, load_tokenizer(MICRO))
    (_, entries), = batches(8, 8, 1, 0, seed=42, stage=2)
    whole = dataset[entries]
    n_tokens, n_masked = whole.valid.sum(1), whole.masked.sum(1)
    torch.testing.assert_close(whole.weight, n_tokens / n_masked)
    assert not (whole.masked & ~whole.valid).any()
    for place, share in enumerate((1 / whole.weight).tolist()):  # k is the first above R * time
        assert place / 8 < share <= (place + 1) / 8 + 1 / int(n_tokens[place])
    for piece in dataset.micro_batches(entries, 3):
        alone, rows = dataset[piece], [entry.place for entry in piece]
        assert torch.equal(alone.weight, whole.weight[rows])
        assert torch.equal(alone.noisy, whole.noisy[rows, :alone.noisy.shape[1]])


@pytest.mark.parametrize(("masking", "every"), [("half-masked", 2), ("all-masked", 1)])
def test_biased_maskings_mask_one_response_in_so_many_wholly(examples, masking, every):
    (_, entries), = batches(8, 8, 1, 0, seed=42, stage=2)
    of = {name: BatchDataset(examples, 42, replace(STAGES[2], masking=name, batch_size=8), MICRO,
                             load_tokenizer(MICRO))[entries] for name in ("low-variance", masking)}
    batch, other = of[masking], of["low-variance"]
    assert torch.equal(batch.masked[::every], batch.valid[::every])
    assert (batch.weight[::every] == 1).all()
    if every == 2:
        assert torch.equal(batch.noisy[1::2], other.noisy[1::2])
        assert torch.equal(batch.weight[1::2], other.weight[1::2])


def test_half_masked_batches_of_4_have_no_few_masks(examples):
    """What is not masked wholly has the times of its place: the second and the last quarter."""
    shares = []
    for _, entries in batches(8, 4, 20, 0, seed=42, stage=2):
        batch = BatchDataset(examples, 42, replace(STAGES[2], masking="half-masked", batch_size=4),
                             MICRO, load_tokenizer(MICRO))[entries]
        shares += (batch.masked.sum(1) / batch.valid.sum(1))[1::2].tolist()
    assert all(0.25 < share <= 0.5 + 1 / 16 or 0.75 < share <= 1 for share in shares)


def test_a_step_is_divided_into_pieces_of_like_length_the_longest_first(examples):
    pairs, dataset = [Entry(0, i) for i in (3, 0, 7, 2, 5, 1, 6)], dataset_of(examples, 2)
    pieces = dataset.micro_batches(pairs, size=3)
    assert [len(piece) for piece in pieces] == [3, 3, 1]
    assert sorted(sum(pieces, [])) == sorted(pairs)
    lengths = [[sum(dataset.lengths(number)[0]) for _, number, _ in piece] for piece in pieces]
    assert sum(lengths, []) == sorted(sum(lengths, []), reverse=True)
    assert dataset.micro_batches(pairs, size=7) == [sum(pieces, [])]
