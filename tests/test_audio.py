"""The front end against references written another way, and the loader against every file a user
may bring."""

import io
import json
import math
import os
import re
import shlex
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch

import sample
import train
from diffa2_mini import audio
from diffa2_mini.audio import (
    duration,
    encoder_frames,
    load_audio,
    log_mel,
    mel_filterbank,
    pad_or_cut,
    resample,
)
from diffa2_mini.command.script import run_script
from diffa2_mini.config import AudioConfig
from diffa2_mini.errors import UserError
from diffa2_mini.evaluate import __main__ as evaluate

SHORT = AudioConfig(max_seconds=4)
SIZES = [AudioConfig(n_mels=m, max_seconds=s) for m in (80, 128) for s in (4, 30)]


def sine(hz, rate=16_000, seconds=1.0, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def noise(n_samples, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, n_samples).astype(np.float32)


def peak_memory(function, *args, **kwargs):
    """What the function returns, and the most bytes that it held meanwhile."""
    tracemalloc.start()
    result, (_, peak) = function(*args, **kwargs), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return result, peak


def slaney_edges(config):
    """Corners of the triangles in Hz [n_mels + 2], one mel at a time."""
    top = 15 + 27 * math.log(config.sample_rate / 2 / 1000) / math.log(6.4)
    mels = [top * i / (config.n_mels + 1) for i in range(config.n_mels + 2)]
    return np.array([m * 200 / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27) for m in mels])


def naive_log_mel(x, config):
    """Frame by frame in float64: the DFT as a matrix, the triangles by interpolation."""
    n_fft, hop = config.n_fft, config.hop_length
    x = np.pad(np.asarray(x, dtype=np.float64), (0, config.max_samples))[: config.max_samples]
    x = np.pad(x, n_fft // 2, mode="reflect")
    n, k = np.arange(n_fft), np.arange(n_fft // 2 + 1)
    dft = np.exp(-2j * np.pi * np.outer(k, n) / n_fft) * (0.5 - 0.5 * np.cos(2 * np.pi * n / n_fft))
    edges, hz = slaney_edges(config), k * config.sample_rate / n_fft
    bank = np.stack([np.interp(hz, edges[i : i + 3], [0, 2 / (edges[i + 2] - edges[i]), 0])
                     for i in range(config.n_mels)])
    frames = [bank @ np.abs(dft @ x[i * hop:i * hop + n_fft])**2 for i in range(config.max_frames)]
    log = np.log10(np.maximum(np.stack(frames, axis=1), 1e-10))
    return (np.maximum(log, log.max() - 8) + 4) / 4


@pytest.mark.parametrize("config", SIZES, ids=lambda c: f"{c.n_mels}-bins-{c.max_seconds}-s")
def test_log_mel_equals_the_naive_one_whatever_the_clip(config):
    for n_samples in (0, 1, 16_000, config.max_samples + 5):
        x = noise(n_samples) + np.linspace(0, 1, n_samples) * sine(440, seconds=n_samples / 16_000)
        mel = log_mel(x, config)
        assert mel.shape == (config.n_mels, config.max_seconds * 100) and mel.dtype == torch.float32
        # the same from NumPy and from torch
        assert mel.isfinite().all() and torch.equal(mel, log_mel(torch.from_numpy(x), config))
        if config.max_seconds == 4:  # the naive one is slow
            np.testing.assert_allclose(mel.numpy(), naive_log_mel(x, config), atol=1e-4)


@pytest.mark.parametrize("hz", [300, 1000, 3000, 7000])
def test_a_sine_peaks_in_the_band_centred_nearest_to_it(hz):
    for n_mels in (80, 128):
        config = AudioConfig(n_mels=n_mels, max_seconds=4)
        loudest = log_mel(sine(hz, seconds=4), config)[:, 10:-10].argmax(dim=0)
        centres = slaney_edges(config)[1:-1]
        # Where triangles are narrower than the window's resolution of 40 Hz, a neighbour may win.
        assert (np.abs(centres[loudest] - hz) <= np.abs(centres - hz).min() + 20).all()


def test_log_mel_is_centred_shows_80_decibels_and_adds_a_half_for_ten_times_the_amplitude():
    click = np.zeros(SHORT.max_samples)
    click[100 * SHORT.hop_length] = 1
    assert log_mel(click, SHORT).sum(dim=0).argmax() == 100  # frame i is centred on sample i * hop
    mel = log_mel(sine(440, seconds=2), SHORT)
    assert mel.max() - mel.min() == pytest.approx(8 / 4)
    x = noise(SHORT.max_samples)  # no band of it is near the floor, so that all of it shifts alike
    louder = log_mel(10 * x, SHORT) - log_mel(x, SHORT)
    torch.testing.assert_close(louder, torch.full((128, 400), 0.5), atol=1e-4, rtol=0)
    # of silence, all is at the floor
    torch.testing.assert_close(log_mel(np.zeros(16_000), SHORT),
                               torch.full((128, 400), (-10 + 4) / 4))


def test_filterbank_triangles():
    # bins 1 Hz apart, so that a sum over bins is an integral over Hz
    config = AudioConfig(n_fft=16_000)
    bank, edges = mel_filterbank(config), slaney_edges(config)
    assert bank.shape == (128, 8001) and bank.min() == 0
    # Slaney: an area of 1 each
    torch.testing.assert_close(bank.sum(dim=1), torch.ones(128), atol=2e-3, rtol=0)
    # the peak, to the nearest Hz
    assert np.abs(bank.argmax(dim=1).numpy() - edges[1:-1]).max() <= 0.5
    assert (bank[:, 0] == 0).all() and (bank[:, -1] < 1e-6).all()  # nothing from DC or Nyquist
    heights = torch.from_numpy((edges[2:] - edges[:-2]) / 2).float()
    total = (bank * heights[:, None]).sum(dim=0)[math.ceil(edges[1]) : int(edges[-2])]
    # scaled to height 1, they tile
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-4, rtol=0)


@pytest.mark.parametrize("n_mels, entries", [
    (80, [(0, 1, 0.024862595), (20, 20, 0.013890394), (40, 43, 0.014735566),
          (79, 196, 0.001795036)]),
    (128, [(0, 1, 0.012373987), (20, 20, 0.0), (64, 43, 0.018091518), (127, 196, 0.004457121)])])
def test_filterbank_is_whispers_cached_and_leaves_no_band_empty(n_mels, entries):
    bank = mel_filterbank(AudioConfig(n_mels=n_mels))
    for band, k, value in entries:  # a few values of the file that Whisper ships (mel_filters.npz)
        assert bank[band, k].item() == pytest.approx(value, abs=1e-8)
    assert bank.shape == (n_mels, 201) and bank.dtype == torch.float32
    assert (bank.sum(dim=1) > 0).all()
    assert bank is mel_filterbank(AudioConfig(n_mels=n_mels))


def test_pad_or_cut():
    x = noise(SHORT.max_samples + 7)
    assert np.array_equal(pad_or_cut(x, SHORT), x[: SHORT.max_samples])
    padded = pad_or_cut(x[:5], SHORT)
    assert np.array_equal(padded[:5], x[:5]) and len(padded) == SHORT.max_samples
    assert not padded[5:].any()
    with pytest.raises(AssertionError, match=r"\(2, 3\)"):
        pad_or_cut(np.zeros((2, 3)), SHORT)


@pytest.mark.parametrize("n_samples, frames", [
    (0, 0), (1, 1), (160, 1), (161, 1), (320, 1), (321, 2), (480, 2), (640, 2), (641, 3),
    (16_000, 50), (16_001, 51), (479_680, 1499), (479_681, 1500), (480_000, 1500), (10**9, 1500)])
def test_encoder_frames(n_samples, frames):
    assert encoder_frames(n_samples, AudioConfig()) == frames


PAIRS = [(rate, 16_000) for rate in (8000, 11_025, 16_000, 22_050, 44_100, 48_000, 192_000)]
PAIRS += [(16_000, 44_100), (1103, 400)]


@pytest.mark.parametrize("rate_in, rate_out", PAIRS)
def test_a_resampled_sine_is_the_sine(rate_in, rate_out):
    """Not attenuated, not distorted, not shifted."""
    nyquist = min(rate_in, rate_out) / 2
    for fraction in (0.01, 0.3, 0.7, 0.9):
        x = sine(fraction * nyquist, rate_in)
        y, expected = resample(x, rate_in, rate_out), sine(fraction * nyquist, rate_out)
        assert y.dtype == np.float32 and len(y) == math.ceil(len(x) * rate_out / rate_in)
        # away from the ends, where the sine begins and stops
        middle = slice(len(y) // 10, -len(y) // 10)
        error = np.abs(y - expected)[middle].max() / 0.5
        assert error < 1e-3, f"at {fraction} of Nyquist"  # 0.1 dB would be 0.0116
    for n_samples in (0, 1, 2, 13):
        y = resample(np.ones(n_samples), rate_in, rate_out)
        assert len(y) == math.ceil(n_samples * rate_out / rate_in) and np.isfinite(y).all()


@pytest.mark.parametrize("rate_in, rate_out", [pair for pair in PAIRS if pair[0] > pair[1]])
def test_what_is_above_the_new_nyquist_does_not_alias(rate_in, rate_out):
    for hz in np.linspace(rate_out / 2, rate_in / 2, 12):
        y = resample(np.cos(2 * np.pi * hz * np.arange(rate_in // 2) / rate_in), rate_in, rate_out)
        # -80 dB, give or take
        assert np.abs(y[len(y) // 4 : -len(y) // 4]).max() < 10 ** (-79 / 20)


def test_rates_without_a_common_divisor_are_right_and_need_little_memory():
    x = sine(44, 1103, seconds=10).astype(np.float32)
    y, peak = peak_memory(resample, x, 1103, 400)
    np.testing.assert_allclose(y[500:-500], sine(44, 400, seconds=10)[500:-500], atol=1e-3)
    assert peak < 5 * x.nbytes  # a table of all filters would take 10 times as much


@pytest.mark.parametrize("suffix, subtype, rate, atol", [
    ("wav", "PCM_U8", 16_000, 1e-2),
    ("wav", "PCM_16", 16_000, 1e-4),
    ("wav", "PCM_24", 16_000, 1e-6),
    ("wav", "FLOAT", 16_000, 0),
    ("wav", "DOUBLE", 16_000, 0),
    ("wav", "ULAW", 16_000, 3e-2),
    ("flac", "PCM_16", 16_000, 1e-4),
    ("flac", "PCM_24", 16_000, 1e-6),
    ("ogg", "VORBIS", 16_000, 5e-2),
    ("mp3", "MPEG_LAYER_III", 16_000, 5e-2),
    ("wav", "FLOAT", 8000, 1e-3),
    ("wav", "FLOAT", 22_050, 1e-3),
    ("wav", "FLOAT", 44_100, 1e-3),
    ("wav", "FLOAT", 192_000, 1e-3)])
def test_any_format_and_rate_becomes_float32_at_16_khz(tmp_path, suffix, subtype, rate, atol):
    if suffix.upper() not in soundfile.available_formats():
        pytest.skip(f"this libsndfile has no {suffix}")
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, sine(440, rate).astype(np.float32), rate, subtype=subtype)
    y = load_audio(path)
    assert y.dtype == np.float32 and y.shape == (16_000,)
    np.testing.assert_allclose(y[800:-800], sine(440).astype(np.float32)[800:-800], atol=atol)
    assert duration(str(path)) == 1.0


def test_channels_are_averaged(tmp_path):
    x = noise(1000 * 8).reshape(1000, 8)
    soundfile.write(tmp_path / "clip.wav", x, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "clip.wav"), x.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("rate, n_samples",
                         [(16_000, 1), (192_000, 1), (8000, 1), (44_100, 200), (16_000, 48)])
def test_tiny_clips(tmp_path, rate, n_samples):
    soundfile.write(tmp_path / "clip.wav", noise(n_samples), rate)
    y = load_audio(tmp_path / "clip.wav")
    assert len(y) == math.ceil(n_samples * 16_000 / rate)
    assert log_mel(y, SHORT).isfinite().all()
    soundfile.write(tmp_path / "clip.wav", np.zeros(n_samples), rate)
    assert not load_audio(tmp_path / "clip.wav").any()


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_max_seconds_is_the_start_of_the_whole(tmp_path, rate):
    soundfile.write(tmp_path / "clip.wav", noise(3 * rate), rate)
    whole = load_audio(tmp_path / "clip.wav")
    start = load_audio(tmp_path / "clip.wav", max_seconds=1.07)
    assert len(start) == 17_120
    np.testing.assert_allclose(start, whole[:17_120], atol=1e-6)
    np.testing.assert_array_equal(load_audio(tmp_path / "clip.wav", max_seconds=100), whole)


def test_max_seconds_makes_a_long_file_cheap(tmp_path):
    # a file of 21 minutes
    soundfile.write(tmp_path / "long.wav", np.zeros(20_000_000, dtype=np.int16), 16_000)
    y, peak = peak_memory(load_audio, tmp_path / "long.wav", max_seconds=4)
    assert len(y) == 64_000 and peak < 4e6


def wav(rate=16_000, channels=1, n_bytes=None, data=bytes(3200), behind=b"", riff=None):
    """A 16-bit wav file with whatever header one likes."""
    frame = 2 * channels
    n_bytes = len(data) if n_bytes is None else n_bytes
    riff = min(36 + n_bytes + len(behind), 2**32 - 1) if riff is None else riff
    return struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", riff, b"WAVEfmt ", 16, 1, channels, rate,
                       min(rate * frame, 2**32 - 1), frame, 16, b"data", n_bytes) + data + behind


def flac(n_claimed=None):
    """A second of noise, whose header may claim another number of samples."""
    file = io.BytesIO()
    soundfile.write(file, noise(16_000), 16_000, format="FLAC")
    content = bytearray(file.getvalue())
    if n_claimed is not None:
        # rate, channels, bits, and the count in the lowest 36 bits
        fields = int.from_bytes(content[18:26], "big")
        content[18:26] = (fields >> 36 << 36 | n_claimed).to_bytes(8, "big")
    return bytes(content)


BAD_FILES = {  # name: (content, a word of the message)
    "empty.wav": (b"", "0 bytes"), "no_samples.wav": (wav(data=b""), "no samples"),
    "no_samples_but_a_title.wav": (wav(data=b"", behind=b"LIST\x04\0\0\0INFO"), "no samples"),
    "header_cut_at_20_bytes.wav": (wav()[:20], "damaged header"),
    "header_cut_at_40_bytes.wav": (wav()[:40], "damaged header"),
    "header_cut.flac": (flac()[:30], "damaged header"),
    "data_cut.flac": (flac()[:9000], "damaged after"),
    "text.wav": (b"this is not audio\n" * 100, "another format"),
    "random.mp3": (np.random.default_rng(0).bytes(5000), "another format"),
    "headerless.raw": (bytes(3200), "another format"),
    "rate_0.wav": (wav(rate=0), "damaged header"), "rate_1.wav": (wav(rate=1), "got 1 Hz"),
    "rate_2e9.wav": (wav(rate=2**31 - 1), "got 2147483647 Hz"),
    "channels_0.wav": (wav(channels=0), "damaged header"),
    "channels_1000.wav": (wav(channels=1000), "1000 channels;"),
    "claims_2e31.flac": (flac(n_claimed=2**31), "damaged after"),
}


def message_of(function, path):
    """The one line that a user reads, checked for its form."""
    with pytest.raises(UserError) as caught:
        function(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected ") and "got " in message and "; " in message
    assert "\n" not in message
    return message


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
def test_a_name_that_is_not_utf_8_is_read(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    soundfile.write(os.fsencode(path), sine(440), 16_000)
    assert duration(path) == 1 and len(load_audio(path)) == 16_000


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    content, word = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    assert word in message_of(load_audio, tmp_path / name)
    if word != "damaged after":  # all the others can be told from the header
        assert word in message_of(duration, tmp_path / name)


FOREIGN = {  # how files begin that ffmpeg reads and libsndfile does not
    "m4a": b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom\0\0\0\0\0\0\0\x08mdat",
    "mp4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom\0\0\0\x08mdat",
    "aac": b"\xff\xf1\x50\x80\x02\x1f\xfc",
    "wma": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), "amr": b"#!AMR\n",
    "webm": b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\x82\x84webm"}


@pytest.mark.parametrize("ending", FOREIGN)
def test_what_ffmpeg_alone_reads_is_told_with_the_command_that_converts_it(tmp_path, ending):
    def command(name):
        path = tmp_path / name
        path.write_bytes(FOREIGN[ending] + np.random.default_rng(0).bytes(50_000))
        assert message_of(load_audio, path) == message_of(duration, path)
        return shlex.split(re.search(r"convert it \((.*)\)$", message_of(duration, path))[1])

    def to(source, target):
        return ["ffmpeg", "-i", str(tmp_path / source), *"-ar 16000 -ac 1".split(),
                str(tmp_path / target)]

    assert command(f"my order.{ending}") == to(f"my order.{ending}", "my order.wav")
    (tmp_path / "there.wav").touch()  # is not written over
    assert command(f"there.{ending}") == to(f"there.{ending}", "there.16khz.wav")
    assert command("renamed.wav") == to("renamed.wav", "renamed.16khz.wav")


@pytest.mark.parametrize("main, flags", [
    (sample.main, ["order.m4a"]),
    (evaluate.main, ["--benchmark", "asr", "--file", "stage1.json", "--out", "out.jsonl"]),
    (train.main, ["--stage", "1", "--data", "stage1.json", "--out", "out"])],
    ids=["sample", "evaluate", "train"])
def test_each_command_tells_it(main, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "order.m4a").write_bytes(FOREIGN["m4a"])
    rows = [{"audio_filepath": "order.m4a", "transcription": "a small latte"}]
    (tmp_path / "stage1.json").write_text(json.dumps(rows))
    assert run_script(main, flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "convert it (ffmpeg -i order.m4a -ar 16000 -ac 1 order.wav)" in error
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".jsonl", ".safetensors")]


# -------------------------------------------------------------------------- sound that is not whole


def encoded(samples, rate=16_000, **form):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **form)
    return file.getvalue()


def told(path, **options):
    """The samples of a file, and what was told about it."""
    notes = []
    return load_audio(path, note=notes.append, **options), notes


FORMS = {  # those of which libsndfile reads what there is; noise takes the same space everywhere
    "wav": dict(format="WAV"), "float": dict(format="WAV", subtype="FLOAT"),
    "adpcm": dict(format="WAV", subtype="IMA_ADPCM"), "aiff": dict(format="AIFF"),
    "gsm": dict(format="WAV", subtype="GSM610"), "nist": dict(format="NIST"),
    "au": dict(format="AU"), "w64": dict(format="W64"), "rf64": dict(format="RF64"),
    "voc": dict(format="VOC"), "vorbis": dict(format="OGG", subtype="VORBIS"),
    "opus": dict(format="OGG", subtype="OPUS"), "mp3": dict(format="MP3")}
STREAMS = ("voc", "vorbis", "opus")  # what is left of them does not tell how long they were


@pytest.fixture(scope="module")
def bodies():
    """Four seconds in each of the FORMS that this libsndfile has."""
    x = noise(64_000)
    forms = FORMS | {"flac": dict(format="FLAC")}
    return {name: encoded(x, **form) for name, form in forms.items()
            if form["format"] in soundfile.available_formats()}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_that_was_cut_off_is_refused_or_noted_with_the_true_seconds(tmp_path, bodies, name):
    if name not in bodies:
        pytest.skip(f"this libsndfile has no {name}")
    path, body = tmp_path / "clip", bodies[name]
    path.write_bytes(body)
    whole, notes = told(path)
    assert not notes and np.array_equal(load_audio(path), whole)
    for part in (0.5, 0.75, 0.97):
        path.write_bytes(body[:int(part * len(body))])
        y, (line,) = told(path)
        assert line.endswith(f", got {len(y) / 16_000:.2f} s, cut off or damaged")
        assert len(y) / 64_000 == pytest.approx(part, abs=0.3 if name in STREAMS else 0.05)
        if name in STREAMS:
            assert line.startswith(f"{path}: expected a stream that has its end, got")
        else:
            (seconds,) = re.findall(r"expected (\d\.\d\d) s, got", line)
            assert float(seconds) == pytest.approx(4, abs=0.01)
        assert line in message_of(load_audio, path)  # without a note it is refused


@pytest.mark.parametrize("name", ["vorbis", "opus", "mp3"])
def test_a_damaged_middle_is_refused_or_noted(tmp_path, bodies, name):
    if name not in bodies:
        pytest.skip(f"this libsndfile has no {name}")
    path, body = tmp_path / "clip", bytearray(bodies[name])
    middle = len(body) // 2
    body[middle:middle + len(body) // 20] = bytes(len(body) // 20)
    path.write_bytes(body)
    y, (line,) = told(path)
    assert f"expected 4.00 s, got {len(y) / 16_000:.2f} s" in line and 1 < len(y) / 16_000 < 3.95
    assert line in message_of(load_audio, path)


def test_a_damaged_flac_is_refused_with_the_seconds_that_are_intact(tmp_path, bodies):
    """Its frames have 4,096 samples, so that what is intact is a multiple of 0.256 s."""
    path, body = tmp_path / "clip.flac", bodies["flac"]
    for part in (0.3, 0.75):
        path.write_bytes(body[:int(part * len(body))])
        cut = message_of(load_audio, path)
        damaged = bytearray(body)
        damaged[int(part * len(body))] ^= 1
        path.write_bytes(damaged)
        assert cut == message_of(load_audio, path)  # all before that is the same
        (seconds,) = re.findall(r"damaged after ([\d.]+) s", cut)
        assert part * 4 - 0.4 < float(seconds) < part * 4 + 0.1  # that of the last whole frame
        assert told(path, max_seconds=float(seconds) - 0.1)[1] == []  # that part is whole


def test_only_the_part_that_is_used_is_compared(tmp_path, bodies):
    for name, body in bodies.items():
        (tmp_path / name).write_bytes(body[:len(body) * 3 // 4])
        assert told(tmp_path / name, max_seconds=1)[1] == [], name
        if name != "flac":
            assert len(told(tmp_path / name, max_seconds=3.5)[1]) == 1, name


@pytest.mark.parametrize("form", ["wav", "adpcm", "flac", "vorbis", "opus", "mp3"])
def test_a_whole_file_is_never_told_to_be_less(tmp_path, bodies, form):
    """Whatever it is padded to: blocks of ADPCM, granules of Ogg, the encoder's delay in mp3."""
    if form not in bodies:
        pytest.skip(f"this libsndfile has no {form}")
    options = FORMS.get(form, dict(format="FLAC"))
    for rate in (8000, 16_000, 48_000):
        for n_samples in (1, 1000, 1152, 1153, 20_001):
            x = noise(2 * n_samples).reshape(-1, 2)
            (tmp_path / "clip").write_bytes(encoded(x, rate, **options))
            assert told(tmp_path / "clip")[1] == [], (rate, n_samples)


def test_what_precedes_or_follows_the_sound_is_no_part_of_the_promise(tmp_path, bodies):
    path, title = tmp_path / "clip.wav", b"LIST\x04\0\0\0INFO"
    path.write_bytes(wav(behind=title, data=bytes(3200)))
    assert told(path)[1] == []
    path.write_bytes(wav(behind=title)[:-6])  # cut within the title
    assert told(path)[1] == [] and len(load_audio(path)) == 1600
    odd = bytearray(wav())
    odd[28:32] = bytes(4)  # bytes a second, which libsndfile corrects too
    path.write_bytes(odd)
    assert told(path)[1] == [] and "should be" in soundfile.SoundFile(path).extra_info


@pytest.mark.skipif("MP3" not in soundfile.available_formats(), reason="this libsndfile has no mp3")
def test_an_mp3_promises_no_more_than_its_first_frame_tells(tmp_path, bodies):
    path, body = tmp_path / "clip.mp3", bodies["mp3"]
    at = body.find(b"Xing") if b"Xing" in body else body.find(b"Info")
    size = bytes([0, 200_000 >> 14, 200_000 >> 7 & 127, 200_000 & 127])  # 7 bits in each
    picture = b"ID3\3\0\0" + size + bytes(200_000)
    path.write_bytes(picture + body)
    assert told(path)[1] == []
    path.write_bytes(picture + body[:len(body) // 2])
    assert "expected 4.00 s" in told(path)[1][0]
    one_more = bytearray(body)  # an encoder that counts the first frame too, and tells no delay
    one_more[at + 8:at + 12] = (int.from_bytes(body[at + 8:at + 12], "big") + 1).to_bytes(4, "big")
    one_more[at + 120:at + 156] = bytes(36)
    path.write_bytes(one_more)
    assert told(path)[1] == []
    untold = picture + body.replace(body[at:at + 4], b"\0\0\0\0")
    path.write_bytes(untold)  # then libsndfile takes the picture for sound
    assert soundfile.info(path).frames > 2 * 64_000 and told(path)[1] == []


@pytest.mark.parametrize("n_bytes, riff", [
    (0, 0), (0, 36), (0, 2**32 - 1), (2**32 - 1, 2**32 - 1), (2**31 - 1, 2**31 + 35),
    (2**31, 2**31 + 36), (0x7F000000, 0x7F000024)])
def test_a_wav_whose_recorder_could_not_write_its_length_is_read(tmp_path, n_bytes, riff):
    path, data = tmp_path / "clip.wav", (3000 * sine(440)).astype("<i2").tobytes()
    path.write_bytes(wav(n_bytes=n_bytes, riff=riff, data=data))
    y, notes = told(path)
    assert duration(path) == 1 and notes == []
    np.testing.assert_allclose(y, 3000 / 2**15 * sine(440), atol=1e-4)
    path.write_bytes(wav(n_bytes=n_bytes, riff=riff, data=data * 300))
    y, peak = peak_memory(load_audio, path, max_seconds=1)  # 5 minutes, of which a second is read
    assert len(y) == 16_000 and peak < 1e6


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_not_sound(tmp_path, value):
    x = noise(1000)
    x[500] = value
    soundfile.write(tmp_path / "clip.wav", x, 16_000, subtype="FLOAT")
    assert f"got {np.float32(abs(value))};" in message_of(load_audio, tmp_path / "clip.wav")


@pytest.mark.parametrize("function", [load_audio, duration])
def test_paths_without_a_file_to_read(tmp_path, monkeypatch, function):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    for path in (tmp_path / "missing.wav", tmp_path, "/dev/null"):
        assert "no such file" in message_of(function, path)
    (tmp_path / "clip.wav").write_bytes(wav())
    monkeypatch.setattr(audio, "require_contents", refuse)  # chmod would not stop root
    assert "Permission denied" in message_of(function, tmp_path / "clip.wav")


def test_long_files_and_headers_that_claim_too_much_or_nothing_take_no_more_memory(
        tmp_path, monkeypatch):
    for n_bytes in (2**31, 2**32 - 2):  # what a recorder leaves behind that was switched off
        (tmp_path / "clip.wav").write_bytes(wav(n_bytes=n_bytes))
        y, peak = peak_memory(load_audio, tmp_path / "clip.wav")
        assert len(y) == 1600 and peak < 1e6
    (tmp_path / "clip.flac").write_bytes(flac(n_claimed=2**31))
    assert peak_memory(message_of, load_audio, tmp_path / "clip.flac")[1] < 3 * 4 * audio.BLOCK
    (tmp_path / "clip.flac").write_bytes(flac(n_claimed=0))  # a stream, which can be read
    assert "tells the length" in message_of(duration, tmp_path / "clip.flac")
    assert len(load_audio(tmp_path / "clip.flac", max_seconds=0.5)) == 8000
    monkeypatch.setattr(audio, "MAX_SAMPLES", 1000)
    assert "shorter files" in message_of(load_audio, tmp_path / "clip.wav")
    assert len(load_audio(tmp_path / "clip.wav", max_seconds=0.02)) == 320


@pytest.mark.slow
def test_a_small_file_that_unpacks_to_hours_is_refused(tmp_path):
    path, silence = tmp_path / "bomb.flac", np.zeros(2**22, np.int16)
    with soundfile.SoundFile(path, "w", 16_000, 1, format="FLAC") as file:
        for _ in range(audio.MAX_SAMPLES // len(silence) + 1):
            file.write(silence)
    assert path.stat().st_size < 2**20
    message, peak = peak_memory(message_of, load_audio, path)
    assert "expected at most 2.3 hours" in message and peak < 4 * audio.MAX_SAMPLES + 2**26
