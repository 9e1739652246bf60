"""The manifests of real recordings: nothing leaks between splits, labels lie where the sound is,
errors are a line."""

import io
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from mini import full_disk, prepare, refused

from data import corpus, fsdd, toy_text
from data.toy_scene import DIGITS, Scene
from diffa2_mini.errors import UserError

SPEAKERS = ("george", "lucas", "theo")
TAKES = (*range(8), 45, 46)
TRAINING, EVALUATION = ("stage0", "stage1", "sft", "preference"), ("validation", "test", "held_out")
ALLOWED = dict.fromkeys(TRAINING, range(5, 45)) | {"validation": range(45, 50), "test": range(5)}
CLIPS = {"stage0": 40, "train": 24, "validation": 12, "test": 12, "held_out": 12}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Tones instead of digits: the pitch tells the digit, the length differs, some begin with
    silence."""
    folder = tmp_path_factory.mktemp("source") / "recordings"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for speaker in SPEAKERS:
        for digit in range(10):
            for take in TAKES:
                t = np.arange(round(rng.uniform(0.2, 1.2) * fsdd.RATE)) / fsdd.RATE
                tone = rng.uniform(0.02, 0.9) * np.sin(2 * np.pi * (300 + 100 * digit) * t)
                sound = np.concatenate([np.zeros(take * 100), tone])
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", sound, fsdd.RATE,
                                subtype="PCM_16")
    return folder.parent


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdd, "SPLITS",
                      {name: replace(s, clips=CLIPS[name])
                       for name, s in fsdd.SPLITS.items()})
        yield


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """The folder and its manifests, with theo held out."""
    return prepare(fsdd.main, source, tmp_path_factory.mktemp("out"), "--hold-out", "theo")


def parts(row):
    """The (digit, speaker, take) of each recording of a clip."""
    named = [name.split("_") for name in row["recordings"]]
    return [(int(digit), speaker, int(take)) for digit, speaker, take in named]


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()}


# -------------------------------------------------------------------------------------------- leaks


def test_the_held_out_speaker_is_in_one_manifest_alone(made):
    for name, rows in made[1].items():
        speakers = {speaker for row in rows for _, speaker, _ in parts(row)}
        assert speakers == ({"theo"} if name == "held_out" else {"george", "lucas"}), name
        assert not any(
            row.get("target") == "theo" or row.get("traits") == {"speaker": "theo"} for row in rows)


def test_takes_do_not_cross_splits(made):
    for name, takes in ALLOWED.items():
        assert {take for row in made[1][name] for _, _, take in parts(row)} <= set(takes), name
    # all of his
    assert {take for row in made[1]["held_out"] for _, _, take in parts(row)} & set(range(5, 45))


def test_sequences_do_not_cross_from_evaluation_to_training(made):
    manifests = made[1]
    for name, rows in manifests.items():
        for row in rows:
            scene = Scene("speech", tuple(row["transcription"].split()), voice=parts(row)[0][1])
            assert toy_text.held_out(scene) == (name in EVALUATION), (name, row)
    long = [{
        row["transcription"]
        for name in names
        for row in manifests[name]
        if " " in row["transcription"]}
            for names in (TRAINING, EVALUATION)]
    assert long[0] and long[1] and not long[0] & long[1]


# -------------------------------------------------------------------------------------------- clips


def test_a_clip_is_what_its_row_says(made):
    out, manifests = made
    for row in sum(manifests.values(), []):
        clip, rate = soundfile.read(out / row["audio_filepath"])
        assert rate == 16_000 and clip.ndim == 1
        assert len(clip) == round(row["duration"] * rate) <= 3.9 * rate
        assert 0.1 < np.abs(clip).max() < 0.95
        assert row["transcription"].split() == [DIGITS[digit] for digit, _, _ in parts(row)]
        assert len({speaker for _, speaker, _ in parts(row)}) == 1
        assert row["dataset"] == "fsdd" and row["domain"] == "speech"


def test_long_strings_lose_digits(source):
    """Four digits of 2 s each do not fit; the clips of one digit or two do, and are as long as they
    say."""
    long = [
        replace(r, samples=np.resize(r.samples, 2 * fsdd.RATE))
        for r in fsdd.read_recordings(source)]
    pool = fsdd.by_speaker(long, range(5, 45))
    for i in range(8):
        scene, _, clip, _ = fsdd.make_clip(pool, fsdd.SPLITS["stage0"], np.random.default_rng(i))
        assert len(scene.items) <= 2 and len(clip) <= 3.9 * 16_000


def test_segments_lie_where_the_energy_is(made):
    """The power is inside of the segments, right up to their ends; and the pitch in each is its
    digit's."""
    out, manifests = made
    for row in manifests["stage0"]:
        clip, rate = soundfile.read(out / row["audio_filepath"])
        assert [s["ordinal"] for s in row["segments"]] == list(range(len(row["segments"])))
        assert " ".join(s["label"] for s in row["segments"]) == row["transcription"]
        inside = np.zeros(len(clip), dtype=bool)
        for s in row["segments"]:
            start, end = round(s["start"] * rate), round(s["end"] * rate)
            assert 0 < start < end < len(clip) and not inside[start:end].any()
            inside[start:end] = True
            piece = clip[start:end]
            spectrum = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 1 << 16))
            expected = (300 + 100 * DIGITS.index(s["label"])) * row["factor"]
            assert abs(spectrum.argmax() * rate / (1 << 16) - expected) < 5
            whole = np.mean(piece**2)
            # the 20 ms next to the margin that trimming leaves
            for edge in (piece[320:640], piece[-640:-320]):
                assert np.mean(edge**2) > whole / 4
        # the noise is 10 dB below, or more
        assert np.mean(clip[inside] ** 2) > 5 * np.mean(clip[~inside] ** 2)


def test_augmentation_stays_in_its_range(made):
    factors = {name: [row["factor"] for row in rows] for name, rows in made[1].items()}
    assert 0.8 <= min(factors["stage0"]) < 0.9 and 1.1 < max(factors["stage0"]) <= 1.25
    assert 0.95 <= min(factors["sft"]) < max(factors["sft"]) <= 1.05
    assert set(factors["test"] + factors["validation"] + factors["held_out"]) == {1}
    for row in made[1]["stage0"]:
        named = 0.95 <= row["factor"] <= 1.05
        assert row["traits"] == ({"speaker": parts(row)[0][1]} if named else {})


def test_equalise_turns_three_knobs():
    t = np.arange(16_000) / 16_000
    for hertz, gain in ((200, 6), (900, -6), (4000, 3)):
        tone = np.sin(2 * np.pi * hertz * t).astype(np.float32)
        louder = fsdd.equalise(tone, np.array([6, -6, 3]))[4000:12_000]
        assert 20 * np.log10(louder.std() / tone[4000:12_000].std()) == pytest.approx(gain, abs=0.1)


# ---------------------------------------------------------------------------------------- questions


def test_answers_are_right_and_rejected_ones_wrong(made):
    for name, rows in made[1].items():
        for row in rows:
            if name == "stage0":
                assert "input" not in row
                continue
            digits, speaker = row["transcription"].split(), parts(row)[0][1]
            right = {
                "asr": row["transcription"], "count": str(len(digits)), "first": digits[0],
                "last": digits[-1], "who": speaker
            }[row["type"].removesuffix("+abcd")]
            if row["type"].endswith("+abcd"):
                assert row["target"] in row["input"].splitlines() and row["target"][3:] == right
            else:
                assert row["target"] == right
            assert row["rejected"] != row["target"]
            if row["type"] == "who":
                assert row["rejected"] in toy_text.NAMES
            if name == "preference":
                assert row["rejected"] and row["chosen"] == row["target"]


def test_each_manifest_asks_what_it_should(made):
    types = {name: [row.get("type") for row in rows] for name, rows in made[1].items()}
    assert set(types["stage1"]) == {"asr"} and len(types["stage1"]) == CLIPS["train"]
    assert len(types["sft"]) == 4 * CLIPS["train"]
    assert 0.2 < types["sft"].count("asr") / len(types["sft"]) < 0.5
    assert 0.08 < sum(type.endswith("+abcd") for type in types["sft"]) / len(types["sft"]) < 0.35
    assert types["test"] == [type for type in fsdd.TYPES for _ in range(CLIPS["test"])]
    assert set(types["validation"]) == set(fsdd.TYPES)
    assert types["validation"].count("asr") == CLIPS["validation"]
    assert set(types["held_out"]) == set(fsdd.TYPES) - {"who"}
    asked = {row["input"] for row in made[1]["stage1"]}
    assert len(asked) > 1


@pytest.mark.slow
def test_the_seed_decides_everything(made, source, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    # the recordings' own folder does as well
    prepare(fsdd.main, source / "recordings", again, "--hold-out", "theo")
    assert files(again) == files(made[0])
    prepare(fsdd.main, source, other, "--seed", "1")
    assert (other / "stage0.json").read_bytes() != (made[0] / "stage0.json").read_bytes()
    _, manifests = prepare(fsdd.main, source, again)  # nobody held out: no old manifest stays
    assert "held_out" not in manifests
    assert any(row["target"] == "theo" for row in manifests["test"])


# ------------------------------------------------------------------------------------------- errors


def test_errors_are_one_line_and_leave_nothing(capsys, source, tmp_path):
    def error(folder, *more):
        return refused(fsdd.main, capsys, "--source", folder, "--out", out, *more)

    out, copy = tmp_path / "out", tmp_path / "copy"
    assert "--source" in error(copy)
    copy.mkdir()
    assert "got none" in error(copy)
    assert "george, lucas, theo" in error(source, "--hold-out", "nobody")
    assert "--seed" in error(source, "--seed", -1)
    (tmp_path / "file").touch()
    assert "--out" in refused(fsdd.main, capsys, "--source", source, "--out", tmp_path / "file")
    broken = copy / "3_theo_5.wav"
    broken.write_bytes(b"not audio")
    assert str(broken) in error(copy)
    soundfile.write(broken, np.zeros(800), fsdd.RATE)
    assert "silence" in error(copy)
    soundfile.write(broken, np.ones(800) / 2, fsdd.RATE)
    assert "0_theo_N.wav" in error(copy)
    assert "another speaker" in error(copy, "--hold-out", "theo")
    broken.rename(copy / "3_zorro_5.wav")
    assert "expected a speaker of" in error(copy)
    (copy / "3_zorro_5.wav").unlink()
    for path in source.rglob("*_[5-7].wav"):  # enough for training, not for validation
        shutil.copy(path, copy)
    assert "0_george_N.wav with N of 45-49" in error(copy)
    assert not [*out.iterdir()]
    with full_disk(1000):
        assert "stage0_00000.wav: could not be written" in error(source)


# ----------------------------------------------------------------------------------------- download


@pytest.fixture(autouse=True)
def before_python_3_10_12(monkeypatch):
    """Neither of these had a filter then, so that they are of no use."""
    for name in ("extract", "extractall"):
        monkeypatch.delattr(tarfile.TarFile, name)


def packed(source):
    """The archive as GitHub makes it: one folder on top, and more in it than recordings."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(source / "recordings", "digits-1.0/recordings")
        tar.add(__file__, "digits-1.0/recordings/readme.py")
        tar.add(__file__, "digits-1.0/other/0_theo_0.wav")
        link = tarfile.TarInfo("digits-1.0/recordings/0_theo_99.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        tar.add(__file__, "../../recordings/../outside.wav")
    return buffer.getvalue()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """A function that puts bytes where the archive is fetched from."""
    path = tmp_path / "v1.tar.gz"
    monkeypatch.setattr(corpus.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(fsdd, "ARCHIVE", corpus.Archive(path.as_uri()))
    return path.write_bytes


def test_download(source, made, serve, tmp_path, monkeypatch, capsys):
    serve(packed(source))
    out = tmp_path / "data"
    monkeypatch.setattr(fsdd, "SPEAKERS", SPEAKERS)
    # they are not the real ones
    error = refused(fsdd.main, capsys, "--out", out)
    assert "expected recordings with the SHA-256" in error and "--source DIR" in error
    assert not [*out.iterdir()]
    monkeypatch.setattr(fsdd, "SHA256", fsdd.digest(source / "recordings"))
    prepare(fsdd.main, None, out, "--hold-out", "theo")
    assert files(out / "recordings") == {
        path.relative_to("recordings"): data
        for path, data in files(source).items()}
    assert (out / "sft.json").read_bytes() == (made[0] / "sft.json").read_bytes()
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["clips", "recordings"]
    monkeypatch.setattr(fsdd, "ARCHIVE", corpus.Archive("http://127.0.0.1:9/gone"))
    prepare(fsdd.main, None, out, "--hold-out", "theo")  # nothing is fetched twice


def test_what_cannot_be_downloaded_is_one_line(serve, tmp_path, capsys):
    assert "--source DIR" in refused(fsdd.main, capsys, "--out", tmp_path / "data")
    assert not [*(tmp_path / "data").iterdir()]


def test_a_full_disk_is_no_connection_that_breaks_off(serve, tmp_path):
    serve(bytes(2000))
    with full_disk(1000), pytest.raises(UserError, match=r"could not be written .*; free some"):
        corpus.download(fsdd.ARCHIVE, tmp_path / "archive")


def test_a_full_disk_is_no_damaged_archive_and_what_a_killed_try_left_goes(tmp_path):
    path, folder = tmp_path / "recordings.tar.gz", tmp_path / "recordings"
    (tmp_path / "clip.wav").write_bytes(bytes(200_000))
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "clip.wav", "clip.wav")
    left = tmp_path / "recordings.unpacking" / "left"
    left.mkdir(parents=True)
    with full_disk(100_000), pytest.raises(UserError, match="unpacked .*; free some space"):
        corpus.obtain(fsdd.ARCHIVE, folder, lambda name: name)
    assert path.exists() and not left.parent.exists()
    left.mkdir(parents=True)
    corpus.obtain(fsdd.ARCHIVE, folder, lambda name: name)
    assert [each.name for each in tmp_path.iterdir() if each.is_dir()] == ["recordings"]
    assert [each.name for each in folder.iterdir()] == ["clip.wav"]


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_archive_gives_nothing(source, serve, damage, tmp_path, capsys):
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode="w:gz").close()
    archive = packed(source)
    serve({"cut": archive[: len(archive) // 2], "garbage": b"garbage" * 99,
           "empty": empty.getvalue()}[damage])
    out = tmp_path / "data"
    assert "recordings.tar.gz: could not be unpacked" in refused(fsdd.main, capsys, "--out", out)
    assert [path.name for path in out.iterdir()] == ["recordings.tar.gz"]
