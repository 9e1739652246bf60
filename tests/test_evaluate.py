"""The command as a user runs it: on published files over our own clips, stopped and continued, and
on answers made elsewhere."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors import safe_open
from safetensors.torch import save_file
from test_files import held
from test_published import CONFIG, published, trained  # noqa: F401, the last two are fixtures

from data import kaldi
from diffa2_mini import weights
from diffa2_mini.command import flags as model_flags
from diffa2_mini.command.script import run_script
from diffa2_mini.config import SIZES
from diffa2_mini.evaluate import __main__ as evaluate
from diffa2_mini.evaluate import answers, benchmarks
from diffa2_mini.listen import Diffa2
from diffa2_mini.training.checkpoint import load_checkpoint, save_checkpoint, save_diffa2

CLIPS = Path(__file__).resolve().parent.parent / "data" / "clips"
TOY = [  # in MMAU's fields, as the toy model was taught to be asked
    {
        "id": "a", "audio_id": "three_one_four.wav",
        "question": "Please transcribe the audio to text.",
        "choices": ["three one four", "three one five"], "answer": "three one four",
        "task": "speech", "category": "perception", "sub-category": "asr", "difficulty": "free"
    }, {
        "id": "b", "audio_id": "./siren_bell_drum.wav", "question": "How many sounds are there?",
        "choices": ["2", "3", "4"], "answer": "3", "task": "sound", "category": "reasoning",
        "sub-category": "count", "difficulty": "lettered"
    }, {
        "id": "c", "audio_id": "minor_arpeggio.wav", "question": "Which instrument plays?",
        "choices": ["organ", "flute"], "answer": "flute", "task": "music", "category": "perception",
        "sub-category": "instrument", "difficulty": "free"
    }, {
        "id": "d", "audio_id": "gone.wav", "question": "What kind of audio is this?",
        "choices": ["speech", "sound"], "answer": "sound", "task": "sound",
        "category": "perception", "sub-category": "kind", "difficulty": "lettered"}]


def run(capfd, *arguments, code=0) -> str:
    """What the command prints."""
    assert run_script(evaluate.main, [*map(str, arguments)]) == code
    printed = capfd.readouterr()
    return printed.out if code == 0 else printed.err


@pytest.fixture
def folder(tmp_path):
    """The clips, of which one is broken, and the questions."""
    shutil.copytree(CLIPS, tmp_path / "audio")
    (tmp_path / "toy.json").write_text(json.dumps(TOY))
    return tmp_path


def flags(folder, out="answers.jsonl"):
    return [
        "--benchmark", "toy", "--file", folder / "toy.json", "--audio-root", folder / "audio",
        "--out", folder / out]


def result_of(folder, name="answers"):
    return json.loads((folder / f"{name}.result.json").read_text())


def test_the_shipped_model_answers_a_benchmark_with_a_clip_that_is_gone(folder, capfd):
    printed = run(capfd, *flags(folder), "--batch-size", 2)
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == ["three one four", "B. 3", "flute", ""]
    assert all(row | fields == row for row, fields in zip(rows, TOY))
    assert "gone.wav" in rows[3]["error"]
    result = result_of(folder)
    assert (result["overall"]["right"], result["overall"]["count"]) == (3, 4)
    assert [*result["broken_audio"]] == ["d"]
    assert result["tables"]["difficulty"]["lettered"]["accuracy"] == 0.5
    assert result["malformed"] == {}
    assert "3 of 4 right" in printed and "gone.wav" in printed
    assert "4 questions, of which 0 are answered" in printed


def test_a_stopped_run_goes_on_where_it_was(folder, capfd, monkeypatch):
    run(capfd, *flags(folder))
    whole, figures = (folder / "answers.jsonl").read_text(), result_of(folder)
    asked, ask = [], answers.Respondent.answer

    def stopping(respondent, examples, *rest, **named):
        asked.extend(example.path.stem for example in examples)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(respondent, examples, *rest, **named)

    monkeypatch.setattr(answers.Respondent, "answer", stopping)
    assert "goes on from" in run(capfd, *flags(folder, "stopped.jsonl"), "--batch-size", 1,
                                 code=130)
    path = folder / "stopped.jsonl"
    assert path.read_text() == whole.split("\n")[0] + "\n"
    assert asked == ["three_one_four", "siren_bell_drum"]
    with open(path, "a") as file:
        file.write(whole.split("\n")[1][:-7])  # a line that was not finished
    assert "of which 1 are answered" in run(capfd, *flags(folder, "stopped.jsonl"))
    assert asked[2:] == ["siren_bell_drum", "minor_arpeggio"]
    assert path.read_text() == whole and result_of(folder, "stopped") == figures
    # no longer
    shutil.copy(folder / "audio" / "siren_bell_drum.wav", folder / "audio" / "gone.wav")
    assert "of which 3 are answered" in run(capfd, *flags(folder, "stopped.jsonl"))
    assert asked[4:] == ["gone"] and result_of(folder, "stopped")["overall"]["right"] == 4
    monkeypatch.setattr(Diffa2, "load", None)  # nothing is left to ask
    assert "of which 4 are answered" in run(capfd, *flags(folder, "stopped.jsonl"))


def test_what_is_drawn_depends_on_the_question_alone(folder, capfd):
    copies = [TOY[2] | {"id": f"copy {i}"} for i in range(6)]
    (folder / "toy.json").write_text(json.dumps([TOY[3], *copies]))  # a clip that is gone, then six
    hot = ["--temperature", 9, "--seed", 1795687535000000000]
    run(capfd, *flags(folder, "whole.jsonl"), *hot)
    run(capfd, *flags(folder), *hot, "--batch-size", 2, "--limit", 4)
    run(capfd, *flags(folder), *hot, "--batch-size", 1)  # goes on, and tries the first again
    whole, parts = ({
        row["id"]: row["response"]
        for row in map(json.loads,
                       path.read_text().splitlines())}
                    for path in (folder / "whole.jsonl", folder / "answers.jsonl"))
    assert whole == parts and len({*whole.values()}) > 3


def test_answers_of_another_way_to_ask_are_not_mixed(folder, capfd):
    run(capfd, *flags(folder), "--limit", 1)
    assert result_of(folder)["overall"]["count"] == 1
    others = [(["--factor", 1], "factor 1.0"), (["--dtype", "bfloat16"], "bfloat16"),
              (["--benchmark", "mmau"], "answers a question of toy, not of mmau"),
              (["--merge-lora"], "LoRA merged")]
    for more, message in others:
        assert message in run(capfd, *flags(folder), *more, code=2)
    other = shutil.copy(weights.SHIPPED["diffa2"], folder / "other.safetensors")
    trained = load_checkpoint(other)
    run(capfd, *flags(folder, "other.jsonl"), "--limit", 1, "--checkpoint", other)
    trained.model["trainable_prompts.weight"] += 1
    save_checkpoint(other, trained)  # another model under the same name
    assert "'by' of a is diffa2" in run(capfd, *flags(folder, "other.jsonl"), "--limit", 1,
                                           "--checkpoint", other, code=2)
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 1
    run(capfd, *flags(folder), "--limit", 3)
    run(capfd, *flags(folder), "--limit", 2)  # fewer than are answered
    assert result_of(folder)["overall"]["count"] == 2


def changed_weights(path):
    """Another tensor in the place of one in a file."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file(tensors | {name: tensors[name] + 1}, path, metadata)


@pytest.mark.parametrize("part", ["whisper", "llada"])
def test_weights_are_known_by_what_they_hold_and_not_by_their_name(folder, capfd, part):
    path = Path(shutil.copy(weights.SHIPPED[part], folder / "mine.safetensors"))
    run(capfd, *flags(folder))
    answered = "4 questions, of which 3 are answered"
    assert answered in run(capfd, *flags(folder), f"--{part}", path)  # a copy
    changed_weights(path)
    others = [f"--{part}", path, "--other-parts"]
    error = run(capfd, *flags(folder), *others, code=2).splitlines()[-1]
    assert f"'by' of a is {part} " in error and f"this run has {part} " in error
    assert error.count(part) == 2 and "float32" not in error  # it tells what differs
    assert answered in run(capfd, *flags(folder))


def test_published_weights_are_known_by_what_they_hold(
        folder, published, trained, capfd, monkeypatch):
    monkeypatch.setitem(SIZES, "full", (dataclasses.replace(CONFIG, size="full"), {}))

    def ask(where, code=0):
        parts = [word for part in published for word in (f"--{part}", where / part)]
        return run(capfd, *flags(folder), "--size", "full", "--device", "cpu", *parts, code=code)

    ask(published["llada"].parent)
    copy = shutil.copytree(published["llada"].parent, folder / "copy")
    assert "of which 3 are answered" in ask(copy)
    changes = {"whisper": "whisper/model.safetensors",
               "llada": "llada/model-00002-of-00002.safetensors"}
    for part, file in changes.items():
        kept = shutil.copy(copy / file, folder / "kept")
        changed_weights(copy / file)
        assert f"this run has {part} " in ask(copy, code=2)
        shutil.copy(kept, copy / file)
    tensors = weights.trained_tensors(trained)
    tensors["trainable_prompts.weight"] = tensors["trainable_prompts.weight"] + 1
    save_diffa2(tensors, copy / "diffa2" / "pytorch_model.bin")
    with open(copy / "llada" / "tokenizer.json", "a") as file:
        file.write("\n")
    error = ask(copy, code=2)
    assert "this run has diffa2 " in error and "tokenizer " in error and "whisper" not in error


def test_what_was_asked_otherwise_under_the_same_id_is_not_reused(folder, capfd, monkeypatch):
    run(capfd, *flags(folder))
    answers_, figures = (folder / "answers.jsonl").read_bytes(), result_of(folder)

    def refused(message, *more):
        error = run(capfd, *flags(folder), *more, code=2)
        assert message in error and error.count("\n") == 1
        assert (folder / "answers.jsonl").read_bytes() == answers_ and result_of(folder) == figures

    for change, message in [
            ({"question": "Which digit is last?"}, "entry 1: a was asked another question"),
            ({"difficulty": "lettered"}, "'prompt_sha256' of a is "),
            ({"choices": ["three one four", "one"]}, "other choices")]:
        (folder / "toy.json").write_text(json.dumps([TOY[0] | change, *TOY[1:]]))
        refused(message)
    (folder / "toy.json").write_text(json.dumps(TOY))
    clip = folder / "audio" / "three_one_four.wav"
    kept = shutil.copy(clip, folder / "kept.wav")
    shutil.copy(folder / "audio" / "minor_arpeggio.wav", clip)
    refused("'clip_sha256' of a is ")
    clip.unlink()  # it was read while it was there
    assert "of which 3 are answered" in run(capfd, *flags(folder)) and result_of(folder) == figures
    shutil.copy(kept, clip)
    (folder / "toy.json").write_text(json.dumps([TOY[0] | {"answer": "three one five"}, *TOY[1:]]))
    run(capfd, *flags(folder))  # a key that was mended: the replies stand, and are scored anew
    assert result_of(folder)["overall"]["right"] == figures["overall"]["right"] - 1


def test_answers_of_a_version_that_did_not_note_what_was_asked_are_refused(folder, capfd):
    run(capfd, *flags(folder))
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    for row in rows:
        del row["prompt_sha256"], row["clip_sha256"]
        row["by"] = "diffa2_mini/assets/toy_diffa2.safetensors 0123abcd, float32, gen_length 16"
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "'by' of a is diffa2_mini/assets" in run(capfd, *flags(folder), code=2)
    run(capfd, "--benchmark", "toy", "--score", folder / "answers.jsonl")  # which mixes nothing
    assert result_of(folder)["overall"]["right"] == 3


def test_questions_without_an_answer_are_asked_written_named_and_not_scored(folder, capfd):
    unknown = [TOY[0] | {"answer": ""}, TOY[1] | {"answer": None}, TOY[2] | {"answer": "a harp"}]
    known = [row | {"id": row["id"] * 2} for row in TOY]
    (folder / "toy.json").write_text(json.dumps([*unknown, *known]))
    printed = run(capfd, *flags(folder))
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows[:3]] == ["three one four", "B. 3", "flute"]
    result = result_of(folder)
    assert (result["overall"]["right"], result["overall"]["count"]) == (3, 4)
    assert result["unscored"] == ["a", "b", "c"]
    assert result["tables"]["task"]["speech"]["count"] == 1
    assert "answer is blank or none of their choices, not scored: 3\n  a\n  b\n  c\n" in printed
    assert "could not be read, counted as wrong where they are scored: 1\n  dd: " in printed
    (folder / "toy.json").write_text(json.dumps([row | {"answer": " "} for row in TOY]))
    printed = run(capfd, *flags(folder, "blank.jsonl"))  # as MMAU's full test set
    assert "toy: no question can be scored" in printed and "%," not in printed
    assert len((folder / "blank.jsonl").read_text().splitlines()) == 4
    result = result_of(folder, "blank")
    assert result["overall"] is None and result["tables"] == {}
    run(capfd, "--benchmark", "toy", "--score", folder / "blank.jsonl")
    assert result_of(folder, "blank")["unscored"] == ["a", "b", "c", "d"]


def test_white_space_around_answers_and_choices_does_not_count(folder, capfd):
    rows = [TOY[0] | {"answer": "three one four \n"}, TOY[1] | {"answer": "\t3"},
            TOY[2] | {"choices": ["organ", " flute"]}]
    (folder / "toy.json").write_text(json.dumps(rows))
    run(capfd, *flags(folder))
    assert result_of(folder)["overall"]["right"] == 3 and result_of(folder)["unscored"] == []


def test_two_runs_do_not_write_into_one_file(folder, capfd):
    run(capfd, *flags(folder), "--limit", 1)
    before = (folder / "answers.jsonl").read_bytes()
    with held(folder, "answers.jsonl"):
        error = run(capfd, *flags(folder), code=2)
        assert f"{folder / 'answers.jsonl'}: another run is writing here" in error
        assert (folder / "answers.jsonl").read_bytes() == before
        run(capfd, *flags(folder, "others.jsonl"), "--limit", 1)  # another file of the same folder
    assert "of which 1 are answered" in run(capfd, *flags(folder))


def test_choices_in_another_order_have_other_letters(folder, capfd):
    run(capfd, *flags(folder), "--shuffle-options", 5)
    row = json.loads((folder / "answers.jsonl").read_text().splitlines()[1])
    assert row["choices"] == ["3", "2", "4"] and row["response"] == "A. 3"
    assert result_of(folder)["overall"]["right"] == 3
    assert "another order" in run(capfd, *flags(folder), code=2)
    assert "another order" in run(capfd, *flags(folder), "--shuffle-options", 6, code=2)
    # the file tells the order
    run(capfd, "--benchmark", "toy", "--score", folder / "answers.jsonl")
    assert result_of(folder)["overall"]["right"] == 3


def test_a_clip_that_ends_early_is_answered_and_counted(folder, capfd):
    path = folder / "audio" / "three_one_four.wav"
    path.write_bytes(path.read_bytes()[:-4000])
    printed = run(capfd, *flags(folder))
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert rows[0]["response"].startswith("three one") and str(path) in rows[0]["incomplete"]
    short = [row["id"] for row in rows if row["audio_id"] == path.name]
    assert [*result_of(folder)["incomplete"]] == short
    assert [*result_of(folder)["broken_audio"]] == ["d"]
    assert f"used as far as they go: {len(short)}\n  {path}: expected " in printed
    assert run(capfd, *flags(folder)).endswith(printed[printed.index("task"):])  # from the file too


def test_a_long_clip_is_cut_and_counted(folder, capfd):
    digits, rate = soundfile.read(CLIPS / "three_one_four.wav")
    soundfile.write(folder / "audio" / "gone.wav", np.concatenate([digits, digits]), rate)
    (folder / "audio" / "minor_arpeggio.wav").write_text("no sound")
    printed = run(capfd, *flags(folder))
    assert result_of(folder)["cut"] == 1 and [*result_of(folder)["broken_audio"]] == ["c"]
    assert "cut to their beginning: 1" in printed
    assert "minor_arpeggio.wav: expected an audio file" in printed
    run(capfd, "--benchmark", "toy", "--score", folder / "answers.jsonl")
    assert result_of(folder)["cut"] == 1 and [*result_of(folder)["broken_audio"]] == ["c"]


@pytest.mark.parametrize("broken", ["gone", "elsewhere", "no sound", "unnamed"])
def test_a_run_in_which_no_clip_is_there_ends_before_weights_are_read(
        folder, capfd, monkeypatch, broken):
    before, more = sorted(folder.iterdir()), []
    if broken == "gone":
        shutil.rmtree(folder / "audio")
        before.remove(folder / "audio")
    elif broken == "elsewhere":
        more = ["--audio-root", folder / "no"]
    elif broken == "no sound":
        for clip in (folder / "audio").iterdir():
            clip.write_text("version https://git-lfs.github.com/spec/v1")
    else:
        (folder / "toy.json").write_text(json.dumps([row | {"audio_id": None} for row in TOY]))
    monkeypatch.setattr(model_flags, "model_source", None)
    error = run(capfd, *flags(folder), *more, code=2)
    assert "expected the clips of 4 questions, found not one" in error and error.count("\n") == 1
    assert "check --audio-root" in error and sorted(folder.iterdir()) == before


def test_clips_that_all_turn_out_to_be_broken_are_no_score(folder, capfd):
    """Their headers are whole, so that it shows only when they are read."""
    sound, rate = soundfile.read(CLIPS / "three_one_four.wav")
    soundfile.write(folder / "audio" / "gone.wav", sound * np.nan, rate, subtype="FLOAT")
    (folder / "toy.json").write_text(json.dumps(TOY[3:]))
    assert "expected replies to 1 questions, got none" in run(capfd, *flags(folder), code=2)
    rows = [row | {"response": "", "error": "not there"} for row in TOY]
    (folder / "theirs.json").write_text(json.dumps(rows))
    error = run(capfd, "--benchmark", "toy", "--score", folder / "theirs.json", code=2)
    assert "got none (not there)" in error and not list(folder.glob("*.result.json"))


@pytest.mark.parametrize("name", ["mmsu", "mmau", "mmar"])
def test_each_published_format_is_answered_and_scored(folder, capfd, name):
    """The toy model was not taught to be asked like this: that all is asked, written and counted is
    what can be told."""
    rows = [{
        "id": row["id"], "audio_path": row["audio_id"], "question": row["question"],
        "answer_gt": row["answer"], "category": "Perception", "sub-category": "x",
        "sub-sub-category": None, "task_name": row["sub-category"]
    } | {
        f"choice_{letter}": choice
        for letter, choice in zip("abcd", [*row["choices"], None, None])}
            for row in TOY]
    if name != "mmsu":
        rows = [
            row | {"audio_path": row["audio_id"], "modality": row["task"], "language": "en"}
            for row in TOY]
    is_lines = name == "mmsu"
    text = "".join(json.dumps(row) + "\n" for row in rows) if is_lines else json.dumps(rows)
    (folder / "published").write_text(text)
    run(capfd, "--benchmark", name, "--file", folder / "published", "--audio-root",
        folder / "audio", "--out", folder / "x.jsonl")
    result = result_of(folder, "x")
    assert result["overall"]["count"] == 4 and [*result["broken_audio"]] == ["d"]
    assert all(
        sum(row["count"] for row in rows.values()) == 4 for rows in result["tables"].values())
    run(capfd, "--benchmark", name, "--score", folder / "x.jsonl", "--file", folder / "published")
    assert result_of(folder, "x") == result


def test_transcripts(folder, capfd):
    said = [("three_one_four.wav", "Three, one five!"), ("gone.wav", "never heard"),
            ("three_one_four.wav", "")]
    rows = [{"audio_id": f"{i}", "audio_filepath": clip, "transcription": text}
            for i, (clip, text) in enumerate(said)]
    (folder / "audio" / "manifest.json").write_text(json.dumps(rows))
    (folder / "audio" / "wav.scp").write_text(
        "".join(f"{r['audio_id']} {r['audio_filepath']}\n" for r in rows))
    (folder / "audio" / "text").write_text(
        "".join(f"{r['audio_id']} {r['transcription']}\n" for r in rows))
    (folder / "kaldi").mkdir()
    for name in ("wav.scp", "text"):
        (folder / "audio" / name).rename(folder / "kaldi" / name)
    assert run_script(kaldi.main, [str(folder / "kaldi")]) == 0
    for file, out in (("audio/manifest.json", "m"), ("kaldi/manifest.json", "k")):
        printed = run(capfd, "--benchmark", "asr", "--file", folder / file, "--audio-root",
                      folder / "audio", "--out", folder / f"{out}.jsonl")
        result = result_of(folder, out)
        assert [result[k]
                for k in ("substitutions", "deletions", "insertions", "words")] == [1, 2, 3, 5]
        assert "never heard" in printed and result["worst"][0]["hypothesis"] == "three one four"
    assert result_of(folder, "m") == result_of(folder, "k")


def test_answers_made_elsewhere_are_scored(folder, capfd):
    def score(rows, *more, code=0):
        (folder / "theirs.json").write_text(json.dumps(rows))
        return run(capfd, "--benchmark", "mmau", "--score", folder / "theirs.json", *more,
                   code=code)

    theirs = [{"id": row["id"], "model_output": reply}
              for row, reply in zip(TOY, ["three one four", "B", "organ"])]
    score(theirs, "--file", folder / "toy.json")
    assert result_of(folder, "theirs")["overall"]["right"] == 1
    assert result_of(folder, "theirs")["unanswered"] == ["d"]
    assert result_of(folder, "theirs")["overall"]["mended"] == 0.5
    assert result_of(folder, "theirs")["bare_letters"] == 1
    score([row | {"model_prediction": row["answer"]} for row in TOY])  # these bring their questions
    assert result_of(folder, "theirs")["overall"]["right"] == 4
    score([row | {"model_prediction": row["answer"]} for row in TOY], "--limit", 2)
    assert result_of(folder, "theirs")["overall"]["count"] == 2
    for rows, more, message in [(theirs, [], "is no question of mmau"),
                                (TOY, [], "expected predictions under"),
                                (theirs * 2, ["--file", folder / "toy.json"], "a#2"),
                                ([], [], "empty"),
                                (theirs, ["--out", folder / "x"], "leave --out out")]:
        assert message in score(rows, *more, code=2)


@pytest.mark.parametrize("more, message", [
    (["--benchmark", "mmau"], "--benchmark mmau needs its --file"),
    (["--benchmark", "mmlu"], "--benchmark"),
    ([], "--benchmark"),
    (["--benchmark", "mmau", "--file", "gone.json"], "got no such file"),
    (["--benchmark", "toy"], "'python data/toybench.py' makes it, or name it: --file"),
    (["--benchmark", "toy", "--limit", "0"], "--limit"),
    (["--benchmark", "toy", "--shuffle-options", "-1"], "--shuffle-options"),
    (["--benchmark", "toy", "--batch-size", "0"], "--batch"),
])
def test_a_flag_that_cannot_be_is_one_line_and_exit_code_2(more, message, capfd, tmp_path,
                                                           monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmarks, "DATA", tmp_path)
    error = run(capfd, *more, code=2)
    assert message in error and error.count("\n") == 1 and not [*tmp_path.iterdir()]
def test_published_weights_are_asked_as_the_authors_ask(folder, published, capfd, monkeypatch):
    """Files of a small shape, in the published layout; the file of answers tells how they were
    asked."""
    monkeypatch.setitem(SIZES, "full", (dataclasses.replace(CONFIG, size="full"), {}))
    where = [word for part, path in published.items() for word in (f"--{part}", path)]
    (folder / "audio" / "asr.json").write_text(
        '[{"audio_filepath": "three_one_four.wav", "target": "three one four"}]')
    multiple_choice = [
        "--benchmark", "mmau", "--file", folder / "toy.json", "--audio-root", folder / "audio"]
    for i, (flags, settings) in enumerate(
        [(multiple_choice, "gen_length 16, block_length 16, steps 16, factor 1.0"),
         ([*multiple_choice, "--gen-length",
           32], "gen_length 32, block_length 16, steps 32, factor 1.0"),
         ([*multiple_choice, "--steps", 4], "gen_length 16, block_length 16, steps 4, factor None"),
         (["--benchmark", "asr", "--file", folder / "audio" / "asr.json"],
          "gen_length 128, block_length 128, steps 128, factor 1.0")]):
        run(capfd, "--size", "full", *where, *flags, "--out", folder / f"{i}.jsonl", "--device",
            "cpu")
        rows = [json.loads(line) for line in (folder / f"{i}.jsonl").read_text().splitlines()]
        assert len(rows) == (1 if "asr" in flags else 4)
        assert all(settings in row["by"] and "bfloat16" in row["by"] for row in rows)
        assert sum("error" in row for row in rows) == len(rows) // 4  # the clip that is gone
        # these take 2 seconds
        assert result_of(folder, i)["cut"] == sum("cut" in row for row in rows) > 0
