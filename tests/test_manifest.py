"""Manifests: lists and lines are read, each stage finds its fields, and every way to be broken has
its one line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from diffa2_mini.config import SIZES
from diffa2_mini.data import Example, load_examples, read_manifest
from diffa2_mini.errors import UserError
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.training.manifests import what_is_cut

TOY, STAGES = SIZES["toy"]
ROW = {
    "audio_id": "a", "audio_filepath": "clips/0.wav", "transcription": "one two",
    "input": "What is said?", "target": "two words", "chosen": "good words",
    "rejected": "bad words", "dataset": "toy", "duration": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight clips of 0.1 to 0.8 s, and two files that are none."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "clips").mkdir()
    for i in range(8):
        samples = np.random.default_rng(i).normal(0, 0.1, 1600 * (i + 1))
        soundfile.write(folder / f"clips/{i}.wav", samples, 16_000)
    (folder / "clips/empty.wav").write_bytes(b"")
    (folder / "clips/text.wav").write_bytes(b"this is not audio")
    return folder


def manifest(folder, rows):
    (folder / "manifest.json").write_text(json.dumps(rows))
    return folder / "manifest.json"


def one_line_error(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load(folder, rows, stage=2, skip_broken=False):
    return load_examples(manifest(folder, rows), STAGES[stage], TOY, skip_broken)


@pytest.mark.parametrize("content", [
    '[{"a": 1}, {"a": "ü"}]', '\n [{"a": 1},\n{"a": "ü"}]\n',
    '{"a": 1}\n{"a": "ü"}', '{"a": 1}\r\n\r\n{"a": "ü"}\r\n',
    '\ufeff[{"a": 1}, {"a": "ü"}]', '\ufeff{"a": 1}\n{"a": "ü"}\n\n'])
def test_a_manifest_is_a_list_or_lines(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content.encode())
    assert read_manifest(tmp_path / "manifest.json") == [{"a": 1}, {"a": "ü"}]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    (tmp_path / "manifest.json").write_text('{"a": "one\u2028two"}\n{"a": 2}\n', encoding="utf-8")
    assert read_manifest(tmp_path / "manifest.json") == [{"a": "one\u2028two"}, {"a": 2}]


@pytest.mark.parametrize("content, words", [
    ('{"a": 1}\n{"a": 1}\n\n{"a": }\n{"a": 1}\n', "line 4 is not JSON (Expecting value)"),
    ('{"a": 1}\n{"a": 1', "line 2 is not JSON"),
    ('\n\n{a: 1}\n{"a": 1}', "line 3 is not JSON"),
    ('1}\n{"a": 1}\n1}', "line 1 is not JSON (Extra data)"),
    ('[{"a": 1},\n{"a": 2},\n{"a" 3}]', "line 3 is not JSON"),
    ('[{"a": 1},\n{"a": 2}', "line 2 is not JSON"),
    ("[" * 100_000, "line 1 is not JSON"),
    ('{"a": 1}\n' + "9" * 10_000, "line 2 is not JSON"),
    ("", "empty manifest"), (" \n\n", "empty manifest"), ("[]", "empty manifest"),
    (b"\xff\xfe[\x00", "UTF-8"), ('[{"a": "ü"}]'.encode("latin-1"), "UTF-8"),
])
def test_a_broken_manifest_is_named_with_its_line(tmp_path, content, words):
    path = tmp_path / "manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = one_line_error(read_manifest, path)
    assert message.startswith(f"{path}: ") and words in message


def test_a_manifest_that_is_not_there(tmp_path):
    assert "no such file" in one_line_error(read_manifest, tmp_path / "manifest.json")
    assert "no such file" in one_line_error(read_manifest, tmp_path)


@pytest.mark.parametrize("stage, answer, rejected", [
    (1, "one two", "bad words"), (2, "two words", "bad words"), (3, "two words", "bad words"),
    (4, "good words", "bad words")])
def test_each_stage_takes_its_fields(folder, stage, answer, rejected):
    [example] = load(folder, [ROW], stage)
    assert (example.answer, example.rejected, example.instruction) == (
        answer, rejected, "What is said?")
    assert example.path == folder / "clips/0.wav"
    assert (example.type, example.domain) == ("toy", "toy")


def without(*names):
    return {name: value for name, value in ROW.items() if name not in names}


def test_fields_that_a_stage_does_not_need_may_be_missing(folder):
    row = {"audio_filepath": str(folder / "clips/1.wav"), "transcription": "one"}
    [example] = load(folder, [row], stage=1)
    assert example.instruction == "Please transcribe the audio to text."
    assert example.path == folder / "clips/1.wav"
    assert (example.answer, example.rejected, example.type, example.domain) == (
        "one", "", "all", "all")
    assert load(folder, [without("chosen") | {"input": None}], stage=4)[0].answer == "two words"
    assert load(folder, [ROW | {"type": "asr", "domain": "speech"}])[0].type == "asr"


@pytest.mark.parametrize("stage, row, words", [
    (1, without("transcription", "target"), "the field transcription or target is missing"),
    (2, without("transcription", "target"), "the field target or transcription is missing"),
    (4, without("chosen", "target"), "the field chosen or target is missing"),
    (4, without("rejected"), "the field rejected is missing"),
    (2, without("audio_filepath"), "the field audio_filepath is missing"),
    (2, ROW | {"audio_filepath": ["clips/0.wav"]}, "expected text in audio_filepath, got ["),
    (2, ROW | {"target": float("nan")}, "expected text in target, got nan"),
    (2, without("target") | {"transcription": 12}, "expected text in transcription, got 12"),
    (2, ROW | {"input": {"text": "?"}}, "expected text in input, got {'text'"),
    (2, ROW | {"audio_filepath": "clips/\0.wav"}, r"audio_filepath, got 'clips/\x00.wav'"),
    (2, ROW | {"target": "\ud800"}, r"expected text in target, got '\ud800'"),
    (2, ROW | {"audio_filepath": "clips/a\nb.wav"}, "no such file"),
    (2, ROW | {"audio_filepath": "x" * 5000}, "name too long"),
    (2, ROW | {"audio_filepath": ""}, "folder"),
    (2, ROW | {"target": []}, "entry 1: expected text in target, got []"),
    (2, ["clips/0.wav"], "entry 1: expected an object, got list"),
    (2, None, "entry 1: expected an object, got NoneType"),
])
def test_an_odd_entry_is_one_clear_line(folder, stage, row, words):
    message = one_line_error(load, folder, [row], stage)
    assert words in message and "1 broken of 1 entries" in message


def test_a_value_that_no_stage_reads_may_be_odd(folder):
    assert len(load(folder, [ROW | {"duration": float("nan"), "audio_id": [1]}])) == 1


@pytest.mark.slow
def test_three_broken_clips_of_ten_thousand_are_named_and_can_be_skipped(folder, tmp_path, capsys):
    clip, rows = (folder / "clips/0.wav").read_bytes(), []
    for i in range(10_000):
        rows.append(ROW | {"audio_id": f"id{i}", "audio_filepath": f"{i}.wav"})
        (tmp_path / f"{i}.wav").write_bytes(clip)
    (tmp_path / "7.wav").unlink()
    (tmp_path / "100.wav").write_bytes(b"")
    (tmp_path / "9999.wav").write_bytes(b"this is not audio")
    message = one_line_error(load, tmp_path, rows)
    assert "3 broken of 10000 entries" in message and "--skip-broken" in message
    for words in ("entry 8: ", "7.wav", "entry 101: ", "100.wav", "entry 10000: ", "9999.wav"):
        assert words in message
    examples = load(tmp_path, rows, skip_broken=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("skipped 3 broken of 10000 entries") and "entry 101: " in line
    assert {int(example.path.stem) for example in examples} == set(range(10_000)) - {7, 100, 9999}


def test_many_broken_entries_are_not_all_listed(folder):
    message = one_line_error(load, folder, [ROW | {"audio_filepath": "none.wav"}] * 20 + [ROW])
    assert "20 broken of 21" in message and "and 15 more" in message
    assert message.count("none.wav") == 5
    assert "not one entry" in one_line_error(
        load, folder, [None], skip_broken=True)


def test_an_entry_whose_prompt_leaves_no_room_for_an_answer_is_named(folder, capsys):
    tokenizer = load_tokenizer(TOY)
    rows = [ROW, ROW | {"input": "Which of these? " + "one, two; " * 700}]
    n = len(tokenizer.prompt(TOY.text.train_system, rows[1]["input"]).ids)
    assert n > STAGES[2].max_tokens
    arguments = (manifest(folder, rows), STAGES[2], TOY)
    error = one_line_error(load_examples, *arguments, False, tokenizer)
    assert f"entry 2: its prompt of {n:,} tokens leaves no room within 2,048" in error
    kept = load_examples(*arguments, True, tokenizer)
    assert len(kept) == 1 and "entry 2: its prompt" in capsys.readouterr().out


@pytest.mark.parametrize("stage", [2, 4])
def test_what_cannot_be_learnt_whole_is_counted_and_named(folder, stage):
    tokenizer, stage = load_tokenizer(TOY), STAGES[stage]
    n_prompt = len(tokenizer.prompt(TOY.text.train_system, ROW["input"]).ids)
    whole = Example(folder / "whole.wav", ROW["input"], "one " * 15 + "one", "two", "", "", 4.0)
    assert len(tokenizer.encode(whole.answer)) == 16 == TOY.decode.gen_length
    data = [whole, replace(whole, path=folder / "a.wav", answer=whole.answer + " two"),
            *(replace(whole, path=folder / f"{i}.wav", seconds=4.1) for i in range(4))]
    assert what_is_cut([whole], stage, TOY, tokenizer) == ""
    fits, cut = (replace(stage, max_tokens=n_prompt + 16 + 1 + n) for n in (1, 0))  # and an end
    assert what_is_cut(data, fits, TOY, tokenizer) == (
        "4 with a clip beyond the 4 s that the model takes (0.wav, 1.wav, 2.wav, ...); "
        "1 with an answer beyond the 16 tokens that it writes (a.wav)")
    assert what_is_cut(data, cut, TOY, tokenizer).startswith(
        f"1 with text beyond {cut.max_tokens:,} tokens, which is cut (a.wav); 4 with a clip")
    rejected = [replace(whole, rejected=whole.answer + " two")]  # is not written, but compared
    assert bool(what_is_cut(rejected, cut, TOY, tokenizer)) == stage.preference
