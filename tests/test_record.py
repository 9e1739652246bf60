"""The microphone: what stands in for sounddevice hears what a test says; no hardware is needed."""

import inspect
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from mini import ROOT, full_disk

import sample
from diffa2_mini.audio import load_audio
from diffa2_mini.command.record import record
from diffa2_mini.command.script import run_script
from diffa2_mini.errors import UserError

CLIP = ROOT / "data" / "clips" / "three_one_four.wav"


class PortAudioError(Exception):
    pass


@pytest.fixture
def microphone(monkeypatch, tmp_path):
    """A microphone of 48 kHz that hears the samples in `heard`; `asked` is how it was used."""
    found = SimpleNamespace(PortAudioError=PortAudioError, heard=np.zeros(0), asked=[], rate=48e3)

    def rec(out, samplerate, blocking):
        found.asked.append((out.shape, out.dtype, samplerate, blocking))
        n = min(len(out), len(found.heard))
        out[:n, 0] = found.heard[:n]
        return out

    found.query_devices = lambda kind: {"input": {"default_samplerate": found.rate}}[kind]
    found.rec = rec
    monkeypatch.setitem(sys.modules, "sounddevice", found)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return found


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("rate, seconds", [(48_000, 1.5), (44_100, 4), (16_000, 0.1)])
def test_one_channel_is_recorded_at_the_microphones_rate_for_as_long_as_asked(
        rate, seconds, microphone, capsys):
    n_samples = round(seconds * rate)
    microphone.rate = float(rate)
    microphone.heard = 0.5 * np.sin(2 * np.pi * 440 * np.arange(n_samples) / rate)
    path = record(seconds, 4)
    assert microphone.asked == [((n_samples, 1), np.float32, rate, True)]
    found = soundfile.info(path)
    assert (found.samplerate, found.channels, found.frames) == (rate, 1, n_samples)
    samples, n = load_audio(path), round(seconds * 16_000)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(n) / 16_000)
    assert samples.shape == (n,)
    np.testing.assert_allclose(samples[200:-200], expected[200:-200], atol=1e-3)
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err == f"recording {seconds:g} s: speak now\nrecorded: {path}\n"


@pytest.mark.parametrize("peak, is_silent", [(0, True), (5e-5, True), (2e-3, False)])
def test_silence_is_said_in_one_line(peak, is_silent, microphone, capsys):
    microphone.heard = np.full(48_000, peak)
    record(1, 4)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == is_silent and all("silent" in line for line in notes)


def test_what_is_heard_is_answered_shown_on_the_page_and_can_be_asked_about_again(
        microphone, tmp_path, capsys):
    microphone.heard, rate = soundfile.read(CLIP)
    microphone.rate, seconds = float(rate), len(microphone.heard) / rate
    page = tmp_path / "answer.html"
    argv = ["--record", str(seconds), "--json", "--html", str(page)]
    assert run_script(sample.main, argv) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["start"] == 0 and row["end"] == pytest.approx(seconds, abs=1e-3)
    assert Path(row["audio"]).name in page.read_text(encoding="utf-8")
    for clip in (row["audio"], str(CLIP)):
        assert run_script(sample.main, [clip, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == row["tokens"]
    assert left(tmp_path) == sorted(["answer.html", Path(row["audio"]).name])


def refused(argv, capsys):
    """The line of a command that must not be run."""
    assert run_script(sample.main, argv) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("argv, message", [
    ([str(CLIP), "--record", "2"], "got both"), ([], "got neither"),
    (["--record", "0"], "--record must be from 0.1"), (["--record", "-1"], "--record must be"),
    (["--record", "nan"], "--record must be"), (["--record", "4.5"], "at most 4, the seconds"),
    (["--record", "14", "--size", "toy"], "at most 4, the seconds"),
    (["--record", "2", "--quantize", "fp8", "--device", "cpu"], "--quantize fp8: expected a GPU"),
    (["--record", "2", "--quantize", "int8", "--merge-lora"], "exclude each other"),
    (["--record", "2", "--html", "no/such/folder.html"], "in a folder that exists")])
def test_what_cannot_be_recorded_is_one_line_and_nothing_is(argv, message, microphone, tmp_path,
                                                            capsys):
    assert message in refused(argv, capsys)
    assert not microphone.asked and not left(tmp_path)


def without_package(monkeypatch, microphone):
    monkeypatch.setitem(sys.modules, "sounddevice", None)  # so Python says that there is none


def without_library(monkeypatch, microphone):
    """A package that raises what the real one does while it is imported."""
    def load(name, path, target=None):
        if name == "sounddevice":
            raise OSError("PortAudio library not found")

    monkeypatch.delitem(sys.modules, "sounddevice")
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=load), *sys.meta_path])


def without_device(monkeypatch, microphone):
    def query(kind):
        raise PortAudioError("Error querying device -1")

    monkeypatch.setattr(microphone, "query_devices", query)


@pytest.mark.parametrize("lacking, message", [
    (without_package, "pip install sounddevice"), (without_library, "libportaudio2"),
    (without_device, "expected a microphone, got 'Error querying device -1'; plug one in")])
def test_what_is_missing_is_one_line(lacking, message, microphone, monkeypatch, tmp_path, capsys):
    lacking(monkeypatch, microphone)
    assert message in refused(["--record", "2"], capsys)
    assert not left(tmp_path)


def test_a_microphone_that_does_not_open_leaves_no_file(microphone, monkeypatch, tmp_path):
    def rec(out, samplerate, blocking):
        raise PortAudioError("Error opening InputStream:\nDevice unavailable [PaErrorCode -9985]")

    monkeypatch.setattr(microphone, "rec", rec)
    with pytest.raises(UserError, match="'Error opening InputStream: Device unavailable"):
        record(1, 4)
    assert not left(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_no_file(microphone, tmp_path, capsys):
    with full_disk(1000):
        assert run_script(lambda argv: record(1, 4), []) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[1].startswith("error: ") and not left(tmp_path)


def test_the_real_package_takes_what_is_asked_of_it():
    try:
        import sounddevice
    except (ImportError, OSError) as error:
        pytest.skip(str(error))
    assert {"out", "samplerate", "blocking"} <= inspect.signature(sounddevice.rec).parameters.keys()
    assert "kind" in inspect.signature(sounddevice.query_devices).parameters
    assert issubclass(sounddevice.PortAudioError, Exception)
