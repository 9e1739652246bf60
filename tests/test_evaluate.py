"""The command as a user runs it: on published files over our own clips, stopped and continued, and on answers made elsewhere."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_published import CONFIG, published, trained  # noqa: F401, the last two are fixtures

from diffa2_mini import answers, checkpoint, command, evaluate, weights
from diffa2_mini.config import SIZES, run_script

CLIPS = Path(__file__).resolve().parent.parent / "data" / "clips"
TOY = [  # in MMAU's fields, as the toy model was taught to be asked
    {"id": "a", "audio_id": "three_one_four.wav", "question": "Please transcribe the audio to text.",
     "choices": ["three one four", "three one five"], "answer": "three one four", "task": "speech",
     "category": "perception", "sub-category": "asr", "difficulty": "free"},
    {"id": "b", "audio_id": "./siren_bell_drum.wav", "question": "How many sounds are there?", "choices": ["2", "3", "4"],
     "answer": "3", "task": "sound", "category": "reasoning", "sub-category": "count", "difficulty": "lettered"},
    {"id": "c", "audio_id": "minor_arpeggio.wav", "question": "Which instrument plays?", "choices": ["organ", "flute"],
     "answer": "flute", "task": "music", "category": "perception", "sub-category": "instrument", "difficulty": "free"},
    {"id": "d", "audio_id": "gone.wav", "question": "What kind of audio is this?", "choices": ["speech", "sound"],
     "answer": "sound", "task": "sound", "category": "perception", "sub-category": "kind", "difficulty": "lettered"}]


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
    return ["--benchmark", "toy", "--file", folder / "toy.json", "--audio-root", folder / "audio", "--out", folder / out]


def result_of(folder, name="answers"):
    return json.loads((folder / f"{name}.result.json").read_text())


def test_the_shipped_model_answers_a_benchmark_with_a_clip_that_is_gone(folder, capfd):
    printed = run(capfd, *flags(folder), "--batch-size", 2)
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == ["three one four", "B. 3", "flute", ""]
    assert all(row | fields == row for row, fields in zip(rows, TOY)) and "gone.wav" in rows[3]["error"]
    result = result_of(folder)
    assert (result["overall"]["right"], result["overall"]["count"]) == (3, 4) and [*result["broken_audio"]] == ["d"]
    assert result["tables"]["difficulty"]["lettered"]["accuracy"] == 0.5 and result["malformed"] == {}
    assert "3 of 4 right" in printed and "gone.wav" in printed and "4 questions, of which 0 are answered" in printed


def test_a_stopped_run_goes_on_where_it_was(folder, capfd, monkeypatch):
    run(capfd, *flags(folder))
    whole, figures = (folder / "answers.jsonl").read_text(), result_of(folder)
    asked, ask = [], answers.answer

    def stopping(model, tokenizer, ears, examples, *rest, **named):
        asked.extend(example.path.stem for example in examples)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(model, tokenizer, ears, examples, *rest, **named)

    monkeypatch.setattr(answers, "answer", stopping)
    with pytest.raises(SystemExit, match="goes on from"):
        run(capfd, *flags(folder, "stopped.jsonl"), "--batch-size", 1)
    path = folder / "stopped.jsonl"
    assert path.read_text() == whole.split("\n")[0] + "\n" and asked == ["three_one_four", "siren_bell_drum"]
    with open(path, "a") as file:
        file.write(whole.split("\n")[1][:-7])  # a line that was not finished
    assert "of which 1 are answered" in run(capfd, *flags(folder, "stopped.jsonl"))
    assert asked[2:] == ["siren_bell_drum", "minor_arpeggio"]
    assert path.read_text() == whole and result_of(folder, "stopped") == figures
    shutil.copy(folder / "audio" / "siren_bell_drum.wav", folder / "audio" / "gone.wav")  # no longer
    assert "of which 3 are answered" in run(capfd, *flags(folder, "stopped.jsonl"))
    assert asked[4:] == ["gone"] and result_of(folder, "stopped")["overall"]["right"] == 4
    monkeypatch.setattr(command, "load_model", None)  # nothing is left to ask
    assert "of which 4 are answered" in run(capfd, *flags(folder, "stopped.jsonl"))


def test_what_is_drawn_depends_on_the_question_alone(folder, capfd):
    copies = [TOY[2] | {"id": f"copy {i}"} for i in range(6)]
    (folder / "toy.json").write_text(json.dumps([TOY[3], *copies]))  # a clip that is gone, then six
    hot = ["--temperature", 3, "--seed", 1795687535000000000]
    run(capfd, *flags(folder, "whole.jsonl"), *hot)
    run(capfd, *flags(folder), *hot, "--batch-size", 2, "--limit", 4)
    run(capfd, *flags(folder), *hot, "--batch-size", 1)  # goes on, and tries the first again
    whole, parts = ({row["id"]: row["response"] for row in map(json.loads, path.read_text().splitlines())}
                    for path in (folder / "whole.jsonl", folder / "answers.jsonl"))
    assert whole == parts and len({*whole.values()}) > 3


def test_answers_of_another_way_to_ask_are_not_mixed(folder, capfd):
    run(capfd, *flags(folder), "--limit", 1)
    assert result_of(folder)["overall"]["count"] == 1
    for more, message in ((["--factor", 1], "factor 1.0"), (["--benchmark", "mmau"], "holds answers of toy"),
                          (["--dtype", "bfloat16"], "bfloat16"), (["--merge-lora"], "LoRA merged")):
        assert message in run(capfd, *flags(folder), *more, code=2)
    other = shutil.copy(weights.SHIPPED["diffa2"], folder / "other.safetensors")
    trained = checkpoint.load(other)
    run(capfd, *flags(folder, "other.jsonl"), "--limit", 1, "--checkpoint", other)
    trained.model["trainable_prompts.weight"] += 1
    checkpoint.save(other, trained)  # another model under the same name
    assert "holds answers of" in run(capfd, *flags(folder, "other.jsonl"), "--limit", 1, "--checkpoint", other, code=2)
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 1
    run(capfd, *flags(folder), "--limit", 3)
    run(capfd, *flags(folder), "--limit", 2)  # fewer than are answered
    assert result_of(folder)["overall"]["count"] == 2


def test_choices_in_another_order_have_other_letters(folder, capfd):
    run(capfd, *flags(folder), "--shuffle-options", 5)
    row = json.loads((folder / "answers.jsonl").read_text().splitlines()[1])
    assert row["choices"] == ["3", "2", "4"] and row["response"] == "A. 3" and result_of(folder)["overall"]["right"] == 3
    assert "another order" in run(capfd, *flags(folder), code=2)
    assert "another order" in run(capfd, *flags(folder), "--shuffle-options", 6, code=2)
    run(capfd, "--benchmark", "toy", "--score", folder / "answers.jsonl")  # the file tells the order
    assert result_of(folder)["overall"]["right"] == 3


def test_a_long_clip_is_cut_and_counted(folder, capfd):
    digits, rate = soundfile.read(CLIPS / "three_one_four.wav")
    soundfile.write(folder / "audio" / "gone.wav", np.concatenate([digits, digits]), rate)
    (folder / "audio" / "minor_arpeggio.wav").write_text("no sound")
    printed = run(capfd, *flags(folder))
    assert result_of(folder)["cut"] == 1 and [*result_of(folder)["broken_audio"]] == ["c"]
    assert "of which it heard the beginning: 1" in printed and "minor_arpeggio.wav: expected audio" in printed
    run(capfd, "--benchmark", "toy", "--score", folder / "answers.jsonl")
    assert result_of(folder)["cut"] == 1 and [*result_of(folder)["broken_audio"]] == ["c"]


def test_a_run_in_which_no_clip_can_be_heard(folder, capfd):
    shutil.rmtree(folder / "audio")
    run(capfd, *flags(folder))
    assert result_of(folder)["overall"]["right"] == 0 and len(result_of(folder)["broken_audio"]) == 4


@pytest.mark.parametrize("name", ["mmsu", "mmau", "mmar"])
def test_each_published_format_is_answered_and_scored(folder, capfd, name):
    """The toy model was not taught to be asked like this: that all is asked, written and counted is what can be told."""
    rows = [{"id": row["id"], "audio_path": row["audio_id"], "question": row["question"], "answer_gt": row["answer"],
             "category": "Perception", "sub-category": "x", "sub-sub-category": None, "task_name": row["sub-category"]}
            | {f"choice_{letter}": choice for letter, choice in zip("abcd", [*row["choices"], None, None])} for row in TOY]
    if name != "mmsu":
        rows = [row | {"audio_path": row["audio_id"], "modality": row["task"], "language": "en"} for row in TOY]
    is_lines = name == "mmsu"
    text = "".join(json.dumps(row) + "\n" for row in rows) if is_lines else json.dumps(rows)
    (folder / "published").write_text(text)
    run(capfd, "--benchmark", name, "--file", folder / "published", "--audio-root", folder / "audio", "--out", folder / "x.jsonl")
    result = result_of(folder, "x")
    assert result["overall"]["count"] == 4 and [*result["broken_audio"]] == ["d"]
    assert all(sum(row["count"] for row in rows.values()) == 4 for rows in result["tables"].values())
    run(capfd, "--benchmark", name, "--score", folder / "x.jsonl", "--file", folder / "published")
    assert result_of(folder, "x") == result


def test_transcripts(folder, capfd):
    rows = [{"audio_id": f"{i}", "audio_filepath": clip, "transcription": text} for i, (clip, text) in enumerate([
        ("three_one_four.wav", "Three, one five!"), ("gone.wav", "never heard"), ("three_one_four.wav", "")])]
    (folder / "audio" / "manifest.json").write_text(json.dumps(rows))
    (folder / "audio" / "wav.scp").write_text("".join(f"{r['audio_id']} {r['audio_filepath']}\n" for r in rows))
    (folder / "audio" / "text").write_text("".join(f"{r['audio_id']} {r['transcription']}\n" for r in rows))
    for file, out in (("manifest.json", "m"), ("wav.scp", "k")):
        printed = run(capfd, "--benchmark", "asr", "--file", folder / "audio" / file, "--out", folder / f"{out}.jsonl")
        result = result_of(folder, out)
        assert [result[k] for k in ("substitutions", "deletions", "insertions", "words")] == [1, 2, 3, 5]
        assert "never heard" in printed and result["worst"][0]["hypothesis"] == "three one four"
    assert result_of(folder, "m") == result_of(folder, "k")


def test_answers_made_elsewhere_are_scored(folder, capfd):
    def score(rows, *more, code=0):
        (folder / "theirs.json").write_text(json.dumps(rows))
        return run(capfd, "--benchmark", "mmau", "--score", folder / "theirs.json", *more, code=code)

    theirs = [{"id": row["id"], "model_output": reply} for row, reply in zip(TOY, ["three one four", "B", "organ"])]
    score(theirs, "--file", folder / "toy.json")
    assert result_of(folder, "theirs")["overall"]["right"] == 1 and result_of(folder, "theirs")["unanswered"] == ["d"]
    assert result_of(folder, "theirs")["overall"]["mended"] == 0.5 and result_of(folder, "theirs")["bare_letters"] == 1
    score([row | {"model_prediction": row["answer"]} for row in TOY])  # these bring their questions
    assert result_of(folder, "theirs")["overall"]["right"] == 4
    score([row | {"model_prediction": row["answer"]} for row in TOY], "--limit", 2)
    assert result_of(folder, "theirs")["overall"]["count"] == 2
    for rows, more, message in [(theirs, [], "is no question of mmau"), (TOY, [], "expected predictions under"),
                                (theirs * 2, ["--file", folder / "toy.json"], "a#2"), ([], [], "empty"),
                                (theirs, ["--out", folder / "x"], "leave --out out")]:
        assert message in score(rows, *more, code=2)


@pytest.mark.parametrize("more, message", [
    (["--benchmark", "mmau"], "--benchmark mmau needs its --file"), (["--benchmark", "mmlu"], "--benchmark"), ([], "--benchmark"),
    (["--benchmark", "mmau", "--file", "gone.json"], "found no such file"), (["--benchmark", "toy", "--limit", "0"], "--limit"),
    (["--benchmark", "toy", "--shuffle-options", "-1"], "--shuffle-options"),
    (["--benchmark", "toy", "--batch-size", "0"], "--batch"),
])
def test_a_flag_that_cannot_be_is_one_line_and_exit_code_2(more, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = run(capfd, *more, code=2)
    assert message in error and error.count("\n") == 1 and not [*tmp_path.iterdir()]


def test_published_weights_are_asked_as_the_authors_ask(folder, published, capfd, monkeypatch):  # noqa: F811
    """Files of a small shape, in the published layout; the file of answers tells how they were asked."""
    monkeypatch.setitem(SIZES, "full", (dataclasses.replace(CONFIG, size="full"), {}))
    where = [word for part, path in published.items() for word in (f"--{part}", path)]
    (folder / "audio" / "asr.json").write_text('[{"audio_filepath": "three_one_four.wav", "target": "three one four"}]')
    multiple_choice = ["--benchmark", "mmau", "--file", folder / "toy.json", "--audio-root", folder / "audio"]
    for i, (flags, settings) in enumerate([
            (multiple_choice, "gen_length 16, block_length 16, steps 16, factor 1.0"),
            ([*multiple_choice, "--gen-length", 32], "gen_length 32, block_length 16, steps 32, factor 1.0"),
            ([*multiple_choice, "--steps", 4], "gen_length 16, block_length 16, steps 4, factor None"),
            (["--benchmark", "asr", "--file", folder / "audio" / "asr.json"],
             "gen_length 128, block_length 128, steps 128, factor 1.0")]):
        run(capfd, "--size", "full", *where, *flags, "--out", folder / f"{i}.jsonl", "--device", "cpu")
        rows = [json.loads(line) for line in (folder / f"{i}.jsonl").read_text().splitlines()]
        assert len(rows) == (1 if "asr" in flags else 4)
        assert all(settings in row["by"] and "bfloat16" in row["by"] for row in rows)
        assert sum("error" in row for row in rows) == len(rows) // 4  # the clip that is gone
        assert result_of(folder, i)["cut"] == sum("cut" in row for row in rows) > 0  # these hear 2 seconds
