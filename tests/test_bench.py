"""A whole size is measured, and what that is measured against."""

import dataclasses
import json
import math

import pytest
import torch

from diffa2_mini import config as configs
from diffa2_mini.bench import __main__ as bench
from diffa2_mini.bench import decoders
from diffa2_mini.command.script import run_script
from diffa2_mini.config import AudioConfig
from diffa2_mini.data import read_manifest
from diffa2_mini.fast import measure
from diffa2_mini.listen import decode_settings

CPU = torch.device("cpu")


def test_a_whole_size_is_measured_stage_by_stage(config, monkeypatch, tmp_path, capsys):
    micro = dataclasses.replace(config, audio=AudioConfig(n_mels=5, max_seconds=1),
                                text=configs.SIZES["full"][0].text,
                                whisper=dataclasses.replace(config.whisper, n_positions=50),
                                llada=dataclasses.replace(config.llada, vocab_size=126_464),
                                decode=configs.DecodeConfig(gen_length=8, block_length=8, steps=8))
    monkeypatch.setitem(configs.SIZES, "full", (micro, configs.SIZES["full"][1]))
    for name in ("matmul_ceiling", "copy_bandwidth"):
        monkeypatch.setattr(bench, name, lambda *about: 1e9)
    command = ["--size", "full", "--random-weights", "--runs", "1", "--out",
               str(tmp_path / "full.json"), "--device", "cpu", "--dtype", "float32"]
    assert run_script(bench.main, command) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "full.json").read_text())["rows"]
    trained = [row for row in rows[11:] if row["of"] == "of the matmul ceiling (MFU)"]
    assert rows[8]["case"] == "its first run, which prepares" and rows.pop(8)["ratio"] is None
    assert [row["of"].split(" (")[0] for row in rows[:11]] == [
        "TB/s", "TFLOP/s", *["GiB"] * 5, "real-time factor", "times the reading of the weights",
        *["times the throughput of one"] * 2]
    assert len(trained) == len(rows[11:]) and [row["variant"] for row in trained[:2]] == [
        "1 at once", "2 at once"]
    assert {row["case"] for row in trained} == {"stage 1, training", "stage 3, training"}
    assert all(row["ratio"] > 0 and math.isfinite(row["ratio"]) for row in rows)


@pytest.mark.parametrize("flags, message", [
    *((flags, "a CPU and the toy's caches are measured by 'python tutorials/speed.py'")
      for flags in ([], ["--only", "decoding"], ["--toy", "--data", "world"])),
    (["--size", "full", "--quantize", "int8", "fp8", "--device", "cpu"], "got device cpu; use"),
    (["--decoders", "--quantize", "int8"], "are of --decoders, and --quantize"),
    (["--size", "toy", "--random-weights", "--limit", "3"], "are of --decoders, and --quantize")])
def test_what_cannot_be_measured_is_said_before_all_else(flags, message, capsys):
    assert run_script(bench.main, flags) == 2
    printed, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not printed


def test_ceilings_are_measured():
    assert 1e8 < measure.matmul_ceiling(CPU, torch.float32) < 1e15
    assert 1e8 < measure.copy_bandwidth(CPU) < 1e13


def ask_toy(tmp_path, file, *flags):
    out = tmp_path / "decoders.json"
    command = ["--decoders", "--file", str(file), "--out", str(out), "--threads", "1", *flags]
    assert run_script(bench.main, command) == 0
    return json.loads(out.read_text())["rows"]


@pytest.mark.parametrize("rows, message", [
    ([{"id": "a", "audio_path": "a.wav", "question": "?", "choices": ["a", "b"], "answer": "a"}],
     "a.json"), ([5], "expected an object, got int")])
def test_files_without_questions_that_can_be_asked_are_one_line(rows, message, tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert run_script(bench.main, ["--decoders", "--file", str(tmp_path / "a.json")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_every_rule_of_decoding_gets_a_row(world, tmp_path, monkeypatch):
    some = [{}, dict(steps=16), dict(eos_threshold=0.9), dict(factor=2.0, revise=0.5),
            dict(block_length=4, cache="dual")]
    every = decoders.rules(16)
    for changes in every:
        decode_settings(configs.SIZES["toy"][0].decode, **changes)
        decode_settings(configs.SIZES["small"][0].decode, **changes)
    assert len({*map(str, every)}) == len(every)
    monkeypatch.setattr(decoders, "rules", lambda length: some)
    rows = ask_toy(tmp_path, world / "validation.json", "--limit", "4")
    assert [row["variant"] for row in rows] == [
        "as it is", "steps 16", "eos_threshold 0.9", "factor 2.0, revise 0.5",
        "block_length 4, cache dual"]
    assert rows[1]["ratio"] <= 1 <= rows[0]["ratio"]  # one by one, up to the end or beyond
    assert all("overall" in row["of"] and row["seconds"][0] > 0 for row in rows)


def test_toybench_and_one_type_of_a_manifest_are_asked_too(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decoders, "rules", lambda length: [{}])
    rows = read_manifest(world / "stage1.json")[:3]
    clip, said = rows[0]["audio_filepath"], rows[0]["transcription"]
    entry = {"id": "1", "audio_id": clip, "question": configs.TextConfig().instruction,
             "choices": [said, "nothing"], "answer": said, "difficulty": "free"}
    file = world / "asked.json"
    file.write_text(json.dumps([entry]))
    assert ask_toy(tmp_path, file)[0]["case"] == "1 answers"
    file.write_text(json.dumps([entry, entry | {"id": "2", "sub-category": "asr"}]))
    assert ask_toy(tmp_path, file, "--type", "asr")[0]["case"] == "1 answers"
    (row,) = ask_toy(tmp_path, world / "stage1.json", "--type", "asr", "--limit", "2")
    assert row["case"] == "2 answers" and "wer" in row["of"]
    for asked in (file, world / "stage1.json"):
        assert run_script(bench.main, ["--decoders", "--file", str(asked), "--type", "order"]) == 2
        assert "expected questions of type order" in capsys.readouterr().err
