"""The manifests of people who read: no speaker is in two splits, ages decide who is asked about,
errors are a line."""

import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import soundfile
from mini import prepare, refused

from data import corpus, people

AGES = {"0001": ("m", 6), "0002": ("f", 12), "0003": ("m", 13), "0004": ("f", 17),
        "0005": ("f", 18), "0006": ("m", 43), "0007": ("f", 8), "0008": ("m", 30)}
KINDS = {"0001": "boy", "0002": "girl", "0005": "woman", "0006": "man", "0007": "girl",
         "0008": "man"}
TEST = {"0007", "0008"}
IDS = {speaker: [f"0{speaker}00{i}" for i in range(3)] for speaker in AGES}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The corpus as it is published, of noise, with an utterance more of each speaker."""
    folder = tmp_path_factory.mktemp("corpus") / "speechocean762"
    tables = {split: {table: "" for table in people.TABLES} for split in ("train", "test")}
    for speaker, (sex, age) in AGES.items():
        mine = tables["test" if speaker in TEST else "train"]
        mine["spk2age"] += f"{speaker}\t{age}\n"
        mine["spk2gender"] += f"{speaker}\t{sex}\n"
        (folder / "WAVE" / f"SPEAKER{speaker}").mkdir(parents=True)
        for name in [*IDS[speaker], f"0{speaker}999"]:
            mine["text"] += f"{name}\tSHE SAYS {speaker}\n"
            mine["utt2spk"] += f"{name}\t{speaker}\n"
            soundfile.write(folder / "WAVE" / f"SPEAKER{speaker}" / f"{name}.WAV",
                            np.random.default_rng(0).uniform(-0.5, 0.5, 4000), 16_000)
    for split, found in tables.items():
        (folder / split).mkdir()
        for table, text in found.items():
            (folder / split / table).write_text(text)
    return folder


@pytest.fixture(autouse=True, scope="module")
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(people, "IDS", {name for names in IDS.values() for name in names})
        patch.setattr(people, "N_SPEAKERS", len(AGES))
        yield


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    return prepare(people.main, source, tmp_path_factory.mktemp("out"))


def test_no_speaker_is_in_two_splits(made):
    speakers = {name: {row["speaker"] for row in rows} for name, rows in made[1].items()}
    assert speakers["test"] == TEST and len(speakers["validation"]) == 1
    assert speakers["stage1"] == {*AGES} - TEST - speakers["validation"]
    assert speakers["sft"] == {each for each in speakers["stage1"] if each in KINDS}
    assert speakers["preference"] <= speakers["sft"]


def test_answers_follow_from_sex_and_age(made):
    for name, rows in made[1].items():
        for row in rows:
            assert row["transcription"] == f"she says {row['speaker']}"
            if row["type"] == "asr":
                assert row["target"] == row["transcription"]
                continue
            kind, lettered = KINDS[row["speaker"]], row["type"].endswith("+abcd")
            assert row["target"][3 * lettered:] == kind != row["rejected"][3 * lettered:]
            assert row["rejected"][3 * lettered:] in people.KINDS
            assert row["type"].startswith("adult" if kind in ("woman", "man") else "child")
            assert name != "preference" or row["chosen"] == row["target"]


def test_each_manifest_asks_what_it_should(made):
    types = {name: {row["type"].removesuffix("+abcd") for row in rows}
             for name, rows in made[1].items()}
    assert types["stage1"] == {"asr"} and types["test"] == {"asr", "adult", "child"}
    assert types["sft"] == types["preference"] == {"adult", "child"}
    assert len(made[1]["test"]) == 2 * 6
    asked = Counter(row["audio_id"] for row in made[1]["sft"])
    assert {*asked.values()} == {people.N_WHO}


def test_a_download_and_the_other_layout_give_the_same(source, made, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "corpus.tar.gz", "w:gz") as tar:
        tar.add(source, "speechocean762")
    monkeypatch.setattr(people, "ARCHIVE", corpus.Archive((tmp_path / "corpus.tar.gz").as_uri()))
    out, downloaded = prepare(people.main, None, tmp_path / "out")
    assert {path.stem for path in out.rglob("*.WAV")} == people.IDS
    copy = tmp_path / "copy"
    copy.mkdir()
    lines = [json.dumps({
        "audio": f"../out/recordings/WAVE/SPEAKER{speaker}/{name}.WAV", "speaker": speaker,
        "split": "test" if speaker in TEST else "train", "text": f"SHE SAYS {speaker}",
        "sex": "woman" if sex == "f" else "man", "age": age})
        for speaker, (sex, age) in AGES.items() for name in IDS[speaker]]
    (copy / "people.jsonl").write_text("\n".join(lines))
    _, again = prepare(people.main, copy, tmp_path / "again")
    for manifests in (downloaded, again):
        for name, rows in made[1].items():
            assert [row | {"audio_filepath": ""} for row in manifests[name]] == [
                row | {"audio_filepath": ""} for row in rows]


def test_the_list_that_ships_is_of_the_speakers_that_are_expected():
    ids = (people.DATA / "people_ids.txt").read_text().split()
    assert len({*ids}) == len(ids) == 1485
    assert len({name[:5] for name in ids}) == 250  # an id begins with its speaker's


def test_errors_are_one_line_and_leave_nothing(tmp_path, capsys):
    def error(folder):
        return refused(people.main, capsys, "--source", folder, "--out", tmp_path / "out")

    copy = tmp_path / "copy"
    assert "--source" in error(copy)
    copy.mkdir()
    assert "train/text" in error(copy).replace("\\", "/")
    (copy / "people.jsonl").write_text('{"audio": 1}')
    assert "expected speechocean762" in error(copy)
    row = {"audio": "a.ogg", "speaker": "1", "split": "test", "text": "A", "sex": "man", "age": 6}
    (copy / "people.jsonl").write_text(json.dumps(row))
    assert "expected the 24 utterances of people_ids.txt by 8 speakers, got 0 by 0" in error(copy)
    assert not [*(tmp_path / "out").iterdir()]
