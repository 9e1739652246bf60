"""The loader: every epoch has every example once, and processes that load ahead change nothing."""

import multiprocessing
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_data import MICRO, STAGES, dataset_of, examples, features_of, model  # noqa: F401

from diffa2_mini.data import BatchDataset, Entry
from diffa2_mini.errors import UserError
from diffa2_mini.published.tokenizer_json import read_tokenizer_json
from diffa2_mini.training.loader import StageLoader, batches
from diffa2_mini.training.processes import World


@pytest.mark.parametrize("n_examples, batch_size", [(10, 1), (10, 3), (10, 10), (7, 20), (1, 4)])
def test_every_example_is_seen_once_per_epoch_and_resuming_goes_on(n_examples, batch_size):
    n_steps = -(-3 * n_examples // batch_size)
    steps = list(batches(n_examples, batch_size, n_steps, 0, seed=5, stage=2))
    entries = [entry for _, batch in steps for entry in batch]
    assert [step for step, _ in steps] == list(range(n_steps))
    assert all(len(batch) == batch_size for _, batch in steps)
    assert all(entry.place == i % batch_size for i, entry in enumerate(entries))
    assert Counter((e, i) for e, i, _ in entries[:3 * n_examples]) == Counter(
        (e, i) for e in range(3) for i in range(n_examples))
    for first in range(n_steps):
        assert list(batches(n_examples, batch_size, n_steps, first, seed=5,
                            stage=2)) == steps[first:]


def test_each_epoch_each_seed_and_each_stage_has_an_order_of_its_own():
    first, second = (batch for _, batch in batches(50, 50, 2, 0, seed=5, stage=2))
    others = [batch for seed, stage in ((6, 2), (5, 3))
              for _, batch in batches(50, 50, 1, 0, seed, stage)]
    orders = [[number for _, number, _ in batch] for batch in (first, second, *others)]
    assert len({*map(tuple, orders)}) == 4 and sorted(orders[0]) != orders[0]


@pytest.mark.parametrize("n_workers", [0, 1])
def test_each_process_gets_its_part_of_every_step(examples, n_workers):
    dataset, dealt = dataset_of(examples, 2), {}
    for rank in range(2):
        order = batches(len(examples), 5, 3, 1, seed=5, stage=2)
        loader = StageLoader(dataset, order, 2, World(rank, 2), n_workers)
        with loader:
            for step, entries, pieces in loader:
                for batch in pieces:
                    dealt.setdefault((step, tuple(entries)), []).extend(batch.examples)
    expected = dict(batches(len(examples), 5, 3, 1, seed=5, stage=2))
    assert {step: list(entries) for step, entries in dealt} == expected
    for (_, entries), found in dealt.items():
        assert Counter(found) == Counter(examples[i] for _, i, _ in entries)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_workers_change_nothing_and_load_the_clips(model, examples, n_workers):
    dataset, state = dataset_of(examples, 2, load=True), torch.get_rng_state()
    pieces = [[Entry(0, 1), Entry(0, 2)], [Entry(0, 7)], [Entry(1, 0), Entry(0, 3)]]
    loader = StageLoader(dataset, enumerate(pieces), 2, World(), n_workers)
    features = features_of(model, keep=False)
    for step, entries, (batch,) in loader:
        assert entries == pieces[step]
        (piece,) = dataset.micro_batches(entries, 2)
        expected = dataset[piece]
        assert torch.equal(batch.response, expected.response)
        assert torch.equal(batch.noisy, expected.noisy)
        assert torch.equal(batch.encoded(features, "cpu").audio.final,
                           features([e.path for e in batch.examples]).final)
        assert len(batch.clips) == len(batch.examples)
    assert step == 2 and loader.waited > 0
    assert torch.equal(torch.get_rng_state(), state)  # or dropout would depend on the loader


@pytest.fixture(params=multiprocessing.get_all_start_methods())
def start_method(request):
    """How processes are started meanwhile: by fork, spawn or forkserver."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def test_workers_load_clips_however_they_are_started(start_method, examples):
    path = Path(__file__).parent / "golden" / "tokenizer_odd.json"  # with splits of every kind
    dataset = BatchDataset(examples, 42, STAGES[2], MICRO, read_tokenizer_json(path), load=True)
    with StageLoader(dataset, [(0, [Entry(0, 1), Entry(0, 2)])], 2, World(), 1) as loader:
        ((_, entries, (batch,)),) = loader
    (piece,) = dataset.micro_batches(entries, 2)
    expected = dataset[piece]
    assert batch.prompts == expected.prompts and torch.equal(batch.response, expected.response)
    for (mel, frames), (known, n_known) in zip(batch.clips, expected.clips, strict=True):
        assert torch.equal(mel, known) and frames == n_known


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_clip_that_has_gone_is_named_whoever_loads_it(examples, n_workers):
    gone = [replace(examples[0], path=examples[0].path.with_name("gone.wav"))]
    dataset, order = dataset_of(gone, 2, load=True), [(0, [Entry(0, 0)])]
    loader = StageLoader(dataset, order, 1, World(), n_workers)
    with pytest.raises(UserError, match="gone.wav: expected an audio file") as error:
        [list(batches) for *_, batches in loader]
    assert "\n" not in str(error.value)
