"""A toy audio world: spoken digits, sound events and music, synthesised with NumPy alone.

`synthesize(scene, rng)` turns a symbolic `Scene` into a waveform and its exact alignment, so every
question one can ask about a clip ("which sound comes first?", "major or minor?") has a known answer
and no data is downloaded. Speech has a file of its own, `toy_speech`. Letters as in `toy_scene`.
"""

import numpy as np

from data.toy_scene import (
    DIGITS,
    MAX_SECONDS,
    SAMPLE_RATE,
    SOUNDS,
    Scene,
    Segment,
    clock,
    fade,
    harmonics,
    shaped_noise,
)
from data.toy_speech import speech

__all__ = [
    "DIGITS", "MAX_SECONDS", "SAMPLE_RATE", "SOUNDS", "Scene", "Segment", "shaped_noise",
    "synthesize"]


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
    return harmonics(
        rng.uniform(650, 1000) * 2**(rng.uniform(0.4, 0.6) * swing), (1, 0.4, 0.25, 0.1), t)


def noise(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A burst of noise, one to two octaves wide."""
    centre, octaves = rng.uniform(1200, 4500), rng.uniform(0.5, 1.0)

    def gain(hertz):
        return np.exp(-((np.log2((hertz + 1) / centre) / octaves)**2))

    return shaped_noise(len(t), gain, rng)


def clicks(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A train of 8 to 14 clicks a second, each a few milliseconds of ringing."""
    since = t % (1 / rng.uniform(8, 14))  # seconds since the last click
    decay = np.exp(-since / rng.uniform(0.001, 0.003))
    return decay * np.sin(2 * np.pi * rng.uniform(1500, 4000) * since)


def bell(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Inharmonic partials; the higher ones die first."""
    ratios = np.array([0.5, 1, 1.19, 1.56, 2, 2.66, 3.76, 5.07], np.float32)[:, None]  # (8, 1)
    ratios = ratios * rng.uniform(0.99, 1.01, (8, 1)).astype(np.float32)
    hertz, decay = ratios * rng.uniform(500, 900), rng.uniform(0.2, 0.35) / np.sqrt(ratios)
    strength = rng.uniform(0.4, 1.0, (8, 1)).astype(np.float32)
    return (strength * np.exp(-t / decay) * np.sin(2 * np.pi * hertz * t)).sum(axis=0)


def buzz(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A low sawtooth, shaken in loudness 18 to 30 times a second."""
    saw = 2 * (rng.uniform(100, 150) * t % 1) - 1
    return saw * (1 + rng.uniform(0.4, 0.8) * np.sin(2 * np.pi * rng.uniform(18, 30) * t))


def drum(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two or three thumps: a low tone that falls in pitch and dies, with a little noise from the
    stick."""
    since = t % (t[-1] / rng.integers(2, 4) + 1 / SAMPLE_RATE)  # seconds since the last stroke
    body = np.sin(2 * np.pi * (rng.uniform(70, 110) * since + 1.5 * (1 - np.exp(-since / 0.02))))
    stick = 0.2 * rng.standard_normal(len(t), dtype=np.float32) * np.exp(-since / 0.006)
    return body * np.exp(-since / rng.uniform(0.05, 0.09)) + stick


EVENTS = {event.__name__: event for event in (beep, chirp, siren, noise, clicks, bell, buzz, drum)}
# others: 0.35 to 0.90
EVENT_SECONDS = {"siren": (0.60, 0.90), "bell": (0.50, 0.90), "drum": (0.45, 0.90)}


def sound_events(scene: Scene, rng: np.random.Generator) -> tuple[list, tuple[float, float]]:
    """The events of a scene as (sound, label, pitches) and the range of the gaps between them in
    seconds."""
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


def play(semitones: list[int], seconds: float, instrument: str,
         rng: np.random.Generator) -> np.ndarray:
    """Notes that sound together, in semitones above C5; (N,). Vibrato and jitter leave the pitch
    centred."""
    t = clock(seconds)
    partials = tuple(a * rng.uniform(0.85, 1.15) for a in PARTIALS[instrument])
    hertz = [C5 * 2 ** (semitone / 12) for semitone in semitones]
    if instrument == "organ":
        return fade(sum(harmonics(f, partials, t) for f in hertz), 0.004, 0.02)
    depth, rate = rng.uniform(0.002, 0.005), rng.uniform(4.5, 6.0)  # vibrato: relative, Hz
    # its derivative is 1 + depth * sin
    warped = t - depth / (2 * np.pi * rate) * np.cos(2 * np.pi * rate * t)
    # the difference keeps the highs
    breath = 0.03 * np.diff(rng.standard_normal(len(t) + 1, dtype=np.float32))
    return fade(
        sum(harmonics(f, partials, warped) for f in hertz) + breath, min(0.06, 0.3 * seconds), 0.04)


def music(scene: Scene, rng: np.random.Generator) -> tuple[list, tuple[float, float]]:
    """The notes or chords of a scene as (sound, label, pitches) and the range of the gaps between
    them in seconds."""
    triad = TRIADS[scene.mode]
    unit = rng.uniform(*UNIT_SECONDS[scene.pattern][scene.speed])
    count = round(np.clip(rng.uniform(1.6, 3.4) / unit, 1.6 / unit + 0.5, 3.4 / unit - 0.5))
    # 3: the octave
    order = ((0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 2, 1), (0, 1, 2, 1))[rng.integers(4)]
    inversions = rng.integers(0, 3, size=2).tolist()  # two voicings of the same chord, in turn
    pieces = []
    for i in range(count):
        if scene.pattern == "chords":
            notes = [
                scene.root + tone + 12 * int(k < inversions[i % 2]) for k, tone in enumerate(triad)]
        else:
            notes = [scene.root + (*triad, 12)[order[i % len(order)]]]
        sound = play(notes, 0.93 * unit, scene.instrument, rng) * rng.uniform(0.85, 1.0)
        pieces.append((sound, scene.pattern, tuple(sorted({note % 12 for note in notes}))))
    return pieces, (0.065 * unit, 0.075 * unit)


# ---- the scene ----

KINDS = {"speech": speech, "sound": sound_events, "music": music}


def synthesize(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, list[Segment]]:
    """Waveform, (N,) float32 at 16 kHz with 0.4 to 3.9 s and peak below 1, and the segments in
    order of time."""
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

    # The room: noise between white (slope 0) and pink (slope 1), 20 to 40 dB below the sound; then
    # a random loudness.
    slope, snr = rng.uniform(0, 1), rng.uniform(20, 40)
    level = np.sqrt(np.sum(clip**2) / sum(len(sound) for sound, _, _ in pieces)) * 10 ** (-snr / 20)
    clip += level * shaped_noise(len(clip), lambda hertz: (hertz + 20) ** (-slope / 2), rng)
    peak = 0.9 * 10 ** (-rng.uniform(0, 14) / 20)
    return (clip * (peak / np.abs(clip).max())).astype(np.float32), segments
