"""From a sound file to the encoder's input: loading, resampling, log-mel spectrogram.

The front end is Whisper's (arXiv 2212.04356, section 2.2), which DIFFA-2 keeps unchanged (arXiv
2601.23161, section 3.2): every 10 ms, a window of 25 ms gives the power in each of 128 mel bands,
and its logarithm is scaled to about -1 ... 1.

What differs: nothing in the numbers of `log_mel`. Whisper reads its filterbank from a file and uses
ffmpeg; here the filterbank is computed, libsndfile decodes, and the resampler is our own.
"""

import math
import mmap
import os
import re
import shlex
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from .config import AudioConfig
from .errors import UserError, require, require_contents

# Limits for what a header may claim, beyond which it is damaged or not a recording.
MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
MAX_CHANNELS = 64
MAX_SAMPLES = 2**27  # samples per channel, half a GiB of float32: 2.3 hours at 16 kHz
MAX_PEAK = 1e6  # full scale is 1; float files may exceed it, but not that much
BLOCK = 2**20  # samples decoded at a time, all channels together: 4 MiB

# For the check that a file holds what its header promises.
MP3_FRAME = 1152  # samples that an mp3 may lack: some encoders count the header, itself a frame
UNKNOWN_SIZE = 0x7F00_0000  # bytes: this (sox) or more stands for an unknown size
UNKNOWN_FRAMES = 2**62  # samples: this or more is libsndfile's sign for an unknown length
TOO_SHORT = re.compile(  # bytes of a chunk in libsndfile's log: "data : 128000 (should be 95989)"
    r"(?:data|SSND|BODY|riff|Riff size|Data Size|Data length)[ :]+(\d+) \(?should be (\d+)")
FRAMES = re.compile(r"\b[Ff]rames +: (\d+)")  # samples, in some of these logs
ENDLESS = re.compile("lacks an end-of-stream bit|Junk after the last page|reports a hole|truncated")

# The resampler's low-pass filter; frequencies relative to the lower of the two Nyquist frequencies.
CUTOFF = 0.95  # the middle of the transition, which runs from 0.9 (passes) to 1 (blocked)
KAISER_BETA = 7.86  # -80 dB in the stop band: 0.1102 (80 - 8.7), Kaiser's formula
HALF_WIDTH = 51  # samples at the lower rate, each side: (80 - 8) / (2.285 pi 0.1) / 2, Kaiser too


def _open(path: Path) -> soundfile.SoundFile:
    """Open a sound file and check its header."""
    wanted = f"{path}: expected an audio file"
    try:
        require_contents(path, "an audio file")
        require(path.stat().st_size > 0, f"{wanted}, got 0 bytes; copy or download it again")
        sound = soundfile.SoundFile(os.fsencode(path))
        if sound.format == "WAV" and sound.frames == 0:
            sound = soundfile.SoundFile(_with_size(path))
    except OSError as error:
        raise UserError(f"{wanted}, got '{error.strerror}'; check its permissions") from error
    except (soundfile.SoundFileError, TypeError, ValueError) as error:  # TypeError: a .raw file
        raise UserError(f"{wanted} (wav, flac, ogg, mp3), got another format or a damaged header; "
                        f"convert it ({_conversion(path)})") from error
    require(MIN_RATE <= sound.samplerate <= MAX_RATE and sound.channels <= MAX_CHANNELS,
            f"{path}: expected {MIN_RATE} to {MAX_RATE} Hz and at most {MAX_CHANNELS} channels, "
            f"got {sound.samplerate} Hz and {sound.channels} channels; export it again")
    require(sound.frames > 0, f"{wanted}, got a header and no samples; record it again")
    return sound


def _conversion(path: Path) -> str:
    """The command that makes a wav file, a new one, of what libsndfile cannot read, as an m4a."""
    wav = path.with_suffix(".wav")
    wav = path.with_suffix(".16khz.wav") if wav.exists() else wav
    return shlex.join(["ffmpeg", "-i", str(path), "-ar", "16000", "-ac", "1", str(wav)])


def _with_size(path: Path) -> mmap.mmap:
    """The bytes of a wav file whose header says that no samples follow. If its recorder was killed
    before it wrote the sizes, they now say that samples follow to the end."""
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # the file is not changed
    at, riff = content.find(b"data\0\0\0\0", 0, 4096), int.from_bytes(content[4:8], "little")
    if at > 0 and (riff <= at or riff >= UNKNOWN_SIZE):  # else other data follows, no samples
        n_bytes = (len(content) - at - 8) // 2 * 2  # libsndfile rounds an odd one up
        content[at + 4:at + 8] = min(n_bytes, 2**32 - 2).to_bytes(4, "little")
    return content


def duration(path: str | Path) -> float:
    """Length of a sound file in seconds, as its header claims. Raises UserError."""
    with _open(Path(path)) as sound:
        require(sound.frames < UNKNOWN_FRAMES,
                f"{path}: expected a header that tells the length, got none; convert it to wav")
        return sound.frames / sound.samplerate


def load_audio(path: str | Path, sample_rate: int = 16_000, max_seconds: float | None = None,
               note: Callable[[str], None] | None = None) -> np.ndarray:
    """Load a sound file of any format, rate and number of channels that libsndfile reads.

    Args:
        sample_rate: of the result, in Hz.
        max_seconds: the rest is not read, so that a long file costs no more than a short one.
        note: is called with a line if the file holds less than its header promises; what could be
            read is returned. Without it, such a file is refused.

    Returns float32 [samples]: the mean of the channels, full scale at -1 ... 1.
    Raises UserError if there is no sound in the file or the decoder meets damage.
    """
    wanted = MAX_SAMPLES + 1
    with _open(Path(path)) as sound:
        rate, promised = sound.samplerate, _promised(sound, path)
        if max_seconds is not None:
            behind = math.ceil(HALF_WIDTH * max(1, rate / sample_rate))  # what resampling needs
            wanted = min(wanted, math.ceil(max_seconds * rate) + behind + 1)
        mono = _decode(sound, min(wanted, sound.frames), path)
        slack = MP3_FRAME if sound.format == "MP3" else 0.01 * rate  # one hop of the log-mel
    if len(mono) + slack < min(wanted, promised):
        whole = f"{promised / rate:.2f} s" if promised < math.inf else "a stream that has its end"
        line = f"{path}: expected {whole}, got {len(mono) / rate:.2f} s, cut off or damaged"
        require(note is not None, f"{line}; copy it again")
        note(line)
    peak = np.abs(mono).max()  # NaN if any sample is
    require(peak < MAX_PEAK, f"{path}: expected samples from -1 to 1, got {peak}; export it again")
    n_samples = None if max_seconds is None else round(max_seconds * sample_rate)
    return resample(mono, rate, sample_rate)[:n_samples]


def _decode(sound: soundfile.SoundFile, wanted: int, path: str | Path) -> np.ndarray:
    """Up to `wanted` samples, the mean of the channels, float32 [samples]."""
    rate, n_read, blocks = sound.samplerate, 0, []
    while n_read < wanted:  # in blocks: a header may claim more than memory holds
        n = min(BLOCK // sound.channels, wanted - n_read)
        try:
            block = sound.read(n, "float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise UserError(f"{path}: expected intact audio, got data that is cut off or damaged "
                            f"after {sound.tell() / rate:.1f} s; copy it again") from error
        if len(block) == 0:
            break
        blocks.append(block.mean(axis=1))  # [samples, channels] -> [samples]
        n_read += len(block)
    require(n_read > 0, f"{path}: expected sound, got a header and no samples; record it again")
    require(n_read <= MAX_SAMPLES,  # before the blocks become one, which doubles their memory
            f"{path}: expected at most {MAX_SAMPLES / rate / 3600:.1f} hours at {rate} Hz, got "
            "more; cut it into shorter files")
    return np.concatenate(blocks)


def _promised(sound: soundfile.SoundFile, path: str | Path) -> float:
    """How many samples the header promises: infinity if only a missing end is known, 0 if there is
    no promise. libsndfile lowers `sound.frames` if a file is too short, and tells it in its log."""
    log, n_frames = sound.extra_info, sound.frames
    with open(path, "rb") as file:
        start = file.read(10)
        if start.startswith(b"ID3"):  # titles and pictures, their size in 4 bytes of 7 bits
            file.seek(start[6] << 21 | start[7] << 14 | start[8] << 7 | start[9], 1)
        start += file.read(4096)
    if sound.format == "MP3" and not re.search(b"Xing|Info|VBRI", start):
        return 0  # no frame tells how many follow: libsndfile has guessed from the file's size
    if sound.format == "NIST":
        return max(map(int, re.findall(rb"sample_count -i (\d+)", start)), default=0)
    if sizes := TOO_SHORT.findall(log):
        promised, there = map(int, sizes[-1])  # bytes
        counts = [n for n in map(int, FRAMES.findall(log)) if n > n_frames]
        by_size = n_frames * promised / max(1, there)
        return 0 if promised >= UNKNOWN_SIZE else max(counts, default=by_size)
    if ENDLESS.search(log):
        return math.inf
    return n_frames if n_frames < UNKNOWN_FRAMES else 0


def resample(x: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Change the sample rate of x [samples]. Returns float32 [ceil(samples * rate_out / rate_in)].

    Each output sample is a sum of the inputs around it, weighted by a low-pass filter. Output n
    lies at input position n * down / up, whose fraction, the *phase*, decides the weights. The
    outputs of one of the `up` phases lie `down` inputs apart: they are one matrix-vector product.
    """
    x = np.asarray(x, dtype=np.float32)
    if rate_in == rate_out:
        return x
    common = math.gcd(rate_in, rate_out)
    up, down = rate_out // common, rate_in // common
    half = math.ceil(HALF_WIDTH * max(1, rate_in / rate_out))  # inputs with a weight, each side
    padded = np.pad(x, half)  # input i is padded[i + half]
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half)  # row i begins at i - half
    y = np.empty(math.ceil(len(x) * up / down), dtype=np.float32)
    for phase in range(min(up, len(y))):
        whole, fraction = divmod(phase * down, up)  # position of output `phase`, in input samples
        weights = _low_pass(np.arange(1 - half, half + 1) - fraction / up, rate_in, rate_out)
        rows = windows[whole + 1 :: down]  # the first begins at input whole + 1 - half
        y[phase::up] = rows[: len(y[phase::up])] @ weights
    return y


def _low_pass(t: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """A sinc times a Kaiser window: the weights, float32 of t's shape, of the inputs at distances t
    (in input samples) from the output sample; their sum is 1."""
    lower = min(1, rate_out / rate_in)  # the lower rate, in units of the input rate
    sinc = np.sinc(CUTOFF * lower * t)
    inside = np.clip(1 - (lower * t / HALF_WIDTH) ** 2, 0, None)
    weights = sinc * np.i0(KAISER_BETA * np.sqrt(inside)) * (inside > 0)
    return (weights / weights.sum()).astype(np.float32)


@lru_cache
def mel_filterbank(config: AudioConfig) -> torch.Tensor:
    """Triangles that sum the power spectrum into mel bands, float32 [n_mels, n_fft // 2 + 1].

    Each rises from the centre of the band below to its own, falls to the centre of the band above,
    and has an area of 1 over Hz. The mel scale is Slaney's: linear up to 1000 Hz = 15 mel, then
    27 mel per factor of 6.4. The result is cached and shared: do not write to it.
    """
    nyquist = config.sample_rate / 2
    bins = torch.linspace(0, nyquist, config.n_fft // 2 + 1, dtype=torch.float64)  # Hz
    highest = 15 + 27 * math.log(nyquist / 1000) / math.log(6.4)  # mel
    mels = torch.linspace(0, highest, config.n_mels + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))  # in Hz
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]  # [n_mels, 1] each
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (right - left)).float()


def pad_or_cut(x: np.ndarray | torch.Tensor, config: AudioConfig) -> torch.Tensor:
    """A clip [samples] as float32 [max_samples]: padded with silence, or the end cut off."""
    x = torch.as_tensor(x, dtype=torch.float32)
    assert x.ndim == 1, f"expected one clip [samples], got the shape {tuple(x.shape)}"
    x = x[: config.max_samples]
    return F.pad(x, (0, config.max_samples - len(x)))


def log_mel(x: np.ndarray | torch.Tensor, config: AudioConfig) -> torch.Tensor:
    """Whisper's log-mel spectrogram, float32 [n_mels, M], of a clip [samples] at the sample rate of
    `config`, padded or cut to M frames. Frame i is centred on sample i * hop_length."""
    x = pad_or_cut(x, config)
    window = torch.hann_window(config.n_fft, device=x.device)  # periodic
    spectrum = torch.stft(x, config.n_fft, config.hop_length, window=window, center=True,
                          pad_mode="reflect", return_complex=True)  # [n_fft // 2 + 1, M + 1]
    power = spectrum[:, :-1].abs() ** 2  # Whisper drops the last frame, which is centred on the end
    mel = mel_filterbank(config).to(x.device) @ power  # [n_mels, M]
    log = mel.clamp(min=1e-10).log10()
    log = log.maximum(log.max() - 8)  # at most 80 dB below the loudest
    return (log + 4) / 4


def encoder_frames(n_samples: int, config: AudioConfig) -> int:
    """How many of the T encoder frames (50 a second) hold sound of a clip of n_samples. The
    encoder's second convolution, with stride 2, turns F mel frames into (F - 1) // 2 + 1."""
    mel_frames = min(config.max_frames, math.ceil(n_samples / config.hop_length))
    return (mel_frames - 1) // 2 + 1
