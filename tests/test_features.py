"""What is kept of the encoder's work is, bit for bit, what it would do again."""

import dataclasses
import json
import os
import shutil
import time
from contextlib import nullcontext

import pytest
import torch
from test_data import MICRO, STAGES, examples, features_of, model  # noqa: F401  (fixtures)

import sample
import train
from diffa2_mini import data, listen
from diffa2_mini.audio import log_mel
from diffa2_mini.command.script import run_script
from diffa2_mini.config import DATA
from diffa2_mini.errors import UserError
from diffa2_mini.evaluate import __main__ as evaluate
from diffa2_mini.model import Diffa2Model
from diffa2_mini.training import features
from diffa2_mini.training.features import NAMES, FeatureCache
from diffa2_mini.training.processes import World

CPU = torch.device("cpu")


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in NAMES)


@pytest.fixture
def paths(examples, tmp_path):
    return [shutil.copy(examples[i].path, tmp_path / f"{i}.wav") for i in (3, 0, 7)]


def on_disk(model, folder, dtype=torch.float32):
    return FeatureCache(model, CPU, dtype, folder=folder)


def test_kept_in_memory(model, paths):
    fresh, features = features_of(model, keep=False), features_of(model, keep=True)
    features.prepare(paths + paths, lambda chunks: chunks)
    expected = fresh(paths)
    features.encode = None  # nothing is computed again
    assert same(features(paths), expected) and expected.n_frames.tolist() == [20, 5, 40]
    assert features([paths[2], paths[0]]).n_frames.tolist() == [40, 20]
    assert not fresh.memory and not fresh.keeps_features and features.keeps_features


def test_what_is_kept_lies_in_blocks_and_leaves_no_holes_between(model, paths, monkeypatch):
    kept = features_of(model, keep=True)
    audios = [kept.get(path) for path in paths]
    tensors = [tensor for audio in audios for tensor in (audio.final, audio.taps)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    monkeypatch.setattr(features, "BLOCK", tensors[0].numel() + 1)  # taps do not fit behind it
    narrow = features_of(model, keep=True)
    assert all(same(narrow.get(path), audio) for path, audio in zip(paths, audios))


def test_a_batch_is_its_clips_one_by_one(model, paths):
    together = features_of(model, keep=False)(paths)
    for i, path in enumerate(paths):
        alone = features_of(model, keep=False)([path])
        assert torch.equal(alone.final[0], together.final[i])
        assert torch.equal(alone.taps[0], together.taps[i])


def test_where_only_sound_is_read_no_other_frame_is_kept_and_a_half_of_the_bits(paths, tmp_path):
    adapter = dataclasses.replace(MICRO.adapter, only_sound=True)
    model = Diffa2Model(dataclasses.replace(MICRO, adapter=adapter)).eval()
    clips = [data.load_clip(path, MICRO.audio) for path in paths]
    expected = [model.encode(mel[None], torch.tensor([n])) for mel, n in clips]
    for made in (features_of(model, keep=True), on_disk(model, tmp_path / "cache")):
        made.prepare(paths, lambda chunks: chunks)
        kept = [made.get(path) for path in paths]
        assert [len(audio.final) for audio in kept] == [20, 5, 40]
        assert {audio.taps.dtype for audio in kept} == {torch.float16}
        batch = made(paths)
        assert batch.n_frames.tolist() == [20, 5, 40] and batch.final.dtype == torch.float32
        for i, (alone, n) in enumerate(zip(expected, (20, 5, 40))):
            assert torch.equal(batch.final[i, :n], alone.final[0, :n].half().float())
            assert torch.equal(batch.taps[i, :, :n], alone.taps[0, :, :n].half().float())
            assert not batch.final[i, n:].any() and not batch.taps[i, :, n:].any()


def test_kept_on_disk_for_the_next_run_too(model, paths, tmp_path):
    expected = features_of(model, keep=False)(paths)
    on_disk(model, tmp_path / "cache").prepare(paths, lambda chunks: chunks)
    other = on_disk(model, tmp_path / "cache")
    other.encode = None
    assert same(other(paths), expected)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3
    asked = []
    other.prepare(paths, lambda chunks: asked.append(chunks) or chunks)
    assert asked == [[]]  # all of it is there


class Beside(World):
    """One of several processes, told apart from the others by nothing but its number."""

    def gather(self, items):
        return items * self.size


@pytest.mark.parametrize("keep", [False, True])
def test_processes_at_their_own_pace_encode_all_clips_between_them(model, paths, tmp_path, keep):
    for rank in range(2):  # the second looks at the folder when the first is done
        features = FeatureCache(model, CPU, torch.float32, keep, tmp_path / "cache")
        features.prepare(paths, lambda chunks: chunks, world=Beside(rank, 2))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3


def test_a_cache_that_cannot_be_written_is_no_broken_clip(model, paths, tmp_path):
    features = FeatureCache(model, CPU, torch.float32, True, tmp_path / "cache")
    features.file_of(paths[1]).mkdir(parents=True)
    with pytest.raises(UserError, match="could not be written"):
        features.prepare(paths, lambda chunks: chunks, skip_broken=True)


def test_the_space_of_all_processes_is_asked_for(model, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage",
                        lambda path: shutil._ntuple_diskusage(0, 0, 3 * 3 * 50 * 8 * 4))
    with pytest.raises(UserError, match="for 4 clips"):  # each has two of them
        on_disk(model, tmp_path / "cache").prepare(paths, lambda chunks: chunks, world=Beside(0, 2))


def test_where_only_sound_is_kept_less_space_is_asked_for(paths, tmp_path, monkeypatch):
    adapter = dataclasses.replace(MICRO.adapter, only_sound=True)
    model = Diffa2Model(dataclasses.replace(MICRO, adapter=adapter)).eval()
    size = 3 * 3 * 50 * 8 * 2  # of three clips, in float16
    for free in (size, size + 1):
        monkeypatch.setattr(shutil, "disk_usage",
                            lambda path, free=free: shutil._ntuple_diskusage(0, 0, free))
        features = on_disk(model, tmp_path / "cache")
        with nullcontext() if free > size else pytest.raises(UserError, match="for 3 clips"):
            features.prepare(paths, lambda chunks: chunks)


def test_waiting_for_the_disk_is_counted(model, paths, tmp_path, monkeypatch):
    disk = on_disk(model, tmp_path / "cache")
    disk(paths)
    before = disk.waited
    slow = features.safe_open
    monkeypatch.setattr(features, "safe_open", lambda *asked: time.sleep(0.05) or slow(*asked))
    disk(paths)
    assert 3 * 0.05 <= disk.waited - before


def test_what_is_no_longer_true_is_not_taken_from_disk(model, paths, tmp_path):
    cache = tmp_path / "cache"
    before = on_disk(model, cache)(paths)
    torch.manual_seed(1)
    assert not same(on_disk(Diffa2Model(MICRO).eval(), cache)(paths), before)  # another encoder
    shutil.copy(paths[2], paths[0])
    os.utime(paths[0], (1, 1))
    changed = on_disk(model, cache)(paths)
    assert torch.equal(changed.final[0], before.final[2])
    assert torch.equal(changed.final[1:], before.final[1:])
    for file in cache.rglob("*.safetensors"):  # damaged
        file.write_bytes(file.read_bytes()[:-7])
    assert same(on_disk(model, cache)(paths), changed)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("folder", [None, "cache"])
def test_what_clips_lack_is_noted(model, paths, tmp_path, keep, folder):
    paths[1].write_bytes(paths[1].read_bytes()[:-1000])
    for _ in range(2):  # the second time from the folder
        features = FeatureCache(model, CPU, torch.float32, keep, folder and tmp_path / folder)
        features.prepare(paths, lambda chunks: chunks)
        features(paths)
        ((path, line),) = features.incomplete.items()
        assert path == paths[1] and "got 0.07 s" in line


def test_another_precision_has_files_of_its_own(model, paths, tmp_path):
    names = {on_disk(model, tmp_path, dtype).folder for dtype in (torch.float32, torch.bfloat16)}
    assert len(names) == 2


def test_too_little_space_is_refused_before_anything_is_written(model, paths, tmp_path,
                                                                monkeypatch):
    size = 3 * (2 + 1) * 50 * 8 * 4  # clips, hidden states, frames, width, bytes
    for free, fits in ((size + 1, True), (size, False)):
        usage = shutil._ntuple_diskusage(0, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        features = on_disk(model, tmp_path / f"cache{fits}")
        if fits:
            features.prepare(paths, lambda chunks: chunks)
        else:
            with pytest.raises(UserError,
                               match="--cache-audio .*expected 0.0 GiB free for 3 clips"):
                features.prepare(paths, lambda chunks: chunks)
            assert not (tmp_path / "cacheFalse").exists()


@pytest.fixture
def front_end(monkeypatch):
    """What every log-mel was computed in: its dtype, and whether autocast was on."""
    seen, plain = [], log_mel

    def watched(samples, config):
        mel = plain(samples, config)
        seen.append((mel.dtype, torch.is_autocast_enabled("cpu")))
        return mel

    for module in (data, listen):
        monkeypatch.setattr(module, "log_mel", watched)
    return seen


@pytest.mark.parametrize("command", ["sample", "evaluate", "train"])
def test_the_log_mel_is_in_float32_in_bfloat16_too(command, front_end, world, tmp_path):
    out, clip = str(tmp_path / "out.jsonl"), DATA / "clips" / "three_one_four.wav"
    rows = [{"audio_filepath": str(clip), "transcription": "three one four"}]
    (tmp_path / "asr.json").write_text(json.dumps(rows))
    main, flags = {
        "sample": (sample.main, [str(clip)]),
        "evaluate": (evaluate.main, ["--benchmark", "asr", "--file", str(tmp_path / "asr.json"),
                                     "--out", out]),
        "train": (train.main, ["--stage", "1", "--data", str(world), "--no-cache-audio",
                               "--out", out, "--steps", "1", "--batch-size", "2",
                               "--sample-every", "1", "--threads", "1", "--workers", "0"]),
    }[command]
    assert run_script(main, [*flags, "--dtype", "bfloat16"]) == 0
    assert len(front_end) >= (6 if command == "train" else 1)  # those that are measured, too
    assert {*front_end} == {(torch.float32, False)}
