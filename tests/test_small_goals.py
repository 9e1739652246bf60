"""What a run of small reaches, and what is easy: the figures follow from answers and vectors."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from data import orders
from data.toy import write_json
from diffa2_mini.command.script import run_script
from diffa2_mini.config import SIZES
from diffa2_mini.data import Example
from diffa2_mini.errors import UserError
from tutorials import small_goals
from tutorials.small_goals import (
    GOALS,
    commonest,
    key_of,
    paired_bound,
    ridge_answers,
    score,
    table,
)


def example(type, answer, instruction="?"):
    return Example(Path("a.wav"), instruction, answer, "", type, "speech")


def test_questions_about_a_slot_have_its_answers_whether_it_was_said_or_not():
    size, other = orders.WORDINGS["size"][:2]
    train = [example("size", "small", size), example("none", "none", other),
             example("none", "none", size), example("adult", "man"), example("child", "boy"),
             example("child", "boy"), example("asr", "one")]
    assert [key_of(each) for each in train] == ["size"] * 3 + ["who"] * 3 + ["asr"]
    assert commonest(train) == {"size": "none", "who": "boy", "asr": "one"}


def test_digits_are_scored_by_words_and_other_answers_as_a_whole():
    said = [example("asr", "one two"), example("asr", "three")]
    assert score("known", said, ["one two", "three"]) == 0
    assert score("held_out", said, ["one", "three"]) == pytest.approx(1 / 3)
    assert score("said", said, ["one", " three"]) == 0.5


def test_ridge_regression_names_the_class_and_with_much_ridge_the_most_frequent():
    rng = np.random.default_rng(0)
    train = [(rng.normal(size=8) + 4 * np.eye(8)[i % 2], "ab"[i % 2]) for i in range(100)]
    train += [(rng.normal(size=8), "b") for _ in range(10)]
    asked = [4 * np.eye(8)[0], 4 * np.eye(8)[1]]
    assert ridge_answers(train, asked, 1.0) == ["a", "b"]
    assert ridge_answers(train, asked, 1e9) == ["b", "b"]


def cell(before, after, clips="abcd"):
    figures = {goal.name: 0.5 for goal in GOALS}
    return {"stages": {number: figures | {"affirmed": [*map(list, zip(clips, found))]}
                       for number, found in (("3", before), ("4", after))}}


def test_the_change_of_false_affirmations_is_bounded_by_clips():
    same = cell([True, False, True, False], [True, False, True, False])
    assert paired_bound([same]) == [0, 0]
    less = cell([True] * 4, [False] * 4)
    assert paired_bound([less, less]) == [-1, -1]
    low, high = paired_bound([cell([True] * 4, [True, False, False, False])])
    assert -1 <= low < -0.75 < high <= 0


def test_the_table_has_a_row_for_each_goal_and_the_worst_run():
    one, two = cell([True] * 4, [True] * 4), cell([True] * 4, [False] * 4)
    two["stages"]["4"] |= {"known": 0.75, "who": 0.25}
    text = table([one, two], {"most frequent": {"who": 0.4}, "probe": {}}).splitlines()
    assert len(text) >= len(GOALS) + 2
    known = next(line for line in text if "known" in line).split()
    assert known[-2:] == ["0.625", "0.750"]
    who = next(line for line in text if "girl" in line).split()
    assert who[-5:] == ["0.400", "-", "0.500", "0.375", "0.250"]
    affirmed = next(line for line in text if "affirmed" in line).split()
    assert affirmed[-3:] == ["1.000", "0.500", "1.000"]


def test_runs_without_the_acoustic_adapter_and_on_digits_alone_have_rows_of_their_own():
    whole, without = cell([True], [True], "a"), cell([True], [True], "a")
    without["stages"]["4"]["who"] = 0.125
    digits = [{"known": 0.01, "held_out": rate} for rate in (0.06, 0.1)]
    whole["stages"]["4"]["held_out"] = 0.02
    lines = table([whole], {"most frequent": {}, "probe": {}}, [without], digits).splitlines()
    assert [line.split()[-1] for line in lines if "girl" in line] == ["0.500", "0.125"]
    assert "3 held-out speakers" in lines[-1]
    assert "mean 0.060" in lines[-1] and "worst 0.100" in lines[-1]


def test_a_run_on_digits_is_measured_on_its_own_data(tmp_path, monkeypatch):
    """Whose speakers are others than those of data/fsdd."""
    (tmp_path / "config.json").write_text(json.dumps({"arguments": {"data": str(tmp_path)}}))
    for name, said in (("test", "one"), ("held_out", "two")):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(1600), 16_000)
        write_json(tmp_path / f"{name}.json", [
            {"audio_filepath": f"{name}.wav", "input": "?", "target": target, "type": type}
            for target, type in ((said, "asr"), ("yes", "first"))])
    answered = []

    class Echo:
        def __init__(self, features, tokenizer, audio, decode):
            assert audio == ("acoustic", "semantic")

        def answer(self, examples):
            answered.append([example.answer for example in examples])
            return ["one"] * len(examples), None

    monkeypatch.setattr(small_goals, "Respondent", Echo)
    monkeypatch.setattr(small_goals, "load_checkpoint", lambda path: SimpleNamespace(
        **CHECKPOINT, model={}, audio=("acoustic", "semantic")))
    monkeypatch.setattr(small_goals.weights, "restore", lambda *given: None)
    found = small_goals.measure_digits(tmp_path, SimpleNamespace(model=None), {"llada": "a"})
    assert found == {"known": 0, "held_out": 1} and answered == [["one"], ["two"]]


CHECKPOINT = {"step": 7, "done": True, "config": small_goals.CONFIG, "fingerprints": {"llada": "a"}}


@pytest.mark.parametrize("change, message", [
    ({"done": False}, "expected a stage that is done, got 7 steps"),
    ({"fingerprints": {"llada": "b"}}, "name those that it was trained on"),
    ({"config": SIZES["toy"][0]}, "size toy, got small")])
def test_a_run_that_is_not_done_or_is_of_other_parts_is_not_measured(change, message, monkeypatch):
    monkeypatch.setattr(small_goals, "load_checkpoint",
                        lambda path: SimpleNamespace(**CHECKPOINT | change))
    with pytest.raises(UserError, match=message):
        small_goals.restore(Path("a"), None, {"llada": "a"})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"arguments": {}}', '{"arguments": null}'])
def test_a_damaged_description_of_a_run_is_told_in_one_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json: expected what train.py writes"):
        small_goals.data_of(tmp_path)


def test_a_table_without_a_whole_run_says_what_it_needs(tmp_path, capsys):
    (tmp_path / "digits_a.json").write_text('{"run": "a", "known": 0.1, "held_out": 0.2}')
    assert run_script(small_goals.main, ["--table", "--out", str(tmp_path)]) == 2
    assert "no run on all the data is measured yet; name one" in capsys.readouterr().err
