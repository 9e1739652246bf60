"""The file of answers: stopped anywhere, continued, and made elsewhere."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from diffa2_mini.data import read_manifest
from diffa2_mini.errors import UserError
from diffa2_mini.evaluate.answers import (
    PREDICTIONS,
    Reply,
    append,
    match,
    questions_in,
    resume,
    to_line,
)
from diffa2_mini.evaluate.benchmarks import read_questions

ROWS = [{
    "id": f"q{i}", "audio_id": f"{i}.wav", "question": f"Which of {i}?",
    "choices": ["a dog", "a cat"], "answer": "a cat"
} for i in range(4)]
QUESTIONS = read_questions("mmau", ROWS, Path("file"))
SHORT = "3.wav: expected 2.00 s, got 1.00 s, cut off or damaged"
REPLIES = [
    Reply("a cat"),
    Reply("ein\n„Häßliches“ \u2028 Entlein", cut=True),
    Reply("", "2.wav: no such file"),
    Reply("", incomplete=SHORT)]
TEXT = "".join(to_line("mmau", "a model", *pair) for pair in zip(QUESTIONS, REPLIES))
ANSWERED = {"q0": REPLIES[0], "q1": REPLIES[1], "q3": REPLIES[3]}  # the others are asked again


def matched(rows):
    return match(rows, QUESTIONS, Path("file"), "mmau")


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    assert resume(path, "mmau", "a model", QUESTIONS) == {}
    append(path, TEXT)
    assert resume(path, "mmau", "a model", QUESTIONS) == ANSWERED
    assert path.read_text(encoding="utf-8").count("\n") == 3
    assert match(read_manifest(path), QUESTIONS, path, "mmau") == ANSWERED
    row = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    prompt = hashlib.sha256(QUESTIONS[0].prompt.encode()).hexdigest()
    assert row == ROWS[0] | {"benchmark": "mmau", "by": "a model", "response": "a cat",
                             "prompt_sha256": prompt, "clip_sha256": None}


def test_a_line_tells_the_contents_of_its_clip(tmp_path):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(bytes(3 * 2**20 + 1))
    question = dataclasses.replace(QUESTIONS[0], audio=clip)
    row = json.loads(to_line("mmau", "a model", question, REPLIES[0]))
    assert row["clip_sha256"] == hashlib.sha256(clip.read_bytes()).hexdigest()
    for audio in (None, tmp_path, tmp_path / "gone.wav"):
        question = dataclasses.replace(QUESTIONS[0], audio=audio)
        assert json.loads(to_line("mmau", "a model", question, REPLIES[0]))["clip_sha256"] is None


def test_a_run_may_stop_at_any_byte(tmp_path):
    """Whatever was written of the last line, the lines before it stay, and the rest of the file can
    be written anew."""
    path, data = tmp_path / "answers.jsonl", TEXT.encode()
    first, second = (len(line.encode()) + 1 for line in TEXT.split("\n")[:2])
    for end in sorted(
        {*range(0, first + second + 30, 7), 1, first - 1, first, first + 1, first + second}):
        path.write_bytes(data[:end])
        known = resume(path, "mmau", "a model", QUESTIONS)
        assert [*known] == ["q0", "q1"][:(end >= first) + (end >= first + second)]
        assert path.read_bytes() == data[:[0, first, first + second][len(known)]]


def test_damaged_bytes_of_a_line_are_refused_and_left(tmp_path):
    """They would count as an answer in which a character stands for them."""
    path = tmp_path / "answers.jsonl"
    damaged = TEXT.encode().replace(b"cat", b"c\xfft", 1)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="a damaged line"):
        resume(path, "mmau", "a model", QUESTIONS)
    assert path.read_bytes() == damaged


def test_half_a_pair_of_surrogates_is_written_and_read_again(tmp_path):
    path, reply = tmp_path / "answers.jsonl", Reply("a cat \ud800")
    for text in (to_line("mmau", "a model", QUESTIONS[0], reply), '{"benchmark": "mm'):
        append(path, text)
    for _ in range(2):  # with an unfinished line, and without
        assert resume(path, "mmau", "a model", QUESTIONS) == {"q0": reply}


def test_answers_of_another_run_are_refused_and_left(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(TEXT)
    shuffled = read_questions("mmau", [row | {"choices": row["choices"][::-1]} for row in ROWS],
                              Path("file"))
    others = read_questions("mmau", [row | {"choices": ["a bus", "a car"]} for row in ROWS],
                            Path("file"))
    for arguments, message in [
        (("mmar", "a model", QUESTIONS), "answers a question of mmau, not of mmar"),
        (("mmau", "another", QUESTIONS), "'by' of q0 is a model, this run has another"),
        (("mmau", "a model", QUESTIONS[:1]), "entry 2: q1 is not asked"),
        (("mmau", "a model", shuffled), "in another order; check .* --shuffle-options"),
        (("mmau", "a model", others), "other choices")
    ]:
        with pytest.raises(UserError, match=message):
            resume(path, *arguments)
        assert path.read_text() == TEXT
    twice = TEXT + TEXT.split("\n")[0] + "\n"
    for text, message in [("notes", "another file"), ("some\nnotes\n", "another file"),
                          (TEXT + "{}\n", "another file"),
                          (TEXT.replace('"id": "q1"', '"id": q1'), "a damaged line"),
                          (twice, "q0#2")]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            resume(path, "mmau", "a model", QUESTIONS)
        assert path.read_text() == text


def test_a_place_that_cannot_be_written_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "answers.jsonl"):
        with pytest.raises(UserError, match="could not be written"):
            resume(path, "mmau", "a model", QUESTIONS)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_from_elsewhere_go_by_four_names(name):
    rows = [{"id": "q1", name: "a dog"}, {"id": "q0", name: "a cat", "more": 1},
            {"id": "q3", name: None}, {"id": "q2"}]
    assert matched(rows) == {"q1": Reply("a dog"), "q0": Reply("a cat")}
    assert matched([{"id": "q0", name: 0}]) == {"q0": Reply("0")}
    asked = [{"id": "q0", name: "x", "question": f"Listen.\n{ROWS[0]['question']} A. a dog"}]
    assert matched(asked) == {"q0": Reply("x")}  # within their own words


def test_an_error_beside_a_reply_is_another_programs_and_does_not_make_it_none():
    rows = [{"id": "q0", "response": "a dog", "error": "slow"},
            {"id": "q1", "response": "", "error": "gone"}]
    assert matched(rows) == {"q0": Reply("a dog"), "q1": Reply("", "gone")}


@pytest.mark.parametrize("rows, message", [
    ([{"id": "q0", "response": "x"}, {"id": "z", "response": "x"}],
     "entry 2: z is not asked"),
    ([{"id": "q0", "response": "x"}, {"id": "q0", "response": "y"}], "q0#2"),
    ([{"id": "q0", "prediction": "x"}],
     "one of response, model_prediction, model_output, answer_prediction, got none"),
    ([{"id": "q0", "response": ["x"]}], "entry 1: expected text under response, got list"),
    ([{"response": "x"}], "entry 1: the field id"),
    ([{"id": "q0", "response": "x", "question": "Which of 7?"}],
     "entry 1: q0 was asked another question"),
])
def test_answers_that_do_not_fit_are_named(rows, message):
    with pytest.raises(UserError, match=message):
        matched(rows)


def test_a_question_answered_twice_in_a_file_of_its_own_is_an_error():
    rows = [row | {"response": "a cat"} for row in ROWS]
    with pytest.raises(UserError, match="a question of q2 is answered twice"):
        questions_in(rows + [rows[2] | {"response": "a dog"}], Path("file"), "mmau")
    another = rows[2] | {"question": "Another, about the same clip?"}
    assert [each.id for each in questions_in(rows + [another], Path("file"), "mmau")][4] == "q2#2"
