"""Small files in exactly the published formats, and the prompts that come of them."""

import json
from pathlib import Path

import pytest

from diffa2_mini.errors import UserError
from diffa2_mini.evaluate.benchmarks import BENCHMARKS, load_questions, rows_of

MMSU = {
    "id": "long_speech_1", "audio_path": "audio/a.wav", "question": "What is said?",
    "choice_a": "one", "choice_b": "two", "choice_c": "three", "choice_d": "four",
    "answer_gt": "two", "task_name": "long_speech", "category": "Perception",
    "sub-category": "Linguistics", "sub-sub-category": "Semantics",
    "linguistics_sub_discipline": "Semantics"}
MMAU = {
    "id": "3fe64f3d", "audio_id": "./test-mini-audios/3fe64f3d.wav", "question": "Which sound?",
    "choices": ["a bell", "a siren"], "answer": "a siren", "dataset": "AudioSet", "task": "sound",
    "split": "test-mini", "category": "Reasoning", "sub-category": "Event Reasoning",
    "difficulty": "medium"}
MMAR = {"id": "x_00-01", "audio_path": "./audio/x_00-01.wav", "question": "Who?",
        "choices": ["Ann", "Bob", "Cleo", "Dan", "Eve"], "answer": "Bob",
        "modality": "mix-sound-speech", "category": "Semantic Layer",
        "sub-category": "Speaker Analysis", "language": "en", "source": "youtube",
        "url": "https://example.org", "timestamp": "00:01"}


def write(path: Path, rows: list[dict], lines: bool = False) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows),
                    encoding="utf-8")
    return path


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


def load(name, path, root=None, shuffle=None):
    return load_questions(name, path, root, shuffle)


def groups(name, question):
    """The rows of each table in which a question counts."""
    return {title: rows_of(title, question.row) for title in BENCHMARKS[name].tables}


def test_mmsu_is_asked_as_its_authors_do(tmp_path):
    (question,) = load("mmsu", write(tmp_path / "mmsu.jsonl", [MMSU], lines=True))
    assert question.prompt == (
        "Choose the most suitable answer from options A, B, C, and D to respond the question in "
        "next line, **you should only choose A or B or C or D.** Do not provide any additional "
        "explanations or content.\n\nQuestion: What is said?\n\nA. one\nB. two\nC. three\nD. four")
    assert (question.id, question.audio, question.answer) == (
        "long_speech_1", tmp_path / "audio/a.wav", "two")
    assert groups("mmsu", question) == {
        "category": ["Perception"], "category / sub-category": ["Perception / Linguistics"],
        "category / sub-category / sub-sub-category": ["Perception / Linguistics / Semantics"],
        "task_name": ["long_speech"]}


def test_null_choices_of_mmsu_are_dropped(tmp_path):
    null = MMSU | {"choice_c": None, "choice_d": None}
    absent = {name: value for name, value in MMSU.items() if name not in ("choice_c", "choice_d")}
    for question in load("mmsu", write(tmp_path / "mmsu.jsonl", [null, absent], lines=True)):
        assert question.choices == ("one", "two") and question.prompt.endswith("\nA. one\nB. two")
        assert question.row["choice_c"] is question.row["choice_d"] is None
    (shuffled,) = load("mmsu", write(tmp_path / "one.json", [null]), shuffle=3)
    assert shuffled.choices == ("two", "one") and shuffled.row["choice_a"] == "two"


def test_mmau_is_asked_as_the_authors_of_diffa2_do(tmp_path):
    (question,) = load("mmau", write(tmp_path / "mmau.json", [MMAU]))
    assert question.prompt == (
        "You are given the audio and a multiple-choice question. Choose the best answer based "
        "only on the speech content and style.\n\nQuestion: Which sound?\n\n"
        "Choices:\nA. a bell\nB. a siren\nAnswer:")
    assert question.audio == tmp_path / "test-mini-audios/3fe64f3d.wav"
    assert groups("mmau", question) == {
        "task": ["sound"], "category": ["Reasoning"], "sub-category": ["Event Reasoning"],
        "difficulty": ["medium"]}


def test_mmar_is_asked_as_mmau(tmp_path):
    (question,) = load("mmar", write(tmp_path / "mmar.json", [MMAR]), root=tmp_path / "elsewhere")
    assert question.prompt.endswith(
        "Question: Who?\n\nChoices:\nA. Ann\nB. Bob\nC. Cleo\nD. Dan\nE. Eve\nAnswer:")
    assert question.audio == tmp_path / "elsewhere/audio/x_00-01.wav"
    assert groups("mmar", question) == {
        "modality": ["mix-sound-speech"], "category": ["Semantic Layer"],
        "sub-category": ["Speaker Analysis"], "language": ["en"]}


def test_odd_fields_are_read(tmp_path):
    rows = [
        MMAU | {"category": ["Reasoning", "Perception", "Reasoning"]},
        MMAU | {"category": None, "audio_id": None},
        MMAU | {"id": 7, "choices": [3, "4.5", None], "answer": 3, "difficulty": []},
        MMAU | {"audio_id": "/abs/x.wav"}]
    questions = load("mmau", write(tmp_path / "mmau.json", rows))
    assert rows_of("category", questions[0].row) == ["Reasoning", "Perception"]
    assert rows_of("category", questions[1].row) == ["(none)"]
    assert rows_of("category / task", questions[0].row) == [
        "Reasoning / sound", "Perception / sound"]
    assert questions[1].audio is None and questions[3].audio == Path("/abs/x.wav")
    assert (questions[2].id, questions[2].choices, questions[2].answer) == ("7", ("3", "4.5"), "3")
    assert rows_of("difficulty", questions[2].row) == ["(none)"]
    # asked more than once about a clip
    assert [q.id for q in questions] == ["3fe64f3d", "3fe64f3d#2", "7", "3fe64f3d#3"]


def test_an_answer_is_one_of_the_choices_but_for_white_space(tmp_path):
    """Then the released rule, which compares texts as they are, finds it."""
    changes = {"answer_gt": " two\n"}, {"choice_b": "two "}, {"answer_gt": "Two"}
    rows = [MMSU | change for change in changes]
    questions = load("mmsu", write(tmp_path / "mmsu.jsonl", rows, lines=True))
    assert [q.can_be_scored for q in questions] == [True, True, False]
    assert [q.judge("B. two") for q in questions] == [True, True, False]
    assert questions[0].row == rows[0]  # what is written is what was read


@pytest.mark.parametrize("row, scored", [
    (MMAU, True), (MMAU | {"answer": ""}, False), (MMAU | {"answer": " \n"}, False),
    (MMAU | {"answer": None}, False), (without(MMAU, "answer"), False),
    (MMAU | {"answer": "a dog"}, False), (MMAU | {"answer": "", "choices": ["", "a bell"]}, False),
    (MMAU | {"answer": "?", "choices": ["?", "!"]}, False)])  # the rule looks for words
def test_questions_without_an_answer_among_their_choices_cannot_be_scored(tmp_path, row, scored):
    (question,) = load("mmau", write(tmp_path / "mmau.json", [row]))
    assert question.can_be_scored is scored


def test_a_transcript_can_be_compared_even_if_nothing_is_said(tmp_path):
    row = {"audio_filepath": "a.wav", "transcription": ""}
    (question,) = load("asr", write(tmp_path / "manifest.json", [row]))
    assert question.can_be_scored


def test_the_order_of_the_choices_follows_seed_and_id(tmp_path):
    path = write(tmp_path / "mmar.json", [MMAR | {"id": f"q{i}"} for i in range(20)])
    once, again, other, plain = (load("mmar", path, shuffle=seed) for seed in (1, 1, 2, None))
    assert once == again and all(sorted(q.choices) == sorted(MMAR["choices"]) for q in once)
    assert [q.choices for q in once] != [q.choices for q in other]
    assert len({q.choices for q in once}) > 10
    assert all(q.choices == tuple(MMAR["choices"]) for q in plain)
    assert all(
        f"B. {q.choices[1]}\n" in q.prompt and q.row["choices"] == list(q.choices) for q in once)
    alone = write(tmp_path / "alone.json", [MMAR | {"id": "q7"}])
    assert load("mmar", alone, shuffle=1)[0].choices == once[7].choices  # whatever else is asked
    null = load("mmsu", write(tmp_path / "m.jsonl", [MMSU | {"choice_d": None}], lines=True),
                shuffle=3)[0]
    assert sorted(null.choices) == ["one", "three", "two"] and null.row["choice_d"] is None


@pytest.mark.parametrize("name, rows, message", [
    ("mmau", [MMAU, without(MMAU, "answer", "audio_id")],
     "entry 2 is no question of mmau: the field answer is missing"),
    ("mmau", [MMAU | {"answer": ["a bell"]}], "expected text in answer, got ['a bell']"),
    ("mmau", [without(MMAU, "question")], "question is missing"),
    ("mmau", [MMSU | {"answer": "x"} | dict.fromkeys(
        ("choice_a", "choice_b", "choice_c", "choice_d"))], "choices, got 0"),
    ("mmsu", [MMAU], "answer_gt is missing"),
    ("mmar", ["text"], "expected an object, got str"),
    ("mmau", [{"question": "?"}], "id or audio_id or audio_filepath is missing"),
    ("mmau", [MMAU | {"question": {"a": 1}}], "expected text in question, got {'a': 1}"),
    ("mmau", [MMAU | {"question": "\ud800"}], "characters that are none"),
    ("asr", [{"audio_filepath": "a.wav", "input": "?"}], "transcription or target is missing"),
    ("asr", [{"audio_filepath": "a.wav", "type": "caption", "target": "x"}],
     "questions of other types alone"),
])
def test_a_broken_entry_is_named(tmp_path, name, rows, message):
    with pytest.raises(UserError, match="file.json") as error:
        load(name, write(tmp_path / "file.json", rows))
    assert message in str(error.value)


def test_a_manifest_is_a_benchmark_of_transcripts(tmp_path):
    rows = [{
        "audio_id": "a", "audio_filepath": "a.wav", "transcription": "One.", "input": "?",
        "type": "asr"
    }, {"audio_filepath": "b.wav", "target": "two"},
            {"audio_id": "a", "audio_filepath": "a.wav", "target": "1", "type": "count"}]
    questions = load("asr", write(tmp_path / "manifest.json", rows))
    assert [(q.id, q.audio, q.answer) for q in questions] == [
        ("a", tmp_path / "a.wav", "One."), ("b.wav", tmp_path / "b.wav", "two")]
    assert {q.prompt for q in questions} == {"Please transcribe the audio to text."}


def test_decoding_defaults_are_the_authors():
    assert {name: benchmark.length for name, benchmark in BENCHMARKS.items()} == {
        "mmsu": 16, "mmau": 16, "mmar": 16, "asr": 128, "toy": None}
