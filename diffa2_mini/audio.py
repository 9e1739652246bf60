"""From a sound file to the encoder's input: loading, resampling, log-mel spectrogram.

The front end is Whisper's (arXiv 2212.04356, section 2.2), which DIFFA-2 keeps unchanged (arXiv
2601.23161, section 3.2): every 10 ms, a window of 25 ms gives the power in each of 128 mel bands,
and its logarithm is scaled to about -1 ... 1.

What differs: nothing in the numbers of `log_mel`. Whisper ships its filterbank as a file, and uses
ffmpeg to decode and resample; here the filterbank is computed, libsndfile decodes, and the
resampler is our own.
"""

import io
import math
import re
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
MAX_FRAMES = 2**27  # samples per channel, half a GiB of float32: 2.3 hours at 16 kHz
MAX_PEAK = 1e6  # full scale is 1; float files may exceed it, but not that much
BLOCK = 2**20  # samples decoded at a time, all channels together: 4 MiB

# For the check that a file holds what its header promises.
HOP = 0.01  # seconds that may be missing: one hop of the log-mel
MP3_FRAME = 1152  # samples that an mp3 may lack: some encoders count the header, itself a frame
UNKNOWN_SIZE = 0x7F00_0000  # bytes: this (sox) or more stands for an unknown size
UNKNOWN_FRAMES = 2**62  # samples: this or more is libsndfile's sign for an unknown length
TOO_SHORT = re.compile(  # bytes of a chunk in libsndfile's log: "data : 128000 (should be 95989)"
    r"(?:data|SSND|BODY|riff|Riff size|Data Size|Data length)[ :]+(\d+) \(?should be (\d+)")
FRAMES = re.compile(r"\bframes +: (\d+)", re.IGNORECASE)  # samples, in some of these logs
ENDLESS = re.compile("lacks an end-of-stream bit|Junk after the last page|reports a hole|truncated")

# The resampler's low-pass filter; frequencies relative to the lower of the two Nyquist frequencies.
CUTOFF = 0.95  # the middle of the transition, which runs from 0.9 (passes) to 1 (blocked)
KAISER_BETA = 7.86  # -80 dB in the stop band: 0.1102 (80 - 8.7), Kaiser's formula
HALF_WIDTH = 51  # samples at the lower rate, each side: (80 - 8) / (2.285 pi 0.1) / 2, Kaiser too
PHASES = 640  # most filters that are computed: 11,025 Hz needs as many, no usual rate needs more


# -------------------------------------------------------------------------------------------- files


def _open(path: str | Path) -> soundfile.SoundFile:
    """Open a sound file and check its header. Raises UserError, one line that starts with the
    path."""
    path, wanted = Path(path), "expected an audio file"
    try:
        require(path.exists(), f"{path}: {wanted}, got nothing: there is no such file; check the "
                               "path")
        require(not path.is_dir(), f"{path}: {wanted}, got a folder; name a file inside it")
        require(path.is_file(), f"{path}: {wanted}, got a device or a pipe; save it to a file "
                                "first")
        with open(path, "rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, got '{error.strerror}'; check its "
                        "permissions") from error
    require(not is_empty, f"{path}: {wanted}, got 0 bytes; copy or download it again")
    require_contents(path, "an audio file")
    sound = _decoder(path, str(path))
    if sound.format == "WAV" and sound.frames == 0:
        sound = _decoder(path, _Unclosed(path))
    require(MIN_RATE <= sound.samplerate <= MAX_RATE,
            f"{path}: expected a sample rate of {MIN_RATE} to {MAX_RATE} Hz, got "
            f"{sound.samplerate}; export it again")
    require(sound.channels <= MAX_CHANNELS, f"{path}: expected at most {MAX_CHANNELS} channels, "
                                            f"got {sound.channels}; mix them down first")
    require(sound.frames > 0,
            f"{path}: expected sound, got a header and no samples that it tells of; record or copy "
            "it again, or, if the file is not small, try 'ffmpeg -i INPUT OUTPUT.wav'")
    return sound


def _decoder(path: Path, file: str | io.FileIO) -> soundfile.SoundFile:
    """libsndfile's decoder of `file`, the name of the file at `path` or a stream of its bytes.
    Raises UserError if there is none."""
    try:
        return soundfile.SoundFile(file)
    except (soundfile.SoundFileError, TypeError, ValueError) as error:  # TypeError: a .raw file
        raise UserError(f"{path}: expected audio (wav, flac, ogg, mp3), got another format, a "
                        "damaged header or a file that was cut off; convert it with "
                        "'ffmpeg -i INPUT OUTPUT.wav'") from error


class _Unclosed(io.FileIO):
    """A wav file whose recorder was killed before it wrote the sizes: its header says that nothing
    follows, yet samples do. Read through this, it says that they go on to the end of the file. Any
    other file is read as it is.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        head = self.read(4096)
        self.seek(0)
        at, size = head.find(b"data\0\0\0\0"), int.from_bytes(head[4:8], "little")
        is_unclosed = size <= at or size >= UNKNOWN_SIZE  # else other data follows, no samples
        self.size_field = range(at + 4, at + 8) if at > 0 and is_unclosed else range(0)

    def readinto(self, buffer) -> int:
        start, n = self.tell(), super().readinto(buffer)
        bytes_read = memoryview(buffer).cast("B")
        for at in self.size_field:
            if start <= at < start + n:
                bytes_read[at - start] = 0xFF
        return n


def duration(path: str | Path) -> float:
    """Length of a sound file in seconds, as its header claims; nothing is decoded. Raises UserError
    as `load_audio` does."""
    with _open(path) as sound:
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
    Raises UserError, one line that starts with the path, if there is no sound in the file or the
    decoder meets damage.
    """
    assert max_seconds is None or max_seconds > 0, f"max_seconds must be positive: {max_seconds}"
    with _open(path) as sound:
        rate, promised, wanted = sound.samplerate, _promised(sound, path), MAX_FRAMES + 1
        slack = MP3_FRAME if sound.format == "MP3" else HOP * rate
        if max_seconds is not None:
            wanted = min(wanted, math.ceil(max_seconds * rate) + _half_width(rate, sample_rate) + 1)
        mono = _decode(sound, min(wanted, sound.frames), path)
    if len(mono) + slack < min(wanted, promised):
        whole = f"{promised / rate:.2f} s" if promised < math.inf else "a stream that has its end"
        line = f"{path}: expected {whole}, got {len(mono) / rate:.2f} s, cut off or damaged"
        require(note is not None, f"{line}; copy it again")
        note(line)
    peak = np.abs(mono).max()  # NaN if any sample is
    require(peak < MAX_PEAK,
            f"{path}: expected samples of about -1 to 1, got {peak}; export the file again")
    n_samples = None if max_seconds is None else round(max_seconds * sample_rate)
    return resample(mono, rate, sample_rate)[:n_samples]


def _decode(sound: soundfile.SoundFile, wanted: int, path: str | Path) -> np.ndarray:
    """Up to `wanted` samples, the mean of the channels, float32 [samples]. Raises UserError if
    there are none or more than MAX_FRAMES, or if the decoder meets damage."""
    blocks, n_read, is_intact = [np.empty(0, np.float32)], 0, True
    while n_read < wanted and is_intact:  # in blocks: a header may claim more than memory holds
        size = min(BLOCK // sound.channels, wanted - n_read)
        samples = np.full((size, sound.channels), np.nan, np.float32)
        try:
            samples = sound.read(out=samples)
        except soundfile.SoundFileError:
            is_intact = False
            samples = samples[: size - np.isnan(samples[:, 0]).sum()]  # those before the damage
        if len(samples) == 0:
            break
        blocks.append(samples.mean(axis=1))  # [samples, channels] -> [samples]
        n_read += len(samples)
    require(is_intact, f"{path}: expected intact audio, got data that is cut off or damaged after "
                       f"{n_read / sound.samplerate:.1f} s; copy it again or convert it to wav")
    require(n_read > 0, f"{path}: expected sound, got a header and no samples; record it again")
    require(n_read <= MAX_FRAMES,  # before the blocks become one, which doubles their memory
            f"{path}: expected at most {MAX_FRAMES / sound.samplerate / 3600:.1f} hours at "
            f"{sound.samplerate} Hz, got more; cut it into shorter files")
    return np.concatenate(blocks)


def _promised(sound: soundfile.SoundFile, path: str | Path) -> float:
    """How many samples the header promises: infinity if the end is missing and nothing tells where
    it would be, 0 if there is no promise.

    `sound.frames` is not enough: libsndfile lowers it if a file is too short; but its log tells.
    Damaged samples show only in formats with checksums, wav is not among them.
    """
    log = sound.extra_info
    if sound.format == "MP3" and not _tells_length(path):
        return 0  # libsndfile has guessed from the size of the file
    if sound.format == "NIST":
        with open(path, "rb") as file:
            count = re.search(rb"sample_count -i (\d+)", file.read(1024))
        return int(count[1]) if count else 0
    if sizes := TOO_SHORT.findall(log):
        promised, there = map(int, sizes[-1])  # bytes
        if promised >= UNKNOWN_SIZE:
            return 0
        frames = max(map(int, FRAMES.findall(log)), default=0)
        return frames if frames > sound.frames else sound.frames * promised / max(1, there)
    if ENDLESS.search(log):
        return math.inf
    return sound.frames if sound.frames < UNKNOWN_FRAMES else 0


def _tells_length(path: str | Path) -> bool:
    """Whether an mp3 begins with a frame without sound, which tells how many frames follow."""
    with open(path, "rb") as file:
        start = file.read(10)
        if start.startswith(b"ID3"):  # titles and pictures, their size in 4 bytes of 7 bits
            file.seek(sum(byte << 7 * i for i, byte in enumerate(reversed(start[6:]))), io.SEEK_CUR)
            start = b""
        return re.search(b"Xing|Info|VBRI", start + file.read(4096)) is not None


# --------------------------------------------------------------------------------------- resampling


def _half_width(rate_in: int, rate_out: int) -> int:
    """How many input samples on each side of an output sample have a weight."""
    return math.ceil(HALF_WIDTH * max(1, rate_in / rate_out))


def resample(x: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Change the sample rate of x [samples]. Returns float32 [ceil(samples * rate_out / rate_in)].

    Each output sample is a weighted sum of the inputs around it. The weights are a low-pass filter,
    a sinc times a Kaiser window. Output n lies at input position n * down / up, whose fraction, the
    *phase*, decides the weights. There are only `up` phases, and the outputs of a phase lie `down`
    inputs apart: all of them are one matrix-vector product.
    """
    x = np.asarray(x, dtype=np.float32)
    if rate_in == rate_out:
        return x
    common = math.gcd(rate_in, rate_out)
    up, down = rate_out // common, rate_in // common
    half = _half_width(rate_in, rate_out)
    padded = np.pad(x, half)  # input i is padded[i + half]
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half)  # row i begins at i - half
    y = np.empty(math.ceil(len(x) * up / down), dtype=np.float32)
    if min(up, len(y)) > PHASES:
        return _between_phases(y, windows, rate_in, rate_out)
    for phase in range(min(up, len(y))):
        whole, fraction = divmod(phase * down, up)  # position of output `phase`, in input samples
        weights = _low_pass(np.arange(1 - half, half + 1) - fraction / up, rate_in, rate_out)
        rows = windows[whole + 1 :: down]  # the first begins at input whole + 1 - half
        y[phase::up] = rows[: len(y[phase::up])] @ weights
    return y


def _between_phases(y: np.ndarray, windows: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Fill y as `resample` does, where almost every output has a phase of its own.

    The filter is computed at PHASES phases only, and an output is interpolated linearly between
    those around its own. The error is small: as a function of the phase, the filtered signal has no
    frequency above Nyquist, so its second derivative is at most pi^2 times its amplitude, and a
    line between points 1 / PHASES apart misses it by at most pi^2 / (8 PHASES^2) = 3e-6 of that.
    The input at each edge of the window may be in only one of the two filters, with a weight of at
    most 1 / (pi HALF_WIDTH i0(KAISER_BETA)) = 1.7e-5. Together that is less than 4e-5 of full
    scale, -88 dB, below the filter's own -80 dB.
    """
    common, half = math.gcd(rate_in, rate_out), windows.shape[1] // 2
    up, down = rate_out // common, rate_in // common
    near, repeats = np.arange(1 - half, half + 1), np.arange(0, len(y), up)
    right = _low_pass(near, rate_in, rate_out)
    for phase in range(PHASES):
        left, right = right, _low_pass(near - (phase + 1) / PHASES, rate_in, rate_out)
        first, last = (-(-edge * up // PHASES) for edge in (phase, phase + 1))
        between = np.arange(first, last)  # fractions, in units of 1 / up
        n = (between * pow(down, -1, up) % up)[:, None] + repeats  # n * down % up is between
        n = n[n < len(y)]
        whole, fraction = np.divmod(n * down, up)
        sums = windows[whole + 1] @ np.stack([left, right], axis=1)  # [outputs, 2]
        way = (fraction * PHASES / up - phase).astype(np.float32)  # from left, 0, to right, 1
        y[n] = sums[:, 0] + way * (sums[:, 1] - sums[:, 0])
    return y


def _low_pass(t: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Weights, float32 as t, of the inputs at distances t (in input samples) from the output
    sample; their sum is 1."""
    lower = min(1, rate_out / rate_in)  # the lower rate, in units of the input rate
    sinc = np.sinc(CUTOFF * lower * t)
    inside = np.clip(1 - (lower * t / HALF_WIDTH) ** 2, 0, None)
    weights = sinc * np.i0(KAISER_BETA * np.sqrt(inside)) * (inside > 0)
    return (weights / weights.sum()).astype(np.float32)


# ------------------------------------------------------------------------------------------ log-mel


def _mel_to_hz(mel: torch.Tensor) -> torch.Tensor:
    """Slaney's mel scale: linear up to 1000 Hz = 15 mel, then 27 mel per factor of 6.4."""
    return torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def _hz_to_mel(hz: float) -> float:
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


@lru_cache
def mel_filterbank(config: AudioConfig) -> torch.Tensor:
    """Triangles that sum the power spectrum into mel bands, float32 [n_mels, n_fft // 2 + 1].

    Each rises from the centre of the band below to its own, and falls to the centre of the band
    above. As Slaney does, each is divided by half of its base, so its area over Hz is 1. The result
    is cached and shared: do not write to it.
    """
    nyquist = config.sample_rate / 2
    bins = torch.linspace(0, nyquist, config.n_fft // 2 + 1, dtype=torch.float64)  # Hz
    mels = torch.linspace(0, _hz_to_mel(nyquist), config.n_mels + 2, dtype=torch.float64)
    edges = _mel_to_hz(mels)  # [n_mels + 2], Hz
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
    """How many of the T encoder frames (50 a second) hold sound of a clip of n_samples; the others
    are padding. The encoder's second convolution has stride 2: F mel frames become
    (F - 1) // 2 + 1."""
    mel_frames = min(config.max_frames, math.ceil(n_samples / config.hop_length))
    return (mel_frames - 1) // 2 + 1
