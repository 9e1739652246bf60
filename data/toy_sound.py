"""A toy audio world: spoken digits, sound events and music, synthesised with NumPy alone.

`synthesize(scene, rng)` turns a symbolic `Scene` into a waveform and its exact alignment, so every question one can ask
about a clip ("how many beeps?", "major or minor?", "when is seven said?") has a known answer and no data is downloaded.

Speech is a formant synthesiser (Klatt, 1980): a source (glottal pulses, aspiration, frication) times a filter (a
cascade of two-pole resonators whose frequencies move between phoneme targets). Klatt runs the resonators sample by
sample, which is slow in Python; here their frequency response is evaluated every 8 ms and multiplies the short-time
spectrum of the source, and overlap-add makes the sound: the same filter, applied in the frequency domain.

Letters: N samples, T control frames, K frequency bins, S phoneme states, H harmonics.
"""

from dataclasses import dataclass

import numpy as np

SAMPLE_RATE = 16_000
MAX_SECONDS = 3.9  # longest clip; silences shrink to respect it
HOP = 128  # samples between control frames: 8 ms
WINDOW = np.hanning(2 * HOP + 1)[:-1].astype(np.float32)  # periodic Hann: sums to 1 at this hop
FFT_SIZE = 512  # two windows long, so that resonances ring for another 16 ms
BINS_HZ = np.fft.rfftfreq(FFT_SIZE, 1 / SAMPLE_RATE).astype(np.float32)  # (K,)
DELAY = np.exp(-2j * np.pi * np.arange(FFT_SIZE // 2 + 1) / FFT_SIZE)  # z^-1 on the unit circle, (K,)
DELAY_POWERS = np.stack([DELAY**0, DELAY, DELAY**2]).astype(np.complex64)  # (3, K)

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


@dataclass(frozen=True)
class Segment:
    """One thing that sounds, and when."""

    start: float  # seconds
    end: float  # seconds
    label: str  # the digit, the sound event, or the musical pattern
    ordinal: int  # 0, 1, 2, ... in order of time
    pitches: tuple[int, ...] = ()  # music: pitch classes that sound, 0 = C ... 11 = B


# ---- helpers ----

def clock(seconds: float) -> np.ndarray:
    """Sample times in seconds, (N,) float32."""
    return np.arange(round(seconds * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE


def fade(sound: np.ndarray, attack: float, release: float) -> np.ndarray:
    """Linear fade-in over `attack` and fade-out over `release`, both in seconds."""
    t = clock(len(sound) / SAMPLE_RATE)
    return sound * np.minimum(1, np.minimum(t / attack, t[::-1] / release))


def harmonics(frequency, amplitudes: tuple[float, ...], t: np.ndarray) -> np.ndarray:
    """Partials 1, 2, ... of a `frequency` in Hz, constant or (N,), with these amplitudes, at `t` seconds; (N,)."""
    phase = 2 * np.pi * (frequency * t if np.ndim(frequency) == 0 else np.cumsum(frequency) / SAMPLE_RATE)
    audible = [(h, a) for h, a in enumerate(amplitudes, start=1) if a and h * np.max(frequency) < 0.47 * SAMPLE_RATE]
    number, amplitude = np.array(audible, dtype=np.float32).T  # (H,), (H,)
    return amplitude @ np.sin(number[:, None] * phase.astype(np.float32))  # (H,) @ (H, N)


def shaped_noise(num_samples: int, gain, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise whose amplitude spectrum is `gain(hertz)`, scaled to an RMS of 1; (N,)."""
    size = 1 << max(num_samples - 1, 1).bit_length()  # a power of two: fast transform
    hertz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE).astype(np.float32)
    spectrum = rng.standard_normal((len(hertz), 2), dtype=np.float32).view(np.complex64)[:, 0] * gain(hertz)
    noise = np.fft.irfft(spectrum)[:num_samples]
    return noise / np.sqrt(np.mean(noise**2))


# ---- speech ----

# Phoneme targets: typical values for an adult male voice, adjusted by hand. Vowels: formants F1 F2 F3 in Hz.
VOWELS = {
    "iy": (280, 2250, 3000), "ih": (400, 1950, 2550), "eh": (560, 1800, 2500), "ey": (480, 1850, 2550),
    "ah": (660, 1200, 2450), "aa": (740, 1200, 2500), "ax": (500, 1450, 2450), "ao": (560, 850, 2450),
    "ow": (520, 1000, 2350), "uw": (310, 950, 2250), "ux": (330, 1500, 2300), "er": (460, 1200, 1650),
}  # fmt: skip
# All states: F1 F2 F3 (Hz), bandwidth factor, gains of voicing, aspiration and frication (1 = the voice of a vowel),
# and centre and width of the frication resonance (Hz).
STATES = {name: (*formants, 1.0, 1.0, 0.0, 0.0, 5000, 3000) for name, formants in VOWELS.items()} | {
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
HIGHER_FORMANTS, HIGHER_BANDWIDTH = (3500, 4500, 5500, 6500, 7500), 250  # Hz, F4 and up: same in all phonemes
PITCH = {"low": (85, 130), "high": (185, 260)}  # Hz
TRACT = {"low": (0.93, 1.05), "high": (1.10, 1.25)}  # factor on all formants: a shorter tract sounds higher
WORD_SECONDS = {"fast": (0.24, 0.33), "slow": (0.50, 0.62)}
WORD_GAPS = {"fast": (0.02, 0.08), "slow": (0.08, 0.18)}  # seconds
# Glottal pulses fall by 12 dB per octave above 150 Hz (two equal poles), radiation from the lips gives 6 dB back.
GLOTTIS = (1 - DELAY) / (1 - np.exp(-2 * np.pi * 150 / SAMPLE_RATE) * DELAY) ** 2
GLOTTIS = (GLOTTIS / np.abs(GLOTTIS).max()).astype(np.complex64)  # (K,)


def resonator(frequency: np.ndarray, bandwidth: np.ndarray) -> np.ndarray:
    """Response of two-pole resonators with unit gain at 0 Hz: (T,) centres and bandwidths in Hz to (T, K) complex."""
    radius = np.exp(-np.pi * bandwidth / SAMPLE_RATE)
    b, c = 2 * radius * np.cos(2 * np.pi * frequency / SAMPLE_RATE), -(radius**2)
    denominator = np.stack([np.ones_like(b), -b, -c], axis=-1).astype(np.complex64)  # (T, 3)
    return (1 - b - c).astype(np.float32)[:, None] / (denominator @ DELAY_POWERS)


def glottal_pulses(f0: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pulse train of unit power at pitch `f0` in Hz, (N,), with 1 % jitter in time and 5 % shimmer in size."""
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
    return np.fft.rfft(np.lib.stride_tricks.sliding_window_view(signal, 2 * HOP)[::HOP] * WINDOW, FFT_SIZE)


def overlap_add(spectra: np.ndarray) -> np.ndarray:
    """Inverse of `frames`, with 256 more samples for what still rings: (T, K) to (T + 3) * HOP samples."""
    blocks = np.fft.irfft(spectra, FFT_SIZE).reshape(len(spectra), FFT_SIZE // HOP, HOP)  # (T, 4, HOP)
    total = np.zeros((len(spectra) + 3, HOP), dtype=np.float32)
    for i in range(FFT_SIZE // HOP):
        total[i : i + len(spectra)] += blocks[:, i]
    return total.ravel()


def speak(word: str, seconds: float, pitch: float, tract: float, rng: np.random.Generator) -> np.ndarray:
    """One word of `seconds` at a mean pitch in Hz, formants scaled by `tract`; (N,)."""
    names, lengths = zip(*WORDS[word])
    targets = np.array([STATES[name] for name in names])  # (S, 9)
    targets[:, :3] *= tract * np.exp(0.02 * rng.standard_normal((len(names), 3)))
    targets[:, 4:7] *= np.exp(0.15 * rng.standard_normal((len(names), 3)))
    lengths = np.array(lengths) * np.exp(0.08 * rng.standard_normal(len(names)))
    lengths *= seconds / lengths.sum()
    ends = np.cumsum(lengths)

    # Each target holds in the middle of its state. Formants glide over the outer 30 %, gains switch within 8 ms.
    num_samples = round(seconds * SAMPLE_RATE)
    num_frames = -(-num_samples // HOP) + 1
    times = np.arange(num_frames) * HOP / SAMPLE_RATE  # (T,) centre of each frame
    glide, switch = 0.3 * lengths, np.minimum(0.008, 0.3 * lengths)
    slow = np.stack([ends - lengths + glide, ends - glide], axis=1).ravel()  # (2S,)
    quick = np.stack([ends - lengths + switch, ends - switch], axis=1).ravel()
    twice = np.repeat(targets, 2, axis=0)  # (2S, 9)
    f1, f2, f3, width = (np.interp(times, slow, column) for column in twice[:, :4].T)
    voicing, aspiration, frication, centre, spread = (  # (T, 1) each; the gains start and end at 0
        np.interp(times, [0, *quick, seconds], [edge, *column, edge]).astype(np.float32)[:, None]
        for column, edge in zip(twice[:, 4:].T, (0, 0, 0, 5000, 3000))
    )

    # Source: pulses on a falling pitch contour, and noise. Padded by one hop so that frame 0 is centred on sample 0.
    t = np.arange((num_frames + 1) * HOP) / (num_frames * HOP)
    pulses = frames(glottal_pulses(pitch * (1.1 - 0.2 * t + 0.05 * np.sin(np.pi * t)), rng))  # (T, K)
    noise = frames(rng.standard_normal(len(t), dtype=np.float32))

    # Filter: F1, F2, F3 move; F4 and up stand still; frication has a resonance of its own, in front of the tract.
    higher = [f * tract for f in HIGHER_FORMANTS if f * tract < 0.49 * SAMPLE_RATE]
    cascade = resonator(np.array(higher), np.full(len(higher), HIGHER_BANDWIDTH)).prod(axis=0)  # (K,)
    for formant, bandwidth in zip((f1, f2, f3), BANDWIDTHS):
        cascade = cascade * resonator(formant, bandwidth * width * tract)  # (T, K)
    source = voicing * (GLOTTIS * pulses) + aspiration * noise
    ridge = frication / (1 + ((BINS_HZ - centre) / (spread / 2)) ** 2)
    word_sound = overlap_add(source * cascade + ridge * noise)[HOP : HOP + num_samples]
    return fade(word_sound, 0.003, 0.015)


def speech(scene: Scene, rng: np.random.Generator) -> tuple[list, tuple[float, float]]:
    """The words of a scene as (sound, label, pitches) and the range of the gaps between them in seconds."""
    pitch, tract = rng.uniform(*PITCH[scene.voice]), rng.uniform(*TRACT[scene.voice])
    pieces = []
    for i, digit in enumerate(scene.items):
        seconds = rng.uniform(*WORD_SECONDS[scene.speed])
        falling = pitch * (1.05 - 0.03 * i) * rng.uniform(0.97, 1.03)  # declination over the utterance
        sound = speak(digit, seconds, falling, tract * rng.uniform(0.98, 1.02), rng)
        pieces.append((sound / np.abs(sound).max() * rng.uniform(0.8, 1.0), digit, ()))
    return pieces, WORD_GAPS[scene.speed]


# ---- sound events ----

def beep(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A steady tone."""
    return harmonics(rng.uniform(700, 1500), (1, rng.uniform(0, 0.2), rng.uniform(0, 0.1)), t)


def chirp(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One sweep upwards, over 1.5 to 2.5 octaves."""
    return harmonics(rng.uniform(400, 900) * 2 ** (rng.uniform(1.5, 2.5) * t / t[-1]), (1, 0.1), t)


def siren(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A wail: pitch goes up and down once or twice, starting low."""
    swing = -np.cos(2 * np.pi * rng.uniform(1.0, 2.0) * t / t[-1])
    return harmonics(rng.uniform(650, 1000) * 2 ** (rng.uniform(0.4, 0.6) * swing), (1, 0.4, 0.25, 0.1), t)


def noise(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A burst of noise, one to two octaves wide."""
    centre, octaves = rng.uniform(1200, 4500), rng.uniform(0.5, 1.0)
    return shaped_noise(len(t), lambda hertz: np.exp(-((np.log2((hertz + 1) / centre) / octaves) ** 2)), rng)


def clicks(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A train of 8 to 14 clicks a second, each a few milliseconds of ringing."""
    since = t % (1 / rng.uniform(8, 14))  # seconds since the last click
    return np.exp(-since / rng.uniform(0.001, 0.003)) * np.sin(2 * np.pi * rng.uniform(1500, 4000) * since)


def bell(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Inharmonic partials; the higher ones die first."""
    ratios = np.array([0.5, 1, 1.19, 1.56, 2, 2.66, 3.76, 5.07], np.float32) * rng.uniform(0.99, 1.01, 8).astype("f4")
    hertz, decay = ratios[:, None] * rng.uniform(500, 900), rng.uniform(0.2, 0.35) / np.sqrt(ratios[:, None])
    strength = rng.uniform(0.4, 1.0, (8, 1)).astype(np.float32)
    return (strength * np.exp(-t / decay) * np.sin(2 * np.pi * hertz * t)).sum(axis=0)


def buzz(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A low sawtooth, shaken in loudness 18 to 30 times a second."""
    saw = 2 * (rng.uniform(100, 150) * t % 1) - 1
    return saw * (1 + rng.uniform(0.4, 0.8) * np.sin(2 * np.pi * rng.uniform(18, 30) * t))


def drum(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two or three thumps: a low tone that falls in pitch and dies, with a little noise from the stick."""
    since = t % (t[-1] / rng.integers(2, 4) + 1 / SAMPLE_RATE)  # seconds since the last stroke
    body = np.sin(2 * np.pi * (rng.uniform(70, 110) * since + 1.5 * (1 - np.exp(-since / 0.02))))
    stick = 0.2 * rng.standard_normal(len(t), dtype=np.float32) * np.exp(-since / 0.006)
    return body * np.exp(-since / rng.uniform(0.05, 0.09)) + stick


EVENTS = {event.__name__: event for event in (beep, chirp, siren, noise, clicks, bell, buzz, drum)}
EVENT_SECONDS = {"siren": (0.60, 0.90), "bell": (0.50, 0.90), "drum": (0.45, 0.90)}  # others: 0.35 to 0.90


def sound_events(scene: Scene, rng: np.random.Generator) -> tuple[list, tuple[float, float]]:
    """The events of a scene as (sound, label, pitches) and the range of the gaps between them in seconds."""
    pieces = []
    for name in scene.items:
        t = clock(rng.uniform(*EVENT_SECONDS.get(name, (0.35, 0.90))))
        sound = fade(EVENTS[name](t, rng), 0.001, 0.03)
        pieces.append((sound / np.abs(sound).max() * rng.uniform(0.6, 1.0), name, ()))
    return pieces, (0.08, 0.30)


# ---- music ----

C5 = 523.25  # Hz
TRIADS = {"major": (0, 4, 7), "minor": (0, 3, 7)}  # semitones above the root
UNIT_SECONDS = {  # from one onset to the next
    "chords": {"slow": (0.42, 0.55), "fast": (0.13, 0.20)},
    "arpeggio": {"slow": (0.34, 0.45), "fast": (0.13, 0.20)},
}
PARTIALS = {"flute": (1, 0.12, 0.05), "organ": (1, 0.8, 0.6, 0.5, 0, 0.4, 0, 0.3)}  # amplitudes


def play(semitones: list[int], seconds: float, instrument: str, rng: np.random.Generator) -> np.ndarray:
    """Notes that sound together, in semitones above C5; (N,). Vibrato and jitter leave the pitch centred."""
    t = clock(seconds)
    partials = tuple(a * rng.uniform(0.85, 1.15) for a in PARTIALS[instrument])
    hertz = [C5 * 2 ** (semitone / 12) for semitone in semitones]
    if instrument == "organ":
        return fade(sum(harmonics(f, partials, t) for f in hertz), 0.004, 0.02)
    depth, rate = rng.uniform(0.002, 0.005), rng.uniform(4.5, 6.0)  # vibrato: relative, Hz
    warped = t - depth / (2 * np.pi * rate) * np.cos(2 * np.pi * rate * t)  # its derivative is 1 + depth * sin
    breath = 0.03 * np.diff(rng.standard_normal(len(t) + 1, dtype=np.float32))  # the difference keeps the highs
    return fade(sum(harmonics(f, partials, warped) for f in hertz) + breath, min(0.06, 0.3 * seconds), 0.04)


def music(scene: Scene, rng: np.random.Generator) -> tuple[list, tuple[float, float]]:
    """The notes or chords of a scene as (sound, label, pitches) and the range of the gaps between them in seconds."""
    root, triad = int(rng.integers(12)), TRIADS[scene.mode]
    unit = rng.uniform(*UNIT_SECONDS[scene.pattern][scene.speed])
    count = round(np.clip(rng.uniform(1.6, 3.4) / unit, 1.6 / unit + 0.5, 3.4 / unit - 0.5))
    order = ((0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 2, 1), (0, 1, 2, 1))[rng.integers(4)]  # 3: the octave
    inversions = rng.integers(0, 3, size=2).tolist()  # two voicings of the same chord, in turn
    pieces = []
    for i in range(count):
        if scene.pattern == "chords":
            notes = [root + tone + 12 * int(k < inversions[i % 2]) for k, tone in enumerate(triad)]
        else:
            notes = [root + (*triad, 12)[order[i % len(order)]]]
        sound = play(notes, 0.93 * unit, scene.instrument, rng) * rng.uniform(0.85, 1.0)
        pieces.append((sound, scene.pattern, tuple(sorted({note % 12 for note in notes}))))
    return pieces, (0.065 * unit, 0.075 * unit)


# ---- the scene ----

KINDS = {"speech": speech, "sound": sound_events, "music": music}


def synthesize(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, list[Segment]]:
    """Waveform, (N,) float32 at 16 kHz with 0.4 to 3.9 s and peak below 1, and the segments in order of time."""
    if scene.kind not in KINDS:
        raise ValueError(f"scene.kind must be one of {tuple(KINDS)}, got {scene.kind!r}")
    pieces, gap_range = KINDS[scene.kind](scene, rng)
    gaps = rng.uniform(*gap_range, size=len(pieces) - 1)
    edges = rng.uniform(0.05, 0.40, size=2)  # seconds of silence before and after
    sounding = sum(len(sound) for sound, _, _ in pieces) / SAMPLE_RATE + gaps.sum()
    edges *= min(1, (MAX_SECONDS - 0.01 - sounding) / edges.sum())

    clip = np.zeros(int(SAMPLE_RATE * (sounding + edges.sum())), dtype=np.float32)
    segments, start = [], int(edges[0] * SAMPLE_RATE)
    for i, (sound, label, pitches) in enumerate(pieces):
        end = start + len(sound)
        clip[start:end] += sound
        segments.append(Segment(start / SAMPLE_RATE, end / SAMPLE_RATE, label, i, pitches))
        start = end + int(gaps[i] * SAMPLE_RATE) if i < len(gaps) else end

    # The room: noise between white (slope 0) and pink (slope 1), 20 to 40 dB below the sound; then a random loudness.
    slope, snr = rng.uniform(0, 1), rng.uniform(20, 40)
    level = np.sqrt(np.sum(clip**2) / sum(len(sound) for sound, _, _ in pieces)) * 10 ** (-snr / 20)
    clip += level * shaped_noise(len(clip), lambda hertz: (hertz + 20) ** (-slope / 2), rng)
    peak = 0.9 * 10 ** (-rng.uniform(0, 14) / 20)
    return (clip * (peak / np.abs(clip).max())).astype(np.float32), segments
