"""Spoken digits, synthesised: a source times a filter, in the manner of Klatt (1980).

The source is glottal pulses, aspiration and frication; the filter is a cascade of two-pole
resonators whose frequencies move between phoneme targets. Klatt runs the resonators sample by
sample, which is slow in Python; here their frequency response is evaluated every 8 ms and
multiplies the short-time spectrum of the source, and overlap-add makes the sound: the same filter,
applied in the frequency domain. Letters as in `toy_scene`.
"""

import numpy as np

from data.toy_scene import SAMPLE_RATE, Scene, fade

HOP = 128  # samples between control frames: 8 ms
WINDOW = np.hanning(2 * HOP + 1)[:-1].astype(np.float32)  # periodic Hann: sums to 1 at this hop
FFT_SIZE = 512  # two windows long, so that resonances ring for another 16 ms
BINS_HZ = np.fft.rfftfreq(FFT_SIZE, 1 / SAMPLE_RATE).astype(np.float32)  # (K,)
# z^-1 on the unit circle, (K,)
DELAY = np.exp(-2j * np.pi * np.arange(FFT_SIZE // 2 + 1) / FFT_SIZE)
DELAY_POWERS = np.stack([DELAY**0, DELAY, DELAY**2]).astype(np.complex64)  # (3, K)

# Phoneme targets: typical of a man's voice, in the manner of Klatt (1980). Vowels: formants F1 F2
# F3 in Hz.
VOWELS = {
    "iy": (280, 2250, 3000),
    "ih": (400, 1950, 2550),
    "eh": (560, 1800, 2500),
    "ey": (480, 1850, 2550),
    "ah": (660, 1200, 2450),
    "aa": (740, 1200, 2500),
    "ax": (500, 1450, 2450),
    "ao": (560, 850, 2450),
    "ow": (520, 1000, 2350),
    "uw": (310, 950, 2250),
    "ux": (330, 1500, 2300),
    "er": (460, 1200, 1650),
}  # fmt: skip
# All states: F1 F2 F3 (Hz), bandwidth factor, gains of voicing, aspiration and frication (1 = the
# voice of a vowel), and centre and width of the frication resonance (Hz).
STATES = {
    **{name: (*formants, 1.0, 1.0, 0.0, 0.0, 5000, 3000) for name, formants in VOWELS.items()},
    "w": (290, 620, 2150, 1.0, 0.70, 0.00, 0.00, 5000, 3000),
    "r": (320, 1100, 1450, 1.0, 0.80, 0.00, 0.00, 5000, 3000),
    "n": (260, 1500, 2500, 2.5, 0.80, 0.00, 0.00, 5000, 3000),
    "v": (230, 1100, 2150, 1.5, 0.45, 0.00, 0.05, 4500, 5000),
    "z": (240, 1450, 2550, 1.5, 0.35, 0.00, 0.25, 5800, 1800),
    "s": (320, 1500, 2550, 1.5, 0.00, 0.00, 0.50, 5800, 1800),
    "f": (340, 1100, 2150, 1.5, 0.00, 0.03, 0.09, 4500, 6000),
    "th": (320, 1300, 2550, 1.5, 0.00, 0.03, 0.09, 6500, 3000),
    "-": (330, 1850, 2600, 1.5, 0.00, 0.00, 0.00, 5000, 3000),  # closure before a stop: silence
    "t": (380, 1750, 2650, 1.5, 0.00, 0.05, 0.45, 4500, 2500),  # its burst
    "k": (320, 2050, 2700, 1.5, 0.00, 0.05, 0.50, 2600, 900),  # its burst
    "hh": (370, 1650, 2450, 2.0, 0.00, 0.25, 0.05, 4500, 2500),  # aspiration after it
}
# Pronunciations: states and their relative durations; a diphthong is two states.
WORDS = {
    "zero": (("z", 9), ("ih", 10), ("r", 8), ("ow", 13), ("uw", 8)),
    "one": (("w", 9), ("ah", 16), ("n", 13)),
    "two": (("t", 2), ("hh", 4), ("ux", 10), ("uw", 18)),
    "three": (("th", 11), ("r", 9), ("iy", 20)),
    "four": (("f", 11), ("ao", 19), ("er", 12)),
    "five": (("f", 10), ("aa", 14), ("ih", 10), ("v", 8)),
    "six": (("s", 11), ("ih", 11), ("-", 6), ("k", 3), ("s", 13)),
    "seven": (("s", 10), ("eh", 11), ("v", 6), ("ax", 7), ("n", 10)),
    "eight": (("ey", 12), ("iy", 11), ("-", 6), ("t", 4), ("hh", 3)),
    "nine": (("n", 10), ("aa", 14), ("ih", 10), ("n", 11)),
}
BANDWIDTHS = (70, 100, 150)  # Hz, of F1 F2 F3
# Hz, F4 and up: same in all phonemes
HIGHER_FORMANTS, HIGHER_BANDWIDTH = (3500, 4500, 5500, 6500, 7500), 250
PITCH = {"low": (85, 130), "high": (185, 260)}  # Hz
# factor on all formants: a shorter tract sounds higher
TRACT = {"low": (0.93, 1.05), "high": (1.10, 1.25)}
WORD_SECONDS = {"fast": (0.24, 0.33), "slow": (0.50, 0.62)}
WORD_GAPS = {"fast": (0.02, 0.08), "slow": (0.08, 0.18)}  # seconds
# Glottal pulses fall by 12 dB per octave above 150 Hz (two equal poles), radiation from the lips
# gives 6 dB back.
GLOTTIS = (1 - DELAY) / (1 - np.exp(-2 * np.pi * 150 / SAMPLE_RATE) * DELAY) ** 2
GLOTTIS = (GLOTTIS / np.abs(GLOTTIS).max()).astype(np.complex64)  # (K,)


def resonator(frequency: np.ndarray, bandwidth: np.ndarray) -> np.ndarray:
    """Response of two-pole resonators with unit gain at 0 Hz: (T,) centres and bandwidths in Hz to
    (T, K) complex."""
    radius = np.exp(-np.pi * bandwidth / SAMPLE_RATE)
    b, c = 2 * radius * np.cos(2 * np.pi * frequency / SAMPLE_RATE), -(radius**2)
    denominator = np.stack([np.ones_like(b), -b, -c], axis=-1).astype(np.complex64)  # (T, 3)
    return (1 - b - c).astype(np.float32)[:, None] / (denominator @ DELAY_POWERS)


def glottal_pulses(f0: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pulse train of unit power at pitch `f0` in Hz, (N,), with 1 % jitter in time and 5 % shimmer
    in size."""
    cycles = np.cumsum(f0) / SAMPLE_RATE
    number = np.arange(1, int(cycles[-1]))
    at = np.interp(number + 0.01 * rng.standard_normal(len(number)), cycles, np.arange(len(f0)))
    size = np.sqrt(SAMPLE_RATE / f0[at.astype(int)]) * (1 + 0.05 * rng.standard_normal(len(at)))
    left, part = at.astype(int), at % 1  # a pulse between two samples is shared by them
    pulses = np.zeros(len(f0) + 1, dtype=np.float32)
    np.add.at(pulses, left, size * (1 - part))
    np.add.at(pulses, left + 1, size * part)
    return pulses[:-1]


def frames(signal: np.ndarray) -> np.ndarray:
    """Short-time spectra of a signal of (T + 1) * HOP samples: (T, K) complex."""
    windows = np.lib.stride_tricks.sliding_window_view(signal, 2 * HOP)[::HOP]  # (T, 2 * HOP)
    return np.fft.rfft(windows * WINDOW, FFT_SIZE)


def overlap_add(spectra: np.ndarray) -> np.ndarray:
    """Inverse of `frames`, with 256 more samples for what still rings: (T, K) to (T + 3) * HOP
    samples."""
    shape = len(spectra), FFT_SIZE // HOP, HOP  # (T, 4, HOP)
    blocks = np.fft.irfft(spectra, FFT_SIZE).reshape(shape)
    total = np.zeros((len(spectra) + 3, HOP), dtype=np.float32)
    for i in range(FFT_SIZE // HOP):
        total[i : i + len(spectra)] += blocks[:, i]
    return total.ravel()


def contours(word: str, seconds: float, tract: float, rng: np.random.Generator
             ) -> tuple[np.ndarray, np.ndarray]:
    """What the states of a word ask for at each control frame: formants F1 F2 F3 in Hz and the
    bandwidth factor, (4, T); gains of voicing, aspiration and frication, and centre and width of
    the frication resonance in Hz, (5, T)."""
    names, lengths = zip(*WORDS[word])
    targets = np.array([STATES[name] for name in names])  # (S, 9)
    targets[:, :3] *= tract * np.exp(0.02 * rng.standard_normal((len(names), 3)))
    targets[:, 4:7] *= np.exp(0.15 * rng.standard_normal((len(names), 3)))
    lengths = np.array(lengths) * np.exp(0.08 * rng.standard_normal(len(names)))
    lengths *= seconds / lengths.sum()
    ends = np.cumsum(lengths)

    # Each target holds in the middle of its state. Formants glide over the outer 30 %, gains switch
    # within 8 ms, and start and end at 0.
    num_frames = -(-round(seconds * SAMPLE_RATE) // HOP) + 1
    times = np.arange(num_frames) * HOP / SAMPLE_RATE  # (T,) centre of each frame
    glide, switch = 0.3 * lengths, np.minimum(0.008, 0.3 * lengths)
    slow = np.stack([ends - lengths + glide, ends - glide], axis=1).ravel()  # (2S,)
    quick = np.stack([ends - lengths + switch, ends - switch], axis=1).ravel()
    twice = np.repeat(targets, 2, axis=0).T  # (9, 2S)
    formants = [np.interp(times, slow, row) for row in twice[:4]]
    gains = [np.interp(times, [0, *quick, seconds], [edge, *row, edge])
             for row, edge in zip(twice[4:], (0, 0, 0, 5000, 3000))]
    return np.stack(formants), np.stack(gains).astype(np.float32)


def speak(word: str, seconds: float, pitch: float, tract: float,
          rng: np.random.Generator) -> np.ndarray:
    """One word of `seconds` at a mean pitch in Hz, formants scaled by `tract`; (N,)."""
    formants, gains = contours(word, seconds, tract, rng)
    voicing, aspiration, frication, centre, spread = gains[:, :, None]  # (T, 1) each
    num_samples, num_frames = round(seconds * SAMPLE_RATE), gains.shape[1]

    # Source: pulses on a falling pitch contour, and noise. Padded by one hop so that frame 0 is
    # centred on sample 0.
    t = np.arange((num_frames + 1) * HOP) / (num_frames * HOP)
    contour = pitch * (1.1 - 0.2 * t + 0.05 * np.sin(np.pi * t))
    pulses = frames(glottal_pulses(contour, rng))  # (T, K)
    noise = frames(rng.standard_normal(len(t), dtype=np.float32))

    # Filter: F1, F2, F3 move; F4 and up stand still; frication has a resonance of its own, in front
    # of the tract.
    higher = [f * tract for f in HIGHER_FORMANTS if f * tract < 0.49 * SAMPLE_RATE]
    widths = np.full(len(higher), HIGHER_BANDWIDTH)
    cascade = resonator(np.array(higher), widths).prod(axis=0)  # (K,)
    for formant, bandwidth in zip(formants[:3], BANDWIDTHS):
        cascade = cascade * resonator(formant, bandwidth * formants[3] * tract)  # (T, K)
    source = voicing * (GLOTTIS * pulses) + aspiration * noise
    ridge = frication / (1 + ((BINS_HZ - centre) / (spread / 2)) ** 2)
    word_sound = overlap_add(source * cascade + ridge * noise)[HOP : HOP + num_samples]
    return fade(word_sound, 0.003, 0.015)


def speech(scene: Scene, rng: np.random.Generator) -> tuple[list, tuple[float, float]]:
    """The words of a scene as (sound, label, pitches) and the range of the gaps between them in
    seconds."""
    pitch, tract = rng.uniform(*PITCH[scene.voice]), rng.uniform(*TRACT[scene.voice])
    pieces = []
    for i, digit in enumerate(scene.items):
        seconds = rng.uniform(*WORD_SECONDS[scene.speed])
        # declination over the utterance
        falling = pitch * (1.05 - 0.03 * i) * rng.uniform(0.97, 1.03)
        sound = speak(digit, seconds, falling, tract * rng.uniform(0.98, 1.02), rng)
        pieces.append((sound / np.abs(sound).max() * rng.uniform(0.8, 1.0), digit, ()))
    return pieces, WORD_GAPS[scene.speed]
