"""ToyBench: in MMAU's format, over scenes that no training shows, the same each time."""

import json
from collections import Counter

import pytest

from data import toy, toy_text, toybench
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
    assert len(names) == 1 + 15
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
    assert {"evaluation", "toybench"} == {*toy.HELD_OUT} and toy.SPLITS["toybench"] == (60, 60, 60)
    # their place is part of what a clip is made of
    assert list(toy.SPLITS)[:3] == ["stage0", "train", "evaluation"]


def test_the_clips_are_of_held_out_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "SPLITS", toy.SPLITS | {"toybench": (4, 4, 4)})
    assert all(toy_text.held_out(scene) for scene, _ in toy.make_clips(tmp_path, "toybench", 0))
