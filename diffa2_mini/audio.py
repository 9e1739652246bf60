"""From a sound file to what Whisper hears: loading, resampling, and the log-mel spectrogram.

The front end is Whisper's (arXiv 2212.04356, section 2.2), which DIFFA-2 keeps unchanged (arXiv 2601.23161, section
3.2): a window of 25 ms every 10 ms, the power in each of 128 mel bands, its logarithm, squeezed to about -1 ... 1.

What differs: nothing in the numbers of `log_mel`. Whisper ships its filterbank as a file, and lets ffmpeg decode and
resample; here the filterbank is computed, libsndfile decodes, and the resampler is ours.
"""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from .config import AudioConfig, UserError, require, require_contents

# What a header may claim. Outside of these it is damaged, or not a recording of anything.
MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
MAX_CHANNELS = 64
MAX_FRAMES = 2**27  # samples per channel, half a GiB of float32: 2.3 hours at 16 kHz
MAX_PEAK = 1e6  # full scale is 1; float files may exceed it, but this is not sound any more
BLOCK = 2**20  # samples decoded at a time, all channels together: 4 MiB

# The resampler's low-pass filter. Frequencies are relative to the lower of the two Nyquist frequencies.
CUTOFF = 0.95  # the middle of the transition, which runs from 0.9 (flat) to 1 (silenced)
KAISER_BETA = 7.86  # -80 dB in the stop band: 0.1102 (80 - 8.7), Kaiser's formula
HALF_WIDTH = 51  # samples at the lower rate, each side: (80 - 8) / (2.285 pi 0.1) / 2, Kaiser's formula too


# ---------------------------------------------------------------------------------------------------------- files


def _open(path: str | Path) -> soundfile.SoundFile:
    """Open a sound file and check its header. Raises UserError, one line that starts with the path."""
    path = Path(path)
    try:
        require(path.exists(), f"{path}: expected an audio file, got nothing: there is no such file; check the path")
        require(not path.is_dir(), f"{path}: expected an audio file, got a folder; name a file inside it")
        require(path.is_file(), f"{path}: expected an audio file, got a device or a pipe; save it to a file first")
        with open(path, "rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, got '{error.strerror}'; check its permissions") from error
    require(not is_empty, f"{path}: expected an audio file, got 0 bytes; copy or download it again")
    require_contents(path, "an audio file")
    try:
        sound = soundfile.SoundFile(str(path))
    except (soundfile.SoundFileError, TypeError, ValueError) as error:  # TypeError: a .raw file, which has no header
        raise UserError(f"{path}: expected audio (wav, flac, ogg, mp3), got another format or a damaged header; "
                        "convert it with 'ffmpeg -i INPUT OUTPUT.wav'") from error
    require(MIN_RATE <= sound.samplerate <= MAX_RATE,
            f"{path}: expected a sample rate of {MIN_RATE} to {MAX_RATE} Hz, got {sound.samplerate}; export it again")
    require(sound.channels <= MAX_CHANNELS,
            f"{path}: expected at most {MAX_CHANNELS} channels, got {sound.channels}; mix them down first")
    return sound


def duration(path: str | Path) -> float:
    """Length of a sound file in seconds, as its header claims; nothing is decoded. Raises UserError as `load_audio`."""
    with _open(path) as sound:
        require(sound.frames > 0, f"{path}: expected sound, got a header and no samples; record it again")
        require(sound.frames < 2**62,  # libsndfile's way to say that a stream was written without its length
                f"{path}: expected a header that tells the length, got none; convert it to wav")
        return sound.frames / sound.samplerate


def load_audio(path: str | Path, sample_rate: int = 16_000, max_seconds: float | None = None) -> np.ndarray:
    """Load a sound file of any format, rate and number of channels that libsndfile reads.

    Args:
        sample_rate: of the result, in Hz.
        max_seconds: read no further than this, so that a long file costs no more than a short one.

    Returns float32 [samples]: the mean of the channels, full scale at -1 ... 1.
    Raises UserError, one line that starts with the path, if there is no sound to be had from the file.
    """
    assert max_seconds is None or max_seconds > 0, f"expected a positive max_seconds, got {max_seconds}"
    with _open(path) as sound:
        rate, block = sound.samplerate, BLOCK // sound.channels
        wanted = MAX_FRAMES + 1
        if max_seconds is not None:
            wanted = min(wanted, math.ceil(max_seconds * rate) + _half_width(rate, sample_rate) + 1)
        blocks, n_read = [], 0
        try:
            while n_read < wanted:  # in blocks, since a header may claim more than there is, or than memory holds
                samples = sound.read(min(block, wanted - n_read), dtype="float32", always_2d=True)
                if len(samples) == 0:
                    break
                blocks.append(samples.mean(axis=1))  # [samples, channels] -> [samples]
                n_read += len(samples)
        except soundfile.SoundFileError as error:
            raise UserError(f"{path}: expected intact audio, got data that is cut off or damaged after "
                            f"{n_read / rate:.1f} s; copy it again or convert it to wav") from error
    require(n_read > 0, f"{path}: expected sound, got a header and no samples; record it again")
    require(n_read <= MAX_FRAMES, f"{path}: expected at most {MAX_FRAMES / rate / 3600:.1f} hours at {rate} Hz, "
                                  "got more; cut it into shorter files")
    mono = np.concatenate(blocks)
    peak = np.abs(mono).max()  # NaN if any sample is
    require(peak < MAX_PEAK, f"{path}: expected samples of about -1 to 1, got {peak}; export the file again")
    n_samples = None if max_seconds is None else round(max_seconds * sample_rate)
    return resample(mono, rate, sample_rate)[:n_samples]


# ----------------------------------------------------------------------------------------------------- resampling


def _half_width(rate_in: int, rate_out: int) -> int:
    """How many input samples the resampler looks at on each side of an output sample."""
    return math.ceil(HALF_WIDTH * max(1, rate_in / rate_out))


def resample(x: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Change the sample rate of x [samples]. Returns float32 [ceil(samples * rate_out / rate_in)].

    Each output sample is a weighted sum of the inputs around it, the weights being a low-pass filter: a sinc, faded out
    by a Kaiser window. Output n lies at input position n * down / up. The fraction of it, the *phase*, decides the
    weights; there are only `up` phases, and the outputs of one phase lie `down` inputs apart. So we take a phase at a
    time: the weights once, then all its outputs as one matrix-vector product.
    """
    x = np.asarray(x, dtype=np.float32)
    if rate_in == rate_out:
        return x
    common = math.gcd(rate_in, rate_out)
    up, down = rate_out // common, rate_in // common
    n_out = math.ceil(len(x) * up / down)
    half = _half_width(rate_in, rate_out)
    padded = np.pad(x, half)  # input i is padded[i + half]
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half)  # a view; row i: inputs i-half ... i+half-1
    y = np.empty(n_out, dtype=np.float32)
    for phase in range(min(up, n_out)):
        whole, fraction = divmod(phase * down, up)  # position of output `phase`, in input samples
        weights = _low_pass(np.arange(1 - half, half + 1) - fraction / up, rate_in, rate_out)
        rows = windows[whole + 1 :: down]  # + 1: the window around position `whole` begins at input whole + 1 - half
        y[phase::up] = rows[: len(y[phase::up])] @ weights
    return y


def _low_pass(t: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Weights of the inputs at distances t (in input samples) from the output sample; they sum to 1. float32, as t."""
    lower = min(1, rate_out / rate_in)  # the lower rate, in units of the input rate
    sinc = np.sinc(CUTOFF * lower * t)
    inside = np.clip(1 - (lower * t / HALF_WIDTH) ** 2, 0, None)
    weights = sinc * np.i0(KAISER_BETA * np.sqrt(inside)) * (inside > 0)
    return (weights / weights.sum()).astype(np.float32)


# -------------------------------------------------------------------------------------------------------- log-mel


def _mel_to_hz(mel: torch.Tensor) -> torch.Tensor:
    """Slaney's mel scale: linear up to 1000 Hz, which is mel 15, and 27 mels for each factor of 6.4 above."""
    return torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def _hz_to_mel(hz: float) -> float:
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


@lru_cache
def mel_filterbank(config: AudioConfig) -> torch.Tensor:
    """Triangles that sum the power spectrum into mel bands: float32 [n_mels, n_fft // 2 + 1], 0 Hz to Nyquist.

    Each rises from the centre of the band below to its own and falls to the centre of the band above. Slaney divides
    by half of its base, so that each has an area of 1 over frequency in Hz. Cached and shared: do not write to it.
    """
    nyquist = config.sample_rate / 2
    bins = torch.linspace(0, nyquist, config.n_fft // 2 + 1, dtype=torch.float64)  # Hz
    edges = _mel_to_hz(torch.linspace(0, _hz_to_mel(nyquist), config.n_mels + 2, dtype=torch.float64))
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]  # [n_mels, 1] each
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (right - left)).float()


def pad_or_cut(x: np.ndarray | torch.Tensor, config: AudioConfig) -> torch.Tensor:
    """A clip [samples] of any length as float32 [config.max_samples]: silence appended, or the end cut off."""
    x = torch.as_tensor(x, dtype=torch.float32)
    assert x.ndim == 1, f"expected one clip [samples], got the shape {tuple(x.shape)}"
    x = x[: config.max_samples]
    return F.pad(x, (0, config.max_samples - len(x)))


def log_mel(x: np.ndarray | torch.Tensor, config: AudioConfig) -> torch.Tensor:
    """Whisper's log-mel spectrogram of one clip [samples] at config.sample_rate: float32 [n_mels, max_frames].

    The clip is padded or cut to config.max_seconds first. Frame i is centred on sample i * hop_length.
    """
    x = pad_or_cut(x, config)
    window = torch.hann_window(config.n_fft, device=x.device)  # periodic
    spectrum = torch.stft(x, config.n_fft, config.hop_length, window=window, center=True, pad_mode="reflect",
                          return_complex=True)  # [n_fft // 2 + 1, max_frames + 1]
    power = spectrum[:, :-1].abs() ** 2  # Whisper drops the last frame, which is centred on the end
    mel = mel_filterbank(config).to(x.device) @ power  # [n_mels, max_frames]
    log = mel.clamp(min=1e-10).log10()
    log = log.maximum(log.max() - 8)  # at most 80 dB below the loudest
    return (log + 4) / 4


def encoder_frames(n_samples: int, config: AudioConfig) -> int:
    """How many of Whisper's encoder frames (50 a second) hold sound, of a clip of n_samples; the rest is padding.

    The encoder's second convolution has stride 2: F mel frames become (F - 1) // 2 + 1, and none become none.
    """
    mel_frames = min(config.max_frames, math.ceil(n_samples / config.hop_length))
    return (mel_frames - 1) // 2 + 1
