"""Tables and figures against ones worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from diffa2_mini.data import Example
from diffa2_mini.errors import UserError
from diffa2_mini.evaluate import scoreboard
from diffa2_mini.evaluate.answers import Reply
from diffa2_mini.evaluate.benchmarks import read_questions
from diffa2_mini.evaluate.scoreboard import report, wilson, word_error_rate
from diffa2_mini.evaluate.scoring import WordErrors


def example(type, answer, domain="speech", path="clip.wav"):
    return Example(Path(path), "?", answer, "", type, domain)


GRADED = [  # example, answer
    (example("asr", "one two three"), "one two three"),
    (example("asr", "four"), "five"),
    (example("asr", "six seven"), "six"),
    (example("asr", "nine"), "nine nine"),
    (example("caption", "a bell", "sound"), "a bell"),
    (example("caption", "fast", "speech"), "slow"),
    (example("count", "2", "sound"), "2"),
    (example("count", "3", "sound"), "3"),
    (example("count", "3", "sound"), "2"),
    (example("count+abcd", "A. 2", "sound"), "A. 2"),
    (example("count+abcd", "C. 2", "sound"), "B. 2"),
    (example("first+abcd", "D. six"), "D"),
]


def test_report_by_hand():
    result = report(*zip(*GRADED))
    assert result.accuracy == pytest.approx({
        ("speech", "asr"): 1 / 4, ("sound", "caption"): 1, ("speech", "caption"): 0,
        ("sound", "count"): 2 / 3, ("sound", "count+abcd"): 1 / 2, ("speech", "first+abcd"): 1})
    assert result.figures == pytest.approx({
        "open": (1 / 4 + 1 + 0 + 2 / 3) / 4, "lettered": (1 / 2 + 1) / 2, "caption": 1 / 2,
        "overall": 6 / 12, "worst_open": 0, "wer": (0 + 1 + 1 + 1) / (3 + 1 + 2 + 1)})


def test_report_leaves_out_what_was_not_asked():
    figures = report([example("first+abcd", "A. six")], ["A. six"]).figures
    assert set(figures) == {"lettered", "overall"}
    with pytest.raises(ValueError):
        report([example("asr", "six")], [])


def test_the_table_has_a_line_per_type_and_a_column_per_domain():
    lines = report(*zip(*GRADED)).table.splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["question", "sound", "speech"], ["asr", "0.25"], ["caption", "1.00", "0.00"],
        ["count", "0.67"], ["count+abcd", "0.50"], ["first+abcd", "1.00"]]
    assert lines[1].index("0.25") + 4 == len(lines[0])  # below speech
    assert lines[-1].startswith(
        "12 questions: open 0.479, lettered 0.750, caption 0.500, overall 0.500")


# -------------------------------------------------------------------------------------- a benchmark

ROWS = [{
    "id": f"q{i}", "audio_id": f"{i}.wav", "question": "Which?", "choices": ["a dog", "a cat"],
    "answer": "a cat", "task": "sound" if i < 4 else "speech",
    "category": ["Reasoning", "Perception"] if i == 0 else "Reasoning", "sub-category": None,
    "difficulty": "easy"
} for i in range(6)]
ANSWERS = {"q0": Reply("a cat"), "q1": Reply("B"), "q2": Reply("a dog", cut=True),
           "q3": Reply("I hear nothing", incomplete="3.wav: expected 2.00 s, got 1.00 s"),
           "q4": Reply("", "4.wav: not there")}  # and q5 has none


@pytest.fixture
def publish(tmp_path, capsys):
    """What is written as JSON, and what is printed."""
    def publish(name, questions, answers):
        scoreboard.publish(name, questions, answers, tmp_path / "file.jsonl")
        written = (tmp_path / "file.result.json").read_text(encoding="utf-8")
        return json.loads(written), capsys.readouterr().out

    return publish


@pytest.mark.parametrize("name, result", [
    ("a.jsonl", "a.result.json"), ("a.json", "a.result.json"), ("f0.5", "f0.5.result.json"),
    ("f0.25.jsonl", "f0.25.result.json")])
def test_a_result_has_the_whole_name_of_its_answers(name, result, tmp_path):
    questions = read_questions("mmau", ROWS, Path("file"))
    scoreboard.publish("mmau", questions, ANSWERS, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [result]


def test_a_result_by_hand(publish):
    result, _ = publish("mmau", read_questions("mmau", ROWS, Path("file")), ANSWERS)
    assert {k: result["overall"][k] for k in ("count", "right", "accuracy", "mended")} == {
        "count": 6, "right": 1, "accuracy": 1 / 6, "mended": 2 / 6}
    assert {task: (s["count"], s["right"])
            for task, s in result["tables"]["task"].items()} == {"sound": (4, 1), "speech": (2, 0)}
    # one is both
    assert {c: s["count"]
            for c, s in result["tables"]["category"].items()} == {"Perception": 1, "Reasoning": 6}
    assert {c: s["count"] for c, s in result["tables"]["sub-category"].items()} == {"(none)": 6}
    assert result["bare_letters"] == 1 and result["malformed"] == {"q3": "I hear nothing"}
    assert result["broken_audio"] == {"q4": "4.wav: not there"} and result["unanswered"] == ["q5"]
    assert result["cut"] == 1
    assert result["incomplete"] == {"q3": "3.wav: expected 2.00 s, got 1.00 s"}


def test_the_text_tells_what_the_json_does(publish):
    _, printed = publish("mmau", read_questions("mmau", ROWS, Path("file")), ANSWERS)
    assert "1 of 6 right by its rule, 16.7 % (95 % interval 3.0 to 56.4)" in printed
    assert "letters mended: 33.3 %" in printed and "sound" in printed
    assert "q3: 'I hear nothing'" in printed and "q4: 4.wav: not there" in printed
    assert "malformed replies: 1" in printed
    assert "without a reply, counted as wrong: 1\n  q5" in printed
    assert f"{scoreboard.INCOMPLETE}: 1\n  3.wav: expected 2.00 s, got 1.00 s" in printed


@pytest.mark.parametrize(
    "right, count, low, high",
    [  # from tables of Wilson's interval
        (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0),
        (653, 1000, 0.6229, 0.6819)])
def test_the_interval_of_a_share(right, count, low, high):
    assert wilson(right, count) == pytest.approx([low, high], abs=2e-4)


def test_word_errors_of_a_corpus(publish):
    texts = {"a": "One, two!", "b": "three four", "c": "five", "d": "six"}
    rows = [{"id": id, "transcription": text} for id, text in texts.items()]
    questions = read_questions("asr", rows, Path("file"))
    answers = {
        "a": Reply("one two"), "b": Reply("three for for"), "c": Reply("", "no such file")}
    result, text = publish("asr", questions, answers)
    names = ("substitutions", "deletions", "insertions", "words", "clips", "empty")
    assert [result[name] for name in names] == [1, 2, 1, 6, 4, 2]
    low, high = result["interval"]
    assert result["wer"] == pytest.approx(4 / 6) and low < 4 / 6 < high
    assert [clip["id"] for clip in result["worst"]] == ["b", "c", "d"]
    assert result["worst"][0]["hypothesis"] == "three for for"
    assert result["broken_audio"] == {"c": "no such file"} and result["unanswered"] == ["d"]
    assert "1 substitutions, 2 deletions, 1 insertions in 6 words of 4 clips" in text
    assert "66.7 %" in text and "lower" in text


def test_at_most_ten_clips_are_the_worst(publish):
    rows = [{"id": str(i), "transcription": "a " * (i + 1)} for i in range(12)]
    result, _ = publish("asr", read_questions("asr", rows, Path("file")), {"0": Reply("a")})
    assert [clip["id"] for clip in result["worst"]] == [str(i) for i in range(11, 1, -1)]


def test_no_words_are_no_rate(publish):
    rows = [{"id": "a", "transcription": "..."}]
    questions = read_questions("asr", rows, Path("f"))
    with pytest.raises(UserError, match="no word error rate"):
        publish("asr", questions, {"a": Reply("one")})
    assert math.isnan(word_error_rate([WordErrors()]))


def test_the_rate_is_of_the_corpus_and_its_interval_narrows():
    few, many = ([WordErrors(i % 2, 0, 0, 2) for i in range(n)] for n in (10, 1000))
    assert word_error_rate(many) == 0.25
    assert np.diff(scoreboard.bootstrap(many)) < np.diff(scoreboard.bootstrap(few)) / 3


def test_the_figure_so_far_is_what_the_result_will_be():
    questions = read_questions("mmau", ROWS[:5], Path("file"))
    first = scoreboard.judged(questions, {"q0": ANSWERS["q0"]})
    assert scoreboard.so_far(first) == "accuracy 1.000"
    assert scoreboard.so_far(scoreboard.judged(questions, ANSWERS)) == "accuracy 0.200"
    assert scoreboard.so_far(scoreboard.judged(questions, {})) == ""


def test_what_cannot_be_scored_is_counted_and_named(publish):
    """MMAU's rule would find a blank answer in any reply without a word of the choices."""
    blank = [ROWS[0] | {"id": "q6", "answer": ""}, ROWS[0] | {"id": "q7", "answer": "a bird"},
             ROWS[0] | {"id": "q8", "answer": "?", "choices": ["?", "!"]}]
    questions = read_questions("mmau", ROWS[:2] + blank, Path("file"))
    answers = ANSWERS | {f"q{i}": Reply("I hear nothing") for i in (6, 7, 8)}
    assert scoreboard.so_far(scoreboard.judged(questions, answers)) == "accuracy 0.500"
    assert scoreboard.so_far(scoreboard.judged(questions[2:], answers)) == ""
    result, text = publish("mmau", questions, answers)
    assert (result["overall"]["right"], result["overall"]["count"]) == (1, 2)
    assert result["unscored"] == ["q6", "q7", "q8"]
    assert "not scored: 3\n  q6" in text
    assert {row["count"] for row in result["tables"]["task"].values()} == {2}
    result, text = publish("mmau", questions[2:], answers)
    assert result["overall"] is None and result["tables"] == {}
    assert "mmau: no question can be scored" in text
