"""The manifests of people who read: no speaker is in two splits, ages decide who is asked about,
errors are a line."""

import json
import tarfile

import numpy as np
import pytest
import soundfile
from mini import prepare

from data import corpus, people
from diffa2_mini.command.script import run_script

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
def few(tmp_path_factory):
    ids = tmp_path_factory.mktemp("ids") / "ids.txt"
    ids.write_text("\n".join(" ".join(names) for names in IDS.values()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(people, "IDS", ids)
        patch.setattr(people, "N_SPEAKERS", len(AGES))
        yield


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    return prepare(people.main, source, tmp_path_factory.mktemp("out"))


def test_no_speaker_is_in_two_splits(made):
    speakers = {name: {row["speaker"] for row in rows} for name, rows in made[1].items()}
    assert speakers["test"] == TEST and len(speakers["validation"]) == 1
    assert speakers["stage1"] == speakers["sft"] == {*AGES} - TEST - speakers["validation"]
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
    assert types["preference"] <= {"adult", "child"} and len(made[1]["test"]) == 2 * 6


def test_a_download_and_the_other_layout_give_the_same(source, made, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "corpus.tar.gz", "w:gz") as tar:
        tar.add(source, "speechocean762")
    monkeypatch.setattr(people, "ARCHIVE", corpus.Archive((tmp_path / "corpus.tar.gz").as_uri()))
    counts = people.make_manifests(None, tmp_path / "out")
    assert counts == {name: len(rows) for name, rows in made[1].items()}
    kept = {path.stem for path in (tmp_path / "out").rglob("*.WAV")}
    assert kept == {name for names in IDS.values() for name in names}
    copy = tmp_path / "copy"
    copy.mkdir()
    lines = [json.dumps({
        "audio": f"../out/recordings/WAVE/SPEAKER{speaker}/{name}.WAV", "speaker": speaker,
        "split": "test" if speaker in TEST else "train", "text": f"SHE SAYS {speaker}",
        "sex": "woman" if sex == "f" else "man", "age": age})
        for speaker, (sex, age) in AGES.items() for name in IDS[speaker]]
    (copy / "people.jsonl").write_text("\n".join(lines))
    people.make_manifests(copy, tmp_path / "again")
    for name, rows in made[1].items():
        again = json.loads((tmp_path / "again" / f"{name}.json").read_text())
        assert [row | {"audio_filepath": ""} for row in again] == [
            row | {"audio_filepath": ""} for row in rows]


def test_the_list_that_ships_is_of_the_speakers_that_are_expected():
    ids = (people.DATA / "people_ids.txt").read_text().split()
    assert len({*ids}) == len(ids) == 1485
    assert len({name[:5] for name in ids}) == 250  # an id begins with its speaker's


def test_errors_are_one_line(source, tmp_path, capsys):
    def error(folder):
        assert run_script(people.main, ["--source", str(folder), "--out", str(tmp_path)]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1
        assert not [*tmp_path.glob("*.json")]
        return printed

    copy = tmp_path / "copy"
    assert "--source" in error(copy)
    copy.mkdir()
    assert "train/text" in error(copy).replace("\\", "/")
    (copy / "people.jsonl").write_text('{"audio": 1}')
    assert "expected speechocean762" in error(copy)
    (copy / "people.jsonl").write_text("")
    assert "expected the 24 utterances" in error(copy) and "got 0" in error(copy)
