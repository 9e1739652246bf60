"""sample.py as a user runs it: on clips that are ordinary, odd, or no clips at all."""

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from mini import ROOT, SECONDS

import sample
from diffa2_mini import weights
from diffa2_mini.command.flags import decode_config
from diffa2_mini.command.script import run_script
from diffa2_mini.config import SIZES

CLIP = ROOT / "data" / "clips" / "three_one_four.wav"


def ask(capsys, *arguments) -> list[dict]:
    """The lines of JSON that sample.py prints."""
    assert run_script(sample.main, [*map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def noise(path, rate=16_000, seconds=1.0, channels=1, **options):
    samples = 0.1 * np.random.default_rng(0).standard_normal((round(rate * seconds), channels))
    soundfile.write(path, samples, rate, **options)
    return path


def test_the_shipped_model_answers_about_the_shipped_clip_as_a_process():
    before = os.times()
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), str(CLIP)],
                          capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout.strip()) == (0, "three one four"), done.stderr
    after = os.times()  # of computing: other work on the machine does not count
    took = sum(getattr(after, name) - getattr(before, name)
               for name in ("children_user", "children_system"))
    assert took < 30  # seen: 5 s; the README says how it was measured


def test_json_tells_how_the_answer_came_about(capsys):
    (row,) = ask(capsys, CLIP, "--prompt", "How many digits are there?")
    assert set(row) == {"audio", "start", "end", "prompt", "text", "tokens", "steps", "seconds"}
    assert (row["start"], row["end"]) == (0, soundfile.info(CLIP).duration)
    assert row["text"] == "3" and row["prompt"] == "How many digits are there?"
    assert len(row["tokens"]) == 16 and 1 <= row["steps"] <= 16


def test_lines_of_json_stand_alone_though_one_watches(capsys):
    assert run_script(sample.main, [str(CLIP), "--json", "--watch"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["text"] == "three one four" and "three" in printed.err


def test_a_fixed_schedule_takes_the_steps_it_is_given(capsys):
    (four,), (sixteen,) = (ask(capsys, CLIP, "--steps", n) for n in (4, 16))
    assert (four["steps"], sixteen["steps"]) == (4, 16)
    assert sixteen["text"] == "three one four"


def test_the_flags_reach_the_decoder(capsys):
    def texts(*flags):
        return [ask(capsys, CLIP, *flags)[0]["tokens"] for _ in range(2)]

    hot = texts("--temperature", "3", "--seed", "1")
    assert hot[0] == hot[1] != texts("--temperature", "3", "--seed", "2")[0]


@pytest.mark.parametrize("flags, changes", [
    ("--remasking random", dict(remasking="random", factor=None)),
    ("--steps 4", dict(steps=4, factor=None)),
    ("--threshold 0.8", dict(threshold=0.8, factor=None)),
    ("--factor 2 --revise 0.3 --eos-threshold 0.9", dict(factor=2, revise=0.3, eos_threshold=0.9)),
    ("--gen-length 24", dict(gen_length=24, block_length=24, steps=24)),
    ("--gen-length 32 --block-length 8", dict(gen_length=32, block_length=8, steps=32)),
    ("--cache dual --refresh 3 --capture --compile",
     dict(cache="dual", refresh=3, capture=True, compile=True)),
    ("--temperature 0.5 --cfg 2 --seed 7", dict(temperature=0.5, cfg=2, seed=7))])
def test_each_flag_of_decoding_sets_its_field(flags, changes):
    args, default = sample.parse_arguments([str(CLIP), *flags.split()]), SIZES["toy"][0].decode
    assert decode_config(args, default) == dataclasses.replace(default, **changes)


def test_each_clip_is_drawn_for_itself_with_any_seed(capsys):
    for seed in (1795687535000000000, 2**63 - 1):
        hot = ["--temperature", "3", "--seed", seed]
        rows = ask(capsys, *[CLIP] * 6, *hot)
        assert len({tuple(row["tokens"]) for row in rows}) > 3
        assert rows[0]["tokens"] == ask(capsys, CLIP, *hot)[0]["tokens"]


@pytest.mark.parametrize("flags", [("--refresh", "2"), ("--capture",)])
def test_settings_of_a_cache_without_one_are_refused(flags, capsys):
    assert run_script(sample.main, [str(CLIP), *flags]) == 2
    error = capsys.readouterr().err
    assert "--refresh and --capture need --cache prefix or dual" in error and error.count("\n") == 1
    assert len(ask(capsys, CLIP, *flags, "--cache", "dual")) == 1


def test_merged_lora_gives_the_same_answer(capsys):
    (plain,), (merged,) = ask(capsys, CLIP), ask(capsys, CLIP, "--merge-lora")
    assert plain["text"] == merged["text"] == "three one four"


def test_watching_shows_masks_first_and_the_answer_last(capsys):
    assert run_script(sample.main, [str(CLIP), "--watch", "--steps", "16"]) == 0
    printed = capsys.readouterr().out
    frames = printed.splitlines()
    assert "░" in frames[0] and "░" not in frames[-1] and "four" in frames[-1]
    assert "\r" not in printed and "\x1b" not in printed  # this is no terminal


def test_what_is_answered_is_there_at_once_and_nobody_reading_ends_it_quietly(capfd, monkeypatch):
    """Of three clips, the reader goes when the first is answered: no other is asked about."""
    asked = []

    def answer(*args):
        asked.append(args)
        return [SimpleNamespace(text=f"answer {len(asked)}")]

    part = SimpleNamespace(samples=None, name=str(CLIP))
    read, written = os.pipe()
    monkeypatch.setattr(sample.Diffa2, "load",
                        lambda *args: SimpleNamespace(answer=answer, tokenizer=None))
    with os.fdopen(written, "w") as out, redirect_stdout(out):
        monkeypatch.setattr(sample, "parts_of_clip", lambda *args: reads(read)
                            if len(asked) == 1 else [part])
        assert run_script(sample.main, [str(CLIP)] * 3) == 128 + 13
    assert len(asked) == 2 and capfd.readouterr().err == ""


def reads(pipe):
    """The parts of a clip, once another has read the answer on the first, and gone."""
    assert os.read(pipe, 1000).decode() == f"{CLIP}: answer 1\n"
    os.close(pipe)
    return [SimpleNamespace(samples=None, name=str(CLIP))]


@pytest.mark.parametrize("options", [
    dict(seconds=0.003),
    dict(seconds=1, rate=192_000),
    dict(channels=8),
    dict(subtype="PCM_U8"),
    dict(subtype="FLOAT"),
])
def test_odd_but_valid_clips_are_answered(tmp_path, capsys, options):
    (row,) = ask(capsys, noise(tmp_path / "odd.wav", **options))
    assert row["steps"] >= 1


def test_silence_is_answered(tmp_path, capsys):
    soundfile.write(tmp_path / "silence.wav", np.zeros(16_000), 16_000)
    assert len(ask(capsys, tmp_path / "silence.wav")) == 1


def test_a_long_clip_is_answered_on_its_beginning_or_part_by_part(tmp_path, capsys):
    digits, rate = soundfile.read(CLIP)
    first = np.pad(digits, (0, 4 * rate - len(digits)))
    soundfile.write(tmp_path / "first.wav", first, rate)
    soundfile.write(tmp_path / "long.wav", np.concatenate([first, digits]), rate)
    alone = [ask(capsys, path)[0]["tokens"] for path in (tmp_path / "first.wav", CLIP)]
    assert run_script(sample.main, [str(tmp_path / "long.wav"), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tokens"] == alone[0] and "longer than the 4 s" in printed.err
    assert json.loads(printed.out)["end"] == 4


def test_the_parts_of_a_long_clip_are_of_one_length_and_told_apart(tmp_path, capsys):
    digits, rate = soundfile.read(CLIP)
    pieces = [np.pad(each, (0, 3 * rate - len(digits))) for each in (digits, digits[::-1])]
    for name, samples in {"0": pieces[0], "1": pieces[1], "long": np.concatenate(pieces)}.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, rate)
    alone = [ask(capsys, tmp_path / f"{i}.wav")[0]["tokens"] for i in range(2)]
    rows = ask(capsys, tmp_path / "long.wav", "--chunk")
    assert [row["tokens"] for row in rows] == alone
    assert [(row["start"], row["end"]) for row in rows] == [(0, 3), (3, 6)]
    assert run_script(sample.main, [str(tmp_path / "long.wav"), "--chunk"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [f"{tmp_path / 'long.wav'}, {at}" for at in ("0.0 to 3.0 s", "3.0 to 6.0 s")]
    assert [line.split(": ")[0] for line in lines] == names
    assert run_script(sample.main, [str(tmp_path / "long.wav"), "--chunk", "--watch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:-1] for line in lines if line.endswith(":")] == names


@pytest.mark.parametrize("seconds, n_parts", [
    (3.9, 1), (4, 1), (4.0001, 2), (4.2, 2), (8.2, 3), (40.03, 11)])
def test_no_part_is_a_sliver(tmp_path, seconds, n_parts):
    n_samples, audio = round(seconds * 16_000), SIZES["toy"][0].audio
    ramp = np.arange(n_samples) / n_samples
    soundfile.write(tmp_path / "clip.wav", ramp, 16_000, subtype="FLOAT")
    parts = sample.parts_of_clip(tmp_path / "clip.wav", audio, chunk=True)
    lengths = [len(part.samples) for part in parts]
    assert len(parts) == n_parts and sum(lengths) == n_samples and max(lengths) <= audio.max_samples
    assert max(lengths) - min(lengths) <= 1
    assert [part.end for part in parts] == [*(part.start for part in parts[1:]), n_samples / 16_000]
    for part in parts:
        assert part.samples[0] == np.float32(ramp[round(part.start * 16_000)])


def test_a_clip_that_ends_early_is_answered_with_a_note(tmp_path, capsys):
    (tmp_path / "cut.wav").write_bytes(CLIP.read_bytes()[:-4000])
    assert run_script(sample.main, [str(tmp_path / "cut.wav")]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("three one")
    assert printed.err.startswith(f"note: {tmp_path / 'cut.wav'}: expected ")
    assert printed.err.count("\n") == 1


def broken_files(folder):
    soundfile.write(folder / "whole.wav", np.zeros(1000), 16_000)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "header.wav").write_bytes((folder / "whole.wav").read_bytes()[:30])
    (folder / "text.wav").write_text("not audio")
    soundfile.write(folder / "none.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan]), 16_000, subtype="FLOAT")
    soundfile.write(folder / "inf.wav", np.array([0.0, np.inf]), 16_000, subtype="FLOAT")
    return [
        "missing.wav", ".", "empty.wav", "header.wav", "text.wav", "none.wav", "nan.wav", "inf.wav"]


def test_a_clip_that_is_none_is_one_line_and_exit_code_2(tmp_path, capfd):
    for name in broken_files(tmp_path):
        assert run_script(sample.main, [str(tmp_path / name)]) == 2, name
        printed = capfd.readouterr()
        assert printed.err.count("\n") == 1 and str(tmp_path / name) in printed.err
        assert not printed.out


@pytest.mark.parametrize("flags, message", [
    (["--nonsense"], "--nonsense"),
    (["--size", "huge"], "--size"),
    (["--size", "full"], "hf download zhoujiaming777/DIFFA-2"),
    (["--gen-length", "0"], "--gen-length"),
    (["--gen-length", "16", "--block-length", "5"], "multiple"),
    (["--steps", "4", "--factor", "1"], "--factor"),
    (["--factor", "-1"], "--factor"),
    (["--checkpoint", str(CLIP)], "three_one_four.wav"),
    (["--checkpoint", "missing.safetensors"], "missing.safetensors"),
    (["--checkpoint", str(weights.SHIPPED["llada"])], "checkpoint"),
])
def test_a_flag_that_cannot_be_is_one_line_and_exit_code_2(
        flags, message, capsys, nothing_downloaded):
    assert run_script(sample.main, [str(CLIP), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_checkpoint_cut_short_is_refused(tmp_path, capsys):
    whole = weights.SHIPPED["diffa2"].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:len(whole) // 2])
    assert run_script(sample.main,
                      [str(CLIP), "--checkpoint", str(tmp_path / "cut.safetensors")]) == 2
    assert "cut off or damaged" in capsys.readouterr().err
