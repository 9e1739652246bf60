"""What a toy clip is, in symbols: a `Scene` goes in, `Segment`s come out. And the helpers that all
sounds share.

Letters in the toy sounds: N samples, T control frames, K frequency bins, S phoneme states, H
harmonics.
"""

from dataclasses import dataclass

import numpy as np

SAMPLE_RATE = 16_000
MAX_SECONDS = 3.9  # longest clip; silences shrink to respect it
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SOUNDS = ("beep", "chirp", "siren", "noise", "clicks", "bell", "buzz", "drum")


@dataclass(frozen=True)
class Scene:
    """What a clip contains, in symbols. Fields that do not belong to `kind` stay empty."""

    kind: str  # "speech", "sound" or "music"
    items: tuple[str, ...] = ()  # speech: 1-4 of DIGITS; sound: 1-3 of SOUNDS; music: none
    voice: str = ""  # speech: "high" or "low"
    speed: str = ""  # speech: "fast" or "slow"; music: its tempo, "fast" or "slow"
    pattern: str = ""  # music: "arpeggio" or "chords"
    mode: str = ""  # music: "major" or "minor"
    instrument: str = ""  # music: "flute" or "organ"
    root: int = 0  # music: pitch class of the tonic, 0 = C ... 11 = B


@dataclass(frozen=True)
class Segment:
    """One thing that sounds, and when."""

    start: float  # seconds
    end: float  # seconds
    label: str  # the digit, the sound event, or the musical pattern
    ordinal: int  # 0, 1, 2, ... in order of time
    pitches: tuple[int, ...] = ()  # music: pitch classes that sound, 0 = C ... 11 = B


def clock(seconds: float) -> np.ndarray:
    """Sample times in seconds, (N,) float32."""
    return np.arange(round(seconds * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE


def fade(sound: np.ndarray, attack: float, release: float) -> np.ndarray:
    """Linear fade-in over `attack` and fade-out over `release`, both in seconds."""
    t = clock(len(sound) / SAMPLE_RATE)
    return sound * np.minimum(1, np.minimum(t / attack, t[::-1] / release))


def harmonics(frequency, amplitudes: tuple[float, ...], t: np.ndarray) -> np.ndarray:
    """Partials 1, 2, ... of a `frequency` in Hz, constant or (N,), with these amplitudes, at `t`
    seconds; (N,)."""
    constant = np.ndim(frequency) == 0
    cycles = frequency * t if constant else np.cumsum(frequency) / SAMPLE_RATE
    phase = 2 * np.pi * cycles
    audible = [(h, a) for h, a in enumerate(amplitudes, start=1)
               if a and h * np.max(frequency) < 0.47 * SAMPLE_RATE]
    number, amplitude = np.array(audible, dtype=np.float32).T  # (H,), (H,)
    return amplitude @ np.sin(number[:, None] * phase.astype(np.float32))  # (H,) @ (H, N)


def shaped_noise(num_samples: int, gain, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise whose amplitude spectrum is `gain(hertz)`, scaled to an RMS of 1; (N,)."""
    size = 1 << max(num_samples - 1, 1).bit_length()  # a power of two: fast transform
    hertz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE).astype(np.float32)
    white = rng.standard_normal((len(hertz), 2), dtype=np.float32).view(np.complex64)[:, 0]  # (K,)
    noise = np.fft.irfft(white * gain(hertz))[:num_samples]
    return noise / np.sqrt(np.mean(noise**2))
