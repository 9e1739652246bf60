"""The toy world's questions have right answers and wrong ones, and no scene of evaluation is ever
trained on."""

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from mini import full_disk

from data import toy, toy_text
from data.bpe import save_ranks
from data.toy_sound import Scene
from diffa2_mini.command.script import run_script
from diffa2_mini.config import SIZES
from diffa2_mini.data import load_examples, read_manifest
from diffa2_mini.errors import UserError

SPEECH = Scene("speech", ("three", "one", "four"), voice="high", speed="fast")
NAMED = Scene("speech", ("two",), voice="theo")
SOUND = Scene("sound", ("siren", "beep", "drum"))
MUSIC = Scene("music", speed="slow", pattern="arpeggio", mode="minor", instrument="organ")
CHORDS = Scene("music", speed="fast", pattern="chords", mode="major", instrument="flute")
ANSWERS = [
    (SPEECH,
     dict(asr="three one four", count="3", first="three", last="four", who="a high voice",
          speed="fast", caption="a fast high voice says three one four", kind="speech")),
    (NAMED,
     dict(asr="two", count="1", first="two", last="two", who="theo", caption="theo says two",
          kind="speech")),
    (SOUND,
     dict(sounds="siren beep drum", count="3", first="siren", last="drum", kind="sound",
          caption="siren, then beep, then drum")),
    (Scene("sound", ("bell", )),
     dict(sounds="bell", count="1", first="bell", last="bell", kind="sound", caption="bell")),
    (MUSIC,
     dict(tempo="slow", mode="minor", pattern="arpeggio", instrument="organ", kind="music",
          caption="a slow minor arpeggio on the organ")),
    (CHORDS,
     dict(tempo="fast", mode="major", pattern="chords", instrument="flute", kind="music",
          caption="fast major chords on the flute")),
]


@pytest.mark.parametrize("scene, answers", ANSWERS, ids=lambda value: getattr(value, "kind", ""))
def test_every_question_gets_the_right_answer_and_wrong_ones_that_differ(scene, answers):
    rng = np.random.default_rng(0)
    for _ in range(30):
        asked = {
            question.type: question
            for question in toy_text.questions(scene, rng)
            if "+" not in question.type}
        about_x = {type: asked[type].answer for type in asked if type in toy_text.ABOUT_X}
        assert {type: asked[type].answer for type in asked if type not in about_x} == answers
        true = dict(present="yes", absent="no", premise="nothing")
        assert all(answer == true[type] for type, answer in about_x.items() if type != "after")
        for question in asked.values():
            assert question.answer not in question.wrong
            assert len(set(question.wrong)) == len(question.wrong)
            assert "{" not in question.instruction
            assert ("digit" in question.instruction) <= (scene.kind == "speech")


@pytest.mark.parametrize("scene, follows", [
    (SOUND, {"siren": "beep", "beep": "drum"}),
    (Scene("speech", ("two", "one", "two", "six"), voice="low", speed="fast"), {"one": "two"})],
    ids=["sound", "speech"])
def test_after_asks_about_what_is_there_once_and_is_followed(scene, follows):
    rng = np.random.default_rng(0)
    asked = [toy_text.ask("after", scene, rng, wording=0) for _ in range(30)]
    begin = f"Which {'digit' if scene.kind == 'speech' else 'sound'} comes after the "
    found = {question.instruction.removeprefix(begin).rstrip("?"): question.answer
             for question in asked}
    assert found == follows
    assert toy_text.ask("after", Scene("sound", ("bell",)), rng) is None


@pytest.mark.parametrize("scene", [SPEECH, NAMED, SOUND, Scene("sound", ("buzz", "bell"))])
def test_a_question_of_presence_names_what_is_there_or_not_and_pairs_never_name_what_the_test_does(
        scene):
    rng, words = np.random.default_rng(0), {"paired": set(), "unpaired": set()}
    for part, found in words.items():
        for type in toy_text.ABOUT_X:
            for _ in range(60):
                question = toy_text.ask(type, scene, rng, part=part)
                if question:
                    *start, x = question.instruction.rstrip("?").split()
                    found |= {x, " ".join(start)}
                    assert (x in scene.items) == (type in ("after", "present"))
                    assert type != "premise" or set(question.wrong) == set(scene.items)
    assert all(found for found in words.values()) and not words["paired"] & words["unpaired"]


def is_true(scene, question, option):
    """Whether an option answers the question, by the scene alone."""
    plain = question.type.removesuffix("+abcd")
    if plain == "fits":
        return option in asdict(scene).values()
    x = question.instruction.splitlines()[0].rstrip("?").split()[-1]
    return option == toy_text.answer(plain, scene, x)


@pytest.mark.parametrize("scene", [SPEECH, NAMED, SOUND, MUSIC],
                         ids=["speech", "named", "sound", "music"])
def test_lettered_questions_have_one_right_option_at_any_letter(scene):
    rng, letters = np.random.default_rng(0), Counter()
    for _ in range(150):
        for question in toy_text.questions(scene, rng):
            if not question.type.endswith("+abcd"):
                continue
            options = question.instruction.splitlines()[1:]
            assert [option[:3] for option in options] == ["A. ", "B. ", "C. ", "D. "][:len(options)]
            assert len(options) in (3, 4)
            assert len(set(option[3:] for option in options)) == len(options)
            assert [option for option in options
                    if is_true(scene, question, option[3:])] == [question.answer]
            assert sorted([question.answer, *question.wrong]) == options
            letters[len(options), question.answer[0]] += 1
    for n in (3, 4):
        total = sum(letters[n, letter] for letter in "ABCD")
        for letter in "ABCD"[:n]:
            # five standard deviations
            assert abs(letters[n, letter] - total / n) < 5 * np.sqrt(total * (n - 1)) / n


def test_training_scenes_are_never_held_out_and_evaluation_scenes_always():
    for evaluation in (False, True):
        rng = np.random.default_rng(0)
        for kind in toy.KINDS:
            scenes = [toy_text.random_scene(rng, kind, evaluation) for _ in range(100)]
            assert {scene.kind for scene in scenes} == {kind}
            assert len(set(scenes)) > (3 if evaluation else 11)
            assert all(toy_text.held_out(scene) == evaluation for scene in scenes)
        named = [toy_text.random_named_scene(rng, evaluation) for _ in range(100)]
        assert {scene.voice for scene in named} == set(toy_text.NAMES)
        assert all(
            toy_text.held_out(scene) == evaluation for scene in named if len(scene.items) > 1)


def one_edit_apart(a, b):
    """Whether one replacement, insertion, removal or swap turns the tuple a into b."""
    if len(a) == len(b):
        differences = sum(x != y for x, y in zip(a, b))
        return differences == 1 or (differences == 2 and Counter(a) == Counter(b))
    short, long = sorted((a, b), key=len)
    return short in [long[:i] + long[i + 1:] for i in range(len(long))]


@pytest.mark.parametrize("scene", [SPEECH, NAMED, SOUND, MUSIC],
                         ids=["speech", "named", "sound", "music"])
def test_a_mutation_changes_one_respect(scene):
    rng, changed = np.random.default_rng(0), Counter()
    for _ in range(200):
        mutant = toy_text.mutate(scene, rng)
        fields = [name for name, value in asdict(scene).items() if getattr(mutant, name) != value]
        assert len(fields) <= 1  # a swap of an item with itself changes nothing
        assert fields != ["items"] or one_edit_apart(scene.items, mutant.items)
        assert mutant.kind == scene.kind
        assert (mutant.voice in toy_text.NAMES) == (scene.voice in toy_text.NAMES)
        changed.update(fields)
    given = {name for name, value in asdict(scene).items() if value and name != "kind"}
    assert set(changed) == given and changed.total() > 100


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Few clips of each split, on disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SPLITS",
                      {"stage0": (3, 2, 2), "train": (12, 6, 6), "evaluation": (6, 4, 4)})
        folder = toy.make_world(tmp_path_factory.mktemp("toy"))
        toy.make_stage0(folder)
        again = tmp_path_factory.mktemp("again")
        yield folder, again, {split: toy.make_clips(again, split, seed=0) for split in toy.SPLITS}


@pytest.mark.parametrize("name, number",
                         [("stage1", 1), ("sft", 2), ("preference", 4), ("validation", 2)])
def test_manifests_have_the_fields_that_the_stages_read(world, name, number):
    folder, _, clips = world
    config, stages = SIZES["toy"]
    rows = read_manifest(folder / f"{name}.json")
    is_held_out = name == "validation"
    split = "evaluation" if is_held_out else "train"
    scenes = {row["audio_id"]: scene for scene, row in clips[split]}
    for row in rows:
        assert {
            "audio_id", "audio_filepath", "transcription", "input", "target", "dataset", "duration",
            "type", "domain", "rejected"
        } | ({"chosen"} if name == "preference" else set()) == set(row)
        assert row["rejected"] != row["target"]
        assert row.get("chosen", row["target"]) == row["target"]
        assert row["rejected"] or name != "preference"
        scene = scenes[row["audio_id"]]  # and so of the right split
        assert row["domain"] == scene.kind and row["transcription"] == " ".join(scene.items)
        assert toy_text.held_out(scene) == is_held_out
    asked = sum(toy.N_QUESTIONS[scene.kind] for scene, _ in clips["train"])
    assert len(rows) == {"stage1": 12, "sft": asked}.get(name, len(rows))
    assert len(load_examples(folder / f"{name}.json", stages[number],
                             config)) == len(rows)


def test_training_asks_only_what_has_a_wrong_answer_too():
    rng = np.random.default_rng(0)
    clips = [(toy_text.random_scene(rng, kind), {}) for kind in toy.KINDS for _ in range(40)]
    found = toy.manifests(clips, [], seed=0)
    assert len(found["sft"]) == 600 and all(row["rejected"] for row in found["sft"])
    types = Counter(row["type"] for row in found["preference"])
    assert types["present"] == types["absent"] and types["after"] == types["premise"]
    assert sum(n for type, n in types.items() if type not in toy_text.ABOUT_X) == toy.N_PAIRS
    assert all(row["rejected"] for row in found["preference"])


def test_half_of_the_pairs_about_premises_are_true_and_they_reject_what_a_model_would_answer(
        monkeypatch):
    monkeypatch.setattr(toy, "N_PAIRS", 40)
    rng = np.random.default_rng(0)
    scenes = [toy_text.random_scene(rng, kind) for kind in toy.KINDS for _ in range(40)]
    clips = [(scene, {"transcription": " ".join(scene.items)}) for scene in scenes]
    pairs = toy.manifests(clips, [], seed=0)["preference"][40:]
    assert Counter(row["type"] for row in pairs) == dict.fromkeys(toy_text.ABOUT_X, 15)
    rejected = {type: Counter() for type in toy_text.ABOUT_X}
    for row in pairs:
        first, *later = row["transcription"].split()
        rejected[row["type"]][row["rejected"]] += 1
        if row["type"] == "premise":
            assert row["chosen"] == "nothing" and row["rejected"] in (later or [first])
    assert rejected["absent"] == {"yes": 15} and rejected["present"] == {"no": 15}
    assert rejected["after"]["nothing"] >= 7  # half of them, and what a sound left out would give


def test_a_clip_is_the_same_whenever_it_is_made_and_evaluation_is_no_training_clip(world):
    folder, again, clips = world
    rows = json.loads(json.dumps([row for _, row in clips["stage0"]]))
    assert read_manifest(folder / "stage0.json") == rows
    first = clips["train"][0][1]["audio_filepath"]
    assert (folder / first).read_bytes() == (again / first).read_bytes()
    training = {scene for split in ("stage0", "train") for scene, _ in clips[split]}
    assert len(training) > 12 and not training & {scene for scene, _ in clips["evaluation"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "make_clips", None)  # what is there is not made again
        assert toy.make_world(folder) == folder


def test_what_is_made_on_a_full_disk_is_one_line_and_nothing_is_half_written(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "SPLITS", dict.fromkeys(toy.SPLITS, (2, 2, 2)))
    with full_disk(1000):  # no clip
        assert run_script(toy.main, ["--out", str(tmp_path / "a")]) == 2
    assert "could not be written" in capsys.readouterr().err
    rows = [{"audio_filepath": "a.wav"}] * 1000
    with full_disk(1000), pytest.raises(UserError, match="could not be written"):
        toy.write_json(tmp_path / "b.json", rows)
    with full_disk(1000), pytest.raises(UserError, match="could not be written"):
        save_ranks({bytes([i % 256]) * 9: i for i in range(1000)}, tmp_path / "c.bpe")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".bpe", ".tmp")]


def test_a_world_that_is_there_has_its_own_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "SPLITS", dict.fromkeys(toy.SPLITS, (2, 2, 2)))
    assert run_script(toy.main, ["--out", str(tmp_path), "--seed", "1"]) == 0
    assert run_script(toy.main, ["--out", str(tmp_path)]) == 0
    assert run_script(toy.main, ["--out", str(tmp_path), "--seed", "2"]) == 2
    assert "leave out --seed, or choose another --out" in capsys.readouterr().err


def test_a_negative_seed_is_one_line_and_writes_nothing(tmp_path, capsys):
    for flags in ([], ["--listen", str(tmp_path / "a")], ["--clips"], ["--tokenizer", "toy"]):
        assert run_script(toy.main, ["--out", str(tmp_path / "b"), "--seed", "-1", *flags]) == 2
        error = capsys.readouterr().err
        assert "--seed must be from 0 to 9223372036854775807, got -1" in error
        assert error.count("\n") == 1
    assert not [*tmp_path.iterdir()]
