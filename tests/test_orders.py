"""The manifests of spoken orders, in both layouts: equal orders are in one split, wrong answers are
wrong in one slot, errors are a line."""

import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import soundfile
from mini import full_disk, prepare, refused

from data import corpus, orders
from diffa2_mini.config import SIZES
from diffa2_mini.data import load_examples

SUGARS = (" sugar", "a bit of sugar", "lots of sugar")
N = 30


def labels():
    """Each order twice, under different ways to say the same; a third is without sugar."""
    found = {}
    for i in range(N // 2):
        slots = {"coffeeDrink": orders.VALUES["drink"][i % 5], "milkAmount": " cream",
                 "roast": orders.VALUES["roast"][i // 5]}
        if i % 3:
            slots["sugarAmount"] = SUGARS[i % 2 + (i % 4 > 1)]
        other = {slot: value.strip().replace("a bit of", "a little bit of")
                 for slot, value in slots.items()}
        found |= {f"{i}-a.wav": {"intent": "orderDrink", "slots": slots},
                  f"{i}-b.wav": {"intent": "orderDrink", "slots": other}}
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clone of the repository, of noise."""
    folder = tmp_path_factory.mktemp("benchmark") / "benchmark-master"
    for below in ("label", "speech/clean", "speech/noisy"):
        (folder / "data" / below).mkdir(parents=True)
    (folder / "data/label/label.json").write_text(json.dumps(labels()))
    for name in labels():
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, 4000)
        soundfile.write(folder / "data/speech/clean" / name, noise, 16_000)
        soundfile.write(folder / "data/speech/noisy" / name, noise, 16_000)
    return folder


@pytest.fixture(autouse=True, scope="module")
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "N_CLIPS", N)
        yield


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    return prepare(orders.main, source, tmp_path_factory.mktemp("out"))


def slots_of(row):
    said = labels()[row["audio_id"] + ".wav"]["slots"]
    return {slot: orders.cleaned(said[key]) for slot, key in orders.SLOTS.items() if key in said}


def test_equal_orders_are_in_one_split_and_a_fifth_is_for_testing(made):
    clips = {name: {row["audio_id"] for row in rows} for name, rows in made[1].items()}
    assert len(clips["test"]) == N // 5 and clips["preference"] <= clips["sft"]
    assert len(clips["sft"] | clips["validation"] | clips["test"]) == N
    for first, second in [("sft", "test"), ("sft", "validation"), ("validation", "test")]:
        assert not {name.split("-")[0] for name in clips[first]} & {
            name.split("-")[0] for name in clips[second]}


def test_answers_are_right_and_rejected_ones_wrong(made):
    for name, rows in made[1].items():
        for row in rows:
            slots, type = slots_of(row), row["type"].removesuffix("+abcd")
            if type == "order":
                assert row["target"] == orders.sentence(slots)
                wrong = [slots | {slot: value} for slot in orders.SLOTS
                         for value in orders.VALUES[slot] if value != slots.get(slot)]
                assert row["rejected"] in map(orders.sentence, wrong)
                continue
            lettered = row["type"] != type
            asked = row["input"].splitlines()[0]
            slot = next(slot for slot, texts in orders.WORDINGS.items() if asked in texts)
            assert row["target"][3 * lettered:] == slots.get(slot, "none")
            assert type == (slot if slot in slots else "none")
            assert row["rejected"] != row["target"] and row["rejected"]
            if lettered:
                assert row["target"] in row["input"].splitlines()
            else:  # it affirms what was not said, or another value
                assert row["rejected"] in orders.VALUES[slot]
            if name == "preference":
                assert row["chosen"] == row["target"] and not lettered


def test_each_slot_and_the_whole_order_is_asked_about_each_clip(made):
    types = Counter(row["type"] for row in made[1]["test"])
    assert types["order"] == types["drink"] == types["milk"] == types["roast"] == N // 5
    assert types["sugar"] + types["none"] == 3 * (N // 5)  # nobody said a size or shots
    assert any(type.endswith("+abcd") for type in types)
    asked = Counter((row["audio_id"], row["type"]) for row in made[1]["sft"])
    assert {n for (_, type), n in asked.items() if type == "order"} == {orders.N_WHOLE}


def test_labels_are_said_in_one_way():
    assert orders.cleaned("  a bit of  brown sugar ") == "a little bit of brown sugar"
    assert orders.cleaned("a lot of cream") == "lots of cream"
    assert orders.cleaned("a little bit of milk") == "a little bit of milk"


def test_a_sentence_says_each_slot():
    slots = {"drink": "iced mocha", "size": "eight ounce", "roast": "dark roast",
             "shots": "double shot", "milk": "soy milk", "sugar": "some sugar"}
    assert orders.sentence(slots) == (
        "an eight ounce dark roast iced mocha, double shot, with soy milk and some sugar")
    assert orders.sentence({"drink": "mocha"}) == "a mocha"


def test_a_download_and_the_other_layout_give_the_same(source, made, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "master.tar.gz", "w:gz") as tar:
        tar.add(source, "speech-to-intent-benchmark-master")
    monkeypatch.setattr(orders, "ARCHIVE", corpus.Archive((tmp_path / "master.tar.gz").as_uri()))
    out, manifests = prepare(orders.main, None, tmp_path / "out")
    kept = {path.relative_to(out / "recordings").as_posix() for path in out.rglob("*.wav")}
    assert kept == {f"clean/{name}" for name in labels()}
    assert manifests["sft"][0]["audio_filepath"].startswith("recordings/clean/")
    for name, rows in made[1].items():
        assert [row | {"audio_filepath": ""} for row in manifests[name]] == [
            row | {"audio_filepath": ""} for row in rows]
    config, stages = SIZES["full"]
    assert len(load_examples(out / "preference.json", stages[4], config)) == len(
        made[1]["preference"])


def test_errors_are_one_line_and_leave_nothing(source, tmp_path, capsys):
    def error(folder):
        return refused(orders.main, capsys, "--source", folder, "--out", tmp_path / "out")

    copy = tmp_path / "copy"
    assert "--source" in error(copy)
    (copy / "clean").mkdir(parents=True)
    assert "or label.json and clean, got neither" in error(copy)
    for text in ("[1]", "[" * 100_000):
        (copy / "label.json").write_text(text)
        assert "expected clips with their slots" in error(copy)
    odd = labels()
    odd["0-a.wav"]["slots"]["size"] = "venti"
    (copy / "label.json").write_text(json.dumps(odd))
    assert "got ['venti']" in error(copy)
    (copy / "label.json").write_text(json.dumps(labels()))
    assert f"no clip for {N}" in error(copy)
    for name in labels():
        soundfile.write(copy / "clean" / name, np.zeros(15_001), 1000)
    assert "expected 15 s at most" in error(copy)
    with full_disk(1000):
        assert "sft.json: could not be written" in error(source)
    assert not [*(tmp_path / "out").iterdir()]
