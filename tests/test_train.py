"""train.py as a user runs it: four stages in miniature, stopped, killed, resumed, and given what it
cannot use."""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from mini import MINI, ROOT, SECONDS, command, logged, refused, same, started_by, train_here
from test_files import held
from test_weights import other_part

import sample
import train
from data import librispeech, toy
from data.pretraining import backbone
from data.pretraining.encoder import is_segment
from diffa2_mini import weights
from diffa2_mini.command.script import run_script
from diffa2_mini.config import SIZES
from diffa2_mini.data import read_manifest
from diffa2_mini.errors import UserError
from diffa2_mini.evaluate import __main__ as evaluate
from diffa2_mini.evaluate.validation import Validator
from diffa2_mini.model import part_of
from diffa2_mini.training import dry_run
from diffa2_mini.training import run as run_module
from diffa2_mini.training.checkpoint import export, fingerprint, load_checkpoint, save_checkpoint
from diffa2_mini.training.processes import World
from diffa2_mini.training.run import StageParameters, optimizer_step


def test_four_stages_leave_checkpoints_a_log_and_a_table(whole):
    out, printed = whole
    assert json.loads((out / "config.json").read_text())["config"]["size"] == "toy"
    steps = [(row["stage"], row["step"]) for row in logged(out) if "loss" in row]
    assert steps == [(stage, step) for stage in (1, 2, 3, 4) for step in (1, 2, 3, 4)]
    assert {row["stage"] for row in logged(out) if "overall" in row} == {1, 2, 3, 4}
    assert "trainable parameters: 190,912" in printed and "+abcd" in printed


def test_each_stage_trains_its_parts_and_no_other(whole):
    out, _ = whole
    before = load_checkpoint(out / "stage1.safetensors").model
    adapters = {"semantic", "acoustic"}
    for number, parts in ((2, adapters), (3, adapters | {"lora"}), (4, adapters | {"lora"})):
        after = load_checkpoint(out / f"stage{number}.safetensors").model
        changed = {part_of(name) for name in after
                   if name not in before or not torch.equal(after[name], before[name])}
        assert changed == parts
        before = after


def test_preference_training_starts_at_log_2_and_a_margin_of_zero(whole):
    first = next(row for row in logged(whole[0]) if row["stage"] == 4)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)  # float32, of numbers up to 100
    assert first["margin"] == pytest.approx(0, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_workers_change_nothing_however_they_are_started(world, whole, tmp_path, method):
    out = tmp_path / "out"
    arguments = command(world, out, "--stage", "1", "--workers", "2", "--no-cache-audio")
    done = subprocess.run(arguments, env=started_by(method, tmp_path), capture_output=True,
                          text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert same(out, whole[0], stages=(1,))


@pytest.mark.parametrize("signum", [
    signal.SIGKILL, *(pytest.param(other, marks=pytest.mark.slow)
                      for other in (signal.SIGINT, signal.SIGTERM))])
def test_a_stopped_run_resumes_to_bit_identical_weights_and_log(world, whole, tmp_path, signum):
    process = subprocess.Popen(command(world, tmp_path), stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    deadline = time.time() + SECONDS
    # until stage 3 has left a checkpoint in its middle
    while time.time() < deadline:
        path = tmp_path / "stage3.safetensors"
        if path.exists():
            break
        time.sleep(0.01)
    process.send_signal(signum)
    printed, _ = process.communicate(timeout=SECONDS)
    load_checkpoint(path)
    # in stage 3, or at least in stage 4
    assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum)
    assert ("--resume" in printed) == (signum != signal.SIGKILL)
    train_here(world, tmp_path, "--resume")
    assert same(tmp_path, whole[0])


@pytest.mark.parametrize("flags", [["--workers", "2"], ["--cache-audio", "CACHE"]])
def test_workers_and_a_cache_on_disk_change_nothing(world, whole, tmp_path, flags):
    flags = [str(tmp_path / flag) if flag == "CACHE" else flag for flag in flags]
    train_here(world, tmp_path / "out", "--stage", "1", "--no-cache-audio", *flags)
    assert same(tmp_path / "out", whole[0], stages=(1,))
    assert ("--workers" in flags) != any((tmp_path / "CACHE").rglob("*.safetensors"))


@pytest.mark.parametrize("n_pieces", [1, 3])
def test_the_gradient_of_a_step_is_clipped_to_its_norm(monkeypatch, n_pieces):
    weight, batch = torch.nn.Parameter(torch.zeros(4)), SimpleNamespace(broken={}, incomplete={})
    batch.masked, batch.encoded = torch.ones(1), lambda features, device: batch
    monkeypatch.setattr(run_module, "piece_loss", lambda *_: {"loss": 5 * weight.sum() / n_pieces})
    run = SimpleNamespace(world=World(), model=None, tokenizer=None, dtype=torch.float32,
                          device=torch.device("cpu"), features=SimpleNamespace(incomplete={}),
                          signals=SimpleNamespace(received=None))
    parameters = StageParameters(dataclasses.replace(SIZES["toy"][1][1], grad_clip=0.5),
                                 {"weight": weight}, {}, torch.optim.SGD([weight], lr=1.0))
    figures = optimizer_step(run, parameters, 16, iter([batch] * n_pieces))
    assert figures["grad_norm"] == pytest.approx(10) and figures["masked"] == n_pieces
    torch.testing.assert_close(weight.detach(), torch.full((4,), -0.25))  # of norm 0.5


def test_dropout_acts_and_is_drawn_anew_for_each_step(world, whole, tmp_path):
    """So that a run that goes on has the numbers of one that was not stopped."""
    out, again = tmp_path / "out", tmp_path / "again"
    flags = ["--stage", "3", "--lora-dropout", "0.3", "--adapter-dropout", "0.2",
             "--init", str(whole[0] / "stage2.safetensors")]
    train_here(world, out, *flags)
    losses = [[row["loss"] for row in logged(folder) if row["stage"] == 3 and "loss" in row]
              for folder in (out, whole[0])]
    assert all(dropped != kept for dropped, kept in zip(*losses, strict=True))
    again.mkdir()
    shutil.copy(out / "log.jsonl", again)
    shutil.copy(out / "stage3.previous.safetensors", again / "stage3.safetensors")
    train_here(world, again, *flags, "--resume")
    assert same(again, out, stages=(3,))


def test_a_part_of_the_validation_is_asked_as_often_as_is_said(world, tmp_path):
    train_here(world, tmp_path, "--stage", "1", "--steps", "5", "--eval-every", "2")
    rows = [row for row in logged(tmp_path) if "overall" in row]
    assert [(row["step"], "loss" in row) for row in rows] == [(2, True), (4, True), (5, False)]


def test_where_measuring_fails_the_steps_are_saved(world, whole, tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise UserError("half.flac: expected intact audio")

    arguments = command(world, tmp_path, "--stage", "1")[2:]
    with monkeypatch.context() as patch:
        patch.setattr(Validator, "report", fails)
        assert "half.flac" in refused(train.main, capsys, *arguments)
    saved = load_checkpoint(tmp_path / "stage1.safetensors")
    assert saved.step == 4 and not saved.done and saved.optimizer
    train.main([*arguments, "--resume"])
    assert same(tmp_path, whole[0], stages=(1,))


def test_a_finished_stage_is_split_before_its_test(world, whole, tmp_path, monkeypatch):
    """Where processes split the backbone, the model waits elsewhere until then."""
    parse, calls = train.options.parse_arguments, []
    monkeypatch.setattr(train.options, "parse_arguments", lambda *given: argparse.Namespace(
        **vars(parse(*given)) | {"shard": True}))
    monkeypatch.setattr(train, "shard", lambda *_: calls.append("split"))
    monkeypatch.setattr(Validator, "report", lambda *_: calls.append("test") or
                        SimpleNamespace(table=""))
    out = shutil.copytree(whole[0], tmp_path / "out")
    train_here(world, out, "--stage", "1", "--resume", "--test", str(world / "validation.json"))
    assert calls == ["split", "test"]


def test_every_step_says_how_fast_it_was(whole):
    rows = [json.loads(line) for line in (whole[0] / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert all(row["tokens_per_second"] > 0 and row["data_wait"] > 0 for row in steps)
    assert all(0 < row["mfu"] < 10 for row in steps)  # above 1 if others were busy at the ceiling


def test_a_batch_in_pieces_is_the_same_batch(world, whole, tmp_path):
    train_here(world, tmp_path, "--stage", "1", "--grad-accum", "3")
    losses, expected = ([row["loss"] for row in logged(out) if row["stage"] == 1 and "loss" in row]
                        for out in (tmp_path, whole[0]))
    assert losses[0] == pytest.approx(expected[0], rel=1e-5)  # of the same weights: float32 sums
    assert losses == pytest.approx(expected, rel=0.05)  # then AdamW amplifies their rounding


def test_a_test_has_no_more_clips_at_once_than_training(world, tmp_path, monkeypatch):
    at_once, report = [], Validator.report

    def noted(validator, stage, examples):
        at_once.append(stage.micro_batch)
        return report(validator, stage, examples)

    monkeypatch.setattr(Validator, "report", noted)
    train_here(world, tmp_path, "--stage", "1", "--steps", "1", "--grad-accum", "3",
               "--test", str(world / "validation.json"))
    assert at_once == [1, 1]  # the validation, then the test


def test_one_stage_starts_from_the_checkpoint_it_is_given_and_is_tested_on_what_it_is_given(
        world, whole, tmp_path, capsys):
    train_here(world, tmp_path, "--stage", "2", "--init", str(whole[0] / "stage1.safetensors"),
               "--test", str(world / "validation.json"))
    measured, tested = (line for line in capsys.readouterr().out.splitlines()
                        if "questions: open" in line)
    assert measured == tested
    a, b = (load_checkpoint(folder / "stage2.safetensors").model
            for folder in (tmp_path, whole[0]))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_stage_0_pretrains_both_parts(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "make_stage0", lambda folder: world)
    assert run_script(train.main,
                      ["--stage", "0", "--out",
                       str(tmp_path), "--steps", "2", "--threads", "1"]) == 0
    assert (tmp_path / "toy_whisper.safetensors").stat().st_size + (
        tmp_path / "toy_llada.safetensors").stat().st_size < 5e6
    printed = capsys.readouterr().out
    assert "sentences: " in printed and "audio-like: " in printed
    assert not [*tmp_path.glob("*.partial.safetensors")]


def test_stage_0_goes_on_where_it_was_stopped(world, tmp_path, monkeypatch, capsys):
    """What is made stays, what is on its way goes on; but not with another seed."""
    monkeypatch.setattr(toy, "make_stage0", lambda folder: world)
    few = ["--stage", "0", "--steps", "4", "--batch-size", "2", "--threads", "1", "--save-every",
           "1", "--out", str(tmp_path), "--resume"]
    update, steps = backbone.update, []

    def cut(*args):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(backbone, "update", cut)
        assert run_script(train.main, few) == 130
    encoder, partial = (tmp_path / f"toy_{name}.safetensors" for name in (
        "whisper", "llada.partial"))
    before = encoder.stat().st_mtime_ns
    assert load_checkpoint(partial).step == 2 and not (tmp_path / "toy_llada.safetensors").exists()
    capsys.readouterr()
    assert run_script(train.main, [*few, "--parts", "llada", "--batch-size", "3"]) == 2
    assert "was trained with backbone batch 2, got 3; encoder batch" in capsys.readouterr().err
    assert run_script(train.main, few) == 0
    assert "backbone step 8: " in capsys.readouterr().out
    assert encoder.stat().st_mtime_ns == before and not partial.exists()
    assert run_script(train.main, few) == 0
    printed = capsys.readouterr().out
    assert f"{encoder} is done" in printed and "toy_llada.safetensors is done" in printed
    assert run_script(train.main, [*few, "--seed", "5"]) == 2
    assert "was made by `python train.py --stage 0 --size toy --seed 42`" in capsys.readouterr().err
    assert run_script(train.main, [*few, "--lr", "0.5"]) == 2
    assert "was made with backbone lr 0.001, got 0.5; encoder lr" in capsys.readouterr().err
    assert run_script(train.main, [*few, "--workers", "1"]) == 0  # which change nothing


@pytest.mark.parametrize("change", [
    {"label": 3}, {"start": None}, {"start": math.nan}, {"end": math.inf}, {"start": 2, "end": 1},
    {"ordinal": 4, "pitches": []}, {"ordinal": -1, "pitches": []}, {"pitches": [12]},
    {"pitches": [None]}, {"pitches": 3}])
def test_a_segment_that_says_nothing_that_can_be_learnt_is_refused(change):
    segment = {"start": 0.1, "end": 0.5, "label": "siren", "ordinal": 3, "pitches": []}
    assert is_segment(segment) and is_segment(segment | {"pitches": [0, 11], "ordinal": 9})
    assert not is_segment(segment | change) and not is_segment([segment])


@pytest.mark.parametrize("change", [{"segments": [{}]}, {"segments": None}, {"traits": {"a": 1}},
                                    {"traits": []}, {"audio_filepath": None}])
def test_stage_0_names_an_entry_without_its_alignment(change, world, tmp_path, capsys):
    rows = read_manifest(world / "stage0.json")
    rows[1] |= change
    (tmp_path / "stage0.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    assert run_script(
        train.main,
        ["--stage", "0", "--data", str(tmp_path), "--out", str(out), "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "entry 2: expected audio_filepath, traits and segments" in error and not out.exists()


@pytest.mark.parametrize("arguments, message", [
    (["--stage", "7"], "--stage"),
    (["--size", "huge"], "--size"),
    (["--nonsense"], "--nonsense"),
    (["--steps", "0"], "--steps must be from 1 to 1000000000, got 0"),
    (["--data", "/no/such/folder"], "/no/such/folder"),
    (["--data", "WORLD", "--test", "/no/such/manifest"], "/no/such/manifest"),
    (["--init", "/no/such/checkpoint", "--stage", "2"], "/no/such/checkpoint"),
    (["--size", "full"], "--data"),
    (["--stage", "0", "--parts", "llada", "--data", "WORLD"], "leave out --data"),
    (["--device", "mps"], "--device mps"),
])
def test_what_a_user_gets_wrong_is_one_line_and_exit_code_2(arguments, message, world, tmp_path,
                                                            capsys):
    arguments = [argument.replace("WORLD", str(world)) for argument in arguments]
    assert run_script(train.main, [*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_the_script_that_began_it():
    args, flags = SimpleNamespace(processes=1, resume=False), ["--out", "a run"]
    assert train.resume_command(args, ["tutorials/small_without.py", *flags]) == (
        "python tutorials/small_without.py --out 'a run' --resume")


def test_a_run_is_never_overwritten(world, whole, capsys):
    assert run_script(train.main, command(world, whole[0])[2:]) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.slow
def test_one_seed_gives_one_run(world, whole, tmp_path):
    train_here(world, tmp_path, "--workers", "2", "--no-cache-audio")
    assert same(tmp_path, whole[0])


def test_a_loss_that_is_not_finite_stops_the_run_or_is_skipped_and_counted(
        world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda *_: 1e35)
    flags = ["--stage", "1", "--data", str(world), "--out", str(tmp_path), *MINI]
    assert run_script(train.main, flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "stage 1, step 2: expected a finite loss" in error and "--skip-nonfinite" in error
    assert not (tmp_path / "stage1.safetensors").exists()
    assert run_script(train.main, [*flags, "--skip-nonfinite"]) == 0
    assert "skipped 3 steps whose loss or gradient was not finite" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 2, 3, 4]
    assert all(len(row["clips"]) == 3 for row in rows)


def test_a_second_run_into_a_folder_is_refused(world, tmp_path, capsys):
    with held(tmp_path):
        assert run_script(
            train.main, ["--stage", "1", "--data", str(world), "--out", str(tmp_path), *MINI]) == 2
    assert "another run is writing here" in capsys.readouterr().err


@pytest.fixture
def broken_within(world, tmp_path):
    """The small world with a clip whose header is whole, and whose sound is not: nothing but
    decoding it tells."""
    rows = read_manifest(world / "preference.json")[:8]
    path = tmp_path / "broken.flac"
    soundfile.write(path, np.random.default_rng(0).standard_normal(32_000) / 10, 16_000)
    path.write_bytes(path.read_bytes()[:20_000])
    rows = [row | {"audio_filepath": str(world / row["audio_filepath"])} for row in rows]
    rows[3]["audio_filepath"] = str(path)
    (tmp_path / "preference.json").write_text(json.dumps(rows))
    short = [{"audio_filepath": row["audio_filepath"], "transcription": "one"} for row in rows]
    (tmp_path / "stage1.json").write_text(json.dumps(short))
    return tmp_path


@pytest.mark.parametrize("stage, flags", [
    (1, ["--no-cache-audio", "--workers", "0"]), (1, ["--no-cache-audio", "--workers", "1"]),
    (1, []), (4, ["--no-cache-audio"]), (4, ["--cache-audio", "CACHE"])])
def test_a_clip_that_turns_out_to_be_broken_is_named_and_left_out(broken_within, tmp_path, capfd,
                                                                  whole, stage, flags):
    flags = [str(tmp_path / flag) if flag == "CACHE" else flag for flag in flags]
    init = ["--init", str(whole[0] / "stage3.safetensors")] if stage == 4 else []
    flags = ["--stage", str(stage), "--data", str(broken_within), "--out", str(tmp_path / "out"),
             *init, *flags, *MINI, "--save-every", "9"]  # 4 steps of 3 use all 8 clips
    assert run_script(train.main, flags) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "broken.flac: expected intact audio" in error
    assert not (tmp_path / "out" / f"stage{stage}.safetensors").exists()
    assert run_script(train.main, [*flags, "--skip-broken"]) == 0
    printed = capfd.readouterr()
    both = printed.out + printed.err
    assert "left out: " in both and "broken.flac: expected intact audio" in both
    assert ("clips that were broken" in printed.out) == ("--no-cache-audio" in flags)
    assert load_checkpoint(tmp_path / "out" / f"stage{stage}.safetensors").done
    assert all(math.isfinite(row["loss"]) for row in logged(tmp_path / "out") if "loss" in row)


def test_a_held_out_clip_that_is_broken_is_named_and_left_out(broken_within, world, tmp_path,
                                                              capfd):
    """Before training, which would have to be repeated."""
    for name, manifest in (("validation", "stage1"), ("stage1", "good")):
        rows = read_manifest(broken_within / "stage1.json")
        if manifest == "good":
            rows = [row for row in rows if "broken" not in row["audio_filepath"]]
        (broken_within / f"{name}.json").write_text(json.dumps(rows))
    flags = ["--stage", "1", "--data", str(broken_within), "--out", str(tmp_path / "out"), *MINI,
             "--no-cache-audio", "--workers", "0", "--steps", "1", "--test",
             str(broken_within / "validation.json"), "--skip-broken"]
    assert run_script(train.main, flags) == 0
    printed = capfd.readouterr().out
    assert printed.count("left out: ") == 2 and printed.count("7 questions: ") == 2
    (broken_within / "validation.json").write_text(json.dumps(
        [{"audio_filepath": str(broken_within / "broken.flac"), "transcription": "one"}]))
    assert run_script(train.main, [*flags, "--out", str(tmp_path / "other")]) == 2
    assert "validation.json: not one of its clips can be read" in capfd.readouterr().err


@pytest.mark.parametrize("flags", [
    ["--no-cache-audio", "--workers", "1"], [], ["--cache-audio", "CACHE"]])
def test_a_clip_that_ends_early_is_learnt_and_counted(world, tmp_path, capfd, flags):
    rows = read_manifest(world / "stage1.json")[:6]
    for row in rows:
        row["audio_filepath"] = str(world / row["audio_filepath"])
    cut = tmp_path / "cut.wav"
    shutil.copy(rows[0]["audio_filepath"], cut)
    os.truncate(cut, cut.stat().st_size - 8000)
    rows[0]["audio_filepath"] = str(cut)
    (tmp_path / "stage1.json").write_text(json.dumps(rows))
    flags = [str(tmp_path / flag) if flag == "CACHE" else flag for flag in flags]
    where = ["--stage", "1", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert run_script(train.main, [*where, *flags, *MINI]) == 0
    printed = capfd.readouterr().out
    assert f"used as far as they go: 1\n    {cut}: expected " in printed


def test_a_stage_says_in_one_line_what_it_cannot_learn_whole(world, tmp_path, capsys):
    rows = read_manifest(world / "stage1.json")
    for row in rows:
        row["audio_filepath"] = str(world / row["audio_filepath"])
    rows[1]["transcription"] = "one " * 40
    (tmp_path / "stage1.json").write_text(json.dumps(rows))
    train.main(["--stage", "1", "--data", str(tmp_path), "--out", str(tmp_path / "out"),
                *MINI, "--steps", "1"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "learnt whole" in line)
    assert line.startswith("  not learnt whole: 1 with an answer beyond the 16 tokens that it ")


def test_random_weights_try_a_machine_and_measure_nothing(world, tmp_path, capsys):
    train.main([
        "--stage", "3", "--random-weights", "--steps", "1", "--batch-size", "2", "--recompute",
        "blocks", "--data", str(world), "--out", str(tmp_path), "--threads", "1"])
    printed = capsys.readouterr().out
    assert "trainable parameters: 798,832" in printed and "peak memory" in printed
    assert "questions" not in printed
    assert load_checkpoint(tmp_path / "stage3.safetensors").done


@pytest.mark.slow
def test_bfloat16_trains_measures_and_shows_samples(whole, world, tmp_path, capsys):
    train.main([
        "--stage", "4", "--init", str(whole[0] / "stage3.safetensors"), "--data", str(world),
        "--out", str(tmp_path), "--dtype", "bfloat16", "--recompute", "blocks", "--steps", "5",
        "--batch-size", "2", "--sample-every", "2", "--threads", "1"])
    printed = capsys.readouterr().out
    assert printed.count("ranked right") == 2 and printed.count("target") == 2
    assert "questions:" in printed


def test_without_rejected_answers_stage_4_trains_and_says_that_it_cannot_measure_pairs(
        whole, world, tmp_path, capsys):
    rows = [{name: value
             for name, value in row.items()
             if name != "rejected"}
            for row in read_manifest(world / "validation.json")]
    (world / "plain.json").write_text(json.dumps(rows))
    train.main([
        "--stage", "4", "--init", str(whole[0] / "stage3.safetensors"), "--data", str(world),
        "--out", str(tmp_path), "--validation", str(world / "plain.json"), "--steps", "5",
        "--batch-size", "2", "--threads", "1"])
    assert capsys.readouterr().out.count("is not measured") == 2


def test_a_stage_starts_from_published_weights(whole, world, tmp_path):
    """What stage 3 made, written in the authors' names, is where stage 4 starts: its reference, and
    step 0."""
    out, _ = whole
    export(out / "stage3.safetensors", tmp_path / "pytorch_model.bin")
    train_here(world, tmp_path / "run", "--stage", "4", "--steps", "2", "--diffa2",
               str(tmp_path / "pytorch_model.bin"))
    train_here(world, tmp_path / "again", "--stage", "4", "--steps", "2", "--init",
               str(out / "stage3.safetensors"))
    assert same(tmp_path / "run", tmp_path / "again", stages=(4,))


@pytest.mark.parametrize("flags, message", [
    (["--size", "full", "--stage", "1"], "python data/librispeech.py prepares LibriSpeech"),
    (["--size", "full", "--stage", "2", "--random-weights", "--data", "no.json"], "no.json"),
    (["--size", "full", "--stage", "2", "--diffa2", "x/y"], "hf download x/y"),
    (["--size", "full", "--stage", "2", "--diffa2", str(ROOT)], '"target": "two"'),
    (["--size", "full", "--stage", "4", "--diffa2", str(ROOT)], '"rejected": "a man"'),
    (["--size", "diffa1", "--stage", "4"], "has stages 1, 2"),
    (["--size", "full", "--stage", "0"], "they are published"),
    (["--init", "a", "--diffa2", "b"], "exclude each other"),
    (["--stage", "0", "--dry-run"], "leave out --stage 0"),
    (["--stage", "0", "--init", "a", "--skip-broken", "--recompute", "blocks"],
     "--skip-broken, --init, --recompute: of stages 1 to 4"),
    (["--stage", "0", "--dtype", "float64"], "float32 or bfloat16, got --dtype float64"),
    (["--dry-run", "--data", "nowhere.json"], "nowhere.json"),
])
def test_what_full_size_lacks_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "DATA", tmp_path)
    monkeypatch.setattr(librispeech, "DATA", tmp_path)
    assert run_script(train.main, [*flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_command_that_is_printed_works_as_pasted(world, tmp_path, monkeypatch, capsys):
    other = other_part("whisper", tmp_path / "my whisper.safetensors")
    train_here(world, tmp_path / "out", "--stage", "1", "--steps", "1", "--whisper", str(other))
    hint = capsys.readouterr().out.partition("ask it something: ")[2].splitlines()[0]
    words, path = shlex.split(hint), tmp_path / "out" / "stage1.safetensors"
    assert words == ["python", "sample.py", "data/clips/three_one_four.wav",
                     "--checkpoint", str(path), "--whisper", str(other)]
    monkeypatch.chdir(ROOT)
    assert run_script(sample.main, words[2:]) == 0
    found = load_checkpoint(path)
    assert found.fingerprints["whisper"] == fingerprint(weights.read_part(other, "whisper"))
    llada = other_part("llada", tmp_path / "llada.safetensors")
    assert run_script(sample.main, [*words[2:], "--llada", str(llada)]) == 2
    assert "with another backbone (--llada); " in capsys.readouterr().err
    without = words[2:-2]
    (tmp_path / "few.json").write_text(json.dumps([{
        "id": "a", "audio_id": "three_one_four.wav", "question": "What?", "choices": ["one", "two"],
        "answer": "one", "task": "speech", "category": "perception", "sub-category": "asr",
        "difficulty": "free"}]))
    asked = ["--benchmark", "toy", "--file", str(tmp_path / "few.json"),
             "--audio-root", str(ROOT / "data" / "clips"), "--out", str(tmp_path / "answers.jsonl"),
             *without[1:]]
    for main, arguments in ((sample.main, without), (evaluate.main, asked)):
        assert run_script(main, arguments) == 2
        error = capsys.readouterr().err
        assert f"{path}: was trained with another encoder (--whisper); " in error
        assert error.count("\n") == 1
    assert not (tmp_path / "answers.jsonl").exists()
    assert run_script(sample.main, [*without, "--other-parts"]) == 0


def test_a_checkpoint_that_tells_no_parts_is_asked_on_others_with_a_note(tmp_path, capsys):
    clip = str(ROOT / "data" / "clips" / "three_one_four.wav")
    other = other_part("whisper", tmp_path / "whisper.safetensors")
    trained, path = load_checkpoint(weights.SHIPPED["diffa2"]), tmp_path / "a.safetensors"
    trained.fingerprints = {}
    save_checkpoint(path, trained)
    flags = [clip, "--whisper", str(other), "--checkpoint", str(path)]
    assert run_script(sample.main, flags) == 0
    error = capsys.readouterr().err
    assert error.startswith("note: ") and "does not tell which encoder" in error
    assert error.count("\n") == 1


def test_a_start_on_other_parts_needs_a_flag(world, whole, tmp_path, monkeypatch, capsys):
    def reached(*args):
        raise UserError("the stage begins")

    monkeypatch.setattr(train, "train_stage", reached)
    other = str(other_part("llada", tmp_path / "llada.safetensors"))
    start = ["--stage", "2", "--init", str(whole[0] / "stage1.safetensors")]
    flags = command(world, tmp_path / "out", *start)[2:]
    for more, message in (([], "the stage begins"),
                          (["--llada", other], "trained with another backbone (--llada)"),
                          (["--llada", other, "--other-parts"], "the stage begins")):
        assert run_script(train.main, [*flags, *more]) == 2
        assert message in capsys.readouterr().err
        assert (tmp_path / "out").exists() == (message == "the stage begins")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("part, change",
                         [("whisper", {"taps": (0, 1, 2, 4)}), ("llada", {"rope_theta": 5e5})])
def test_a_start_of_another_model_is_refused(part, change, world, whole, tmp_path, capsys):
    found = load_checkpoint(whole[0] / "stage1.safetensors")
    changed = dataclasses.replace(getattr(found.config, part), **change)
    found.config = dataclasses.replace(found.config, **{part: changed})
    save_checkpoint(tmp_path / "init.safetensors", found)
    flags = ["--stage", "2", "--init", str(tmp_path / "init.safetensors")]
    assert run_script(train.main, command(world, tmp_path / "out", *flags)[2:]) == 2
    error = capsys.readouterr().err
    name = [*change][0].replace("_", " ")
    assert f"was trained with {part}.{name} " in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, what",
                         [("preference", "missing"), ("sft", "broken"), ("preference", "broken")])
def test_every_manifest_is_read_before_anything_is_trained(name, what, world, tmp_path, capsys):
    data = shutil.copytree(world, tmp_path / "data")
    path = data / f"{name}.json"
    rows = read_manifest(path)
    path.unlink()
    if what == "broken":
        del rows[1]["audio_filepath"]
        path.write_text(json.dumps(rows))
    assert run_script(train.main, command(data, tmp_path / "out")[2:]) == 2
    printed = capsys.readouterr()
    assert str(path) in printed.err and printed.err.count("\n") == 1
    assert "stage 1" not in printed.out and not (tmp_path / "out").exists()
