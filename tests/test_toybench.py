"""ToyBench: in MMAU's format, over scenes that no training shows, the same each time; and the
questions that tell what stage 4 is for."""

import json
from collections import Counter

import numpy as np
import pytest

from data import toy, toy_text, toybench
from diffa2_mini.config import SIZES
from diffa2_mini.data import load_examples, read_manifest
from diffa2_mini.evaluate.benchmarks import load_questions

FIELDS = {
    "id", "audio_id", "question", "choices", "answer", "task", "category", "sub-category",
    "difficulty"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    patch, made = pytest.MonkeyPatch(), [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    patch.setattr(toy, "SPLITS", toy.SPLITS | {"toybench": (6, 5, 4)})
    for folder in made:
        toybench.make(folder)
    patch.undo()
    return made


def test_it_is_the_same_each_time(folders):
    one, two = folders
    names = sorted(path.relative_to(one) for path in one.rglob("*.*"))
    assert len(names) == 2 + 15
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_it_has_every_kind_of_question_in_the_fields_of_mmau(folders):
    rows = json.loads((folders[0] / "toybench.json").read_text())
    assert all(set(row) == FIELDS for row in rows) and len({row["id"] for row in rows}) == len(rows)
    cells = Counter((row["task"], row["category"], row["difficulty"]) for row in rows)
    # which word fits cannot be asked without the words
    free_music_reasoning = ("music", "reasoning", "free")
    assert set(cells) == {(task, category, asked)
                          for task in toy.KINDS
                          for category in ("perception", "reasoning")
                          for asked in ("free", "lettered")} - {free_music_reasoning}
    for row in rows:
        assert row["choices"].count(row["answer"]) == 1
        assert 2 <= len(set(row["choices"])) == len(row["choices"]) <= 4
        assert "\n" not in row["question"] and (folders[0] / row["audio_id"]).is_file()
    positions = Counter(row["choices"].index(row["answer"]) for row in rows)
    # the answer has no position of its own
    assert min(positions[0], positions[1]) > 0.2 * len(rows)


def test_questions_are_asked_as_the_model_was_taught(folders):
    questions = load_questions("toy", folders[0] / "toybench.json", None, None)
    wordings = {
        pattern.split("{")[0]
        for patterns in toy_text.WORDINGS.values()
        for pattern in patterns}
    for question in questions:
        first, *rest = question.prompt.split("\n")
        assert any(first.startswith(start) for start in wordings)
        lettered = question.row["difficulty"] == "lettered"
        assert rest == ([f"{letter}. {choice}"
                         for letter, choice in zip("ABCD", question.choices)] if lettered else [])


def test_its_scenes_are_held_out():
    assert {"evaluation", "toybench"} == {*toy.HELD_OUT}
    # their place is part of what a clip is made of
    assert list(toy.SPLITS)[:3] == ["stage0", "train", "evaluation"]


def test_the_clips_are_of_held_out_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "SPLITS", toy.SPLITS | {"toybench": (4, 4, 4)})
    assert all(toy_text.held_out(scene) for scene, _ in toy.make_clips(tmp_path, "toybench", 0))


def test_no_type_is_asked_more_often_than_others_and_clips_stay_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "SPLITS", toy.SPLITS | {"toybench": (6, 5, 4)})
    monkeypatch.setattr(toybench, "N_PER_TYPE", 3)
    rows = json.loads(toybench.make(tmp_path).read_text())
    counts = Counter((row["sub-category"], row["difficulty"]) for row in rows)
    assert max(counts.values()) == counts["kind", "free"] == 3 and len(counts) == 23
    assert [row["audio_id"] for row in rows] == sorted(row["audio_id"] for row in rows)


def test_half_of_the_premises_are_false_in_words_that_pairs_never_have(folders):
    file = folders[0] / "premises.json"
    rows, said = read_manifest(file), {}
    types = Counter(row["type"] for row in rows)
    assert types["present"] == types["absent"] > 0 and types["after"] == types["premise"]
    for row in rows:
        *wording, x = row["input"].rstrip("?").split()
        assert x in toy_text.UNPAIRED and row["target"] != row["rejected"] != ""
        assert (x in row["transcription"].split()) == (row["type"] in ("present", "after"))
        said.setdefault(row["type"], set()).add(" ".join(wording))
    assert said["present"] == said["absent"] == {"Does the audio have any"}
    assert len(load_examples(file, SIZES["toy"][1][2], SIZES["toy"][0])) == len(rows)


def test_there_are_enough_questions_of_each_type(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "synthesize", lambda scene, rng: (np.zeros(1), []))  # asks nothing
    rows = json.loads(toybench.make(tmp_path).read_text())
    counts = Counter((row["sub-category"], row["difficulty"]) for row in rows)
    assert len(counts) == 23 and 100 <= min(counts.values()) <= max(counts.values()) <= 120
    premises = Counter(row["type"] for row in read_manifest(tmp_path / "premises.json"))
    assert premises == {"present": 100, "absent": 100, "after": 57, "premise": 57}  # 300 or more
