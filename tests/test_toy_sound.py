"""The toy sounds are what their labels say: where they sound, at which pitch, and the same for the
same seed."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from data.toy_sound import DIGITS, MAX_SECONDS, SAMPLE_RATE, SOUNDS, Scene, synthesize

SPEECH = Scene("speech", ("three", "one", "four"), voice="high", speed="fast")
SOUND = Scene("sound", ("siren", "beep", "drum"))
ARPEGGIO = Scene("music", speed="slow", pattern="arpeggio", mode="minor", instrument="organ")
CHORDS = Scene("music", speed="slow", pattern="chords", mode="major", instrument="flute")
EVERY_KIND = [
    *(Scene("speech", digits, voice=voice, speed=speed) for digits, voice, speed in product(
        (DIGITS[:4], DIGITS[4:8], DIGITS[8:]), ("high", "low"), ("fast", "slow"))),
    *(Scene("sound", sounds) for sounds in (SOUNDS[:3], SOUNDS[3:6], SOUNDS[6:])),
    *(Scene("music", speed=s, pattern=p, mode=m, instrument=i) for s, p, m, i in product(
        ("fast", "slow"), ("arpeggio", "chords"), ("major", "minor"), ("flute", "organ"))),
]


def rms(samples):
    return np.sqrt(np.mean(np.square(samples)))


def spectrum(samples):
    """Amplitudes of a stretch of sound, 1 Hz apart."""
    return np.abs(np.fft.rfft(samples * np.hanning(len(samples)), SAMPLE_RATE))


@pytest.mark.parametrize("scene", EVERY_KIND, ids=lambda scene: " ".join(value for value in (
    *scene.items, scene.voice, scene.speed, scene.pattern, scene.mode, scene.instrument) if value))
def test_a_clip_is_sound_where_its_segments_say(scene):
    samples, segments = synthesize(scene, np.random.default_rng(0))
    assert samples.dtype == np.float32 and np.isfinite(samples).all()
    assert 0.1 < np.abs(samples).max() < 1
    assert 0.4 <= len(samples) / SAMPLE_RATE <= MAX_SECONDS == 3.9
    assert [segment.ordinal for segment in segments] == list(range(len(segments)))
    labels = [segment.label for segment in segments]
    assert labels == (list(scene.items) or [scene.pattern] * len(segments)) and len(segments) > 1
    # start, end, start, end, ...
    edges = np.array([(segment.start, segment.end) for segment in segments]).ravel()
    assert 0 <= edges[0] <= 0.4 and (np.diff(edges) > 0).all()
    assert edges[-1] <= len(samples) / SAMPLE_RATE
    inside = np.zeros(len(samples), dtype=bool)
    spans = [
        slice(round(segment.start * SAMPLE_RATE), round(segment.end * SAMPLE_RATE))
        for segment in segments]
    for span in spans:
        inside[span] = True
    assert min(rms(samples[span]) for span in spans) > 2 * rms(samples[~inside])
    assert rms(samples[inside]) > 8 * rms(samples[~inside])  # the room is 20 to 40 dB below


def test_every_kind_has_every_item_and_another_is_an_error():
    assert {item for scene in EVERY_KIND for item in scene.items} == {*DIGITS, *SOUNDS}
    with pytest.raises(ValueError, match="silence"):
        synthesize(Scene("silence"), np.random.default_rng(0))


@pytest.mark.parametrize("scene", [SPEECH, SOUND, ARPEGGIO], ids=lambda scene: scene.kind)
def test_a_clip_depends_on_its_seed_alone(scene):
    clips = [synthesize(scene, np.random.default_rng(seed))[0] for seed in (1, 1, 2)]
    assert np.array_equal(clips[0], clips[1])
    assert clips[0].shape != clips[2].shape or not np.array_equal(clips[0], clips[2])


@pytest.mark.parametrize("instrument, speed, seed",
                         [*product(("flute", "organ"), ("fast", "slow"), (0, 1, 2))])
def test_the_notes_of_an_arpeggio_have_the_labelled_pitch(instrument, speed, seed):
    scene = replace(ARPEGGIO, instrument=instrument, speed=speed)
    samples, segments = synthesize(scene, np.random.default_rng(seed))
    for segment in segments:
        loudest = spectrum(
            samples[round(segment.start * SAMPLE_RATE):round(segment.end * SAMPLE_RATE)]).argmax()
        assert round(12 * np.log2(loudest / 523.25)) % 12 == segment.pitches[0]
        assert len(segment.pitches) == 1


@pytest.mark.parametrize("mode, seed", [*product(("major", "minor"), (0, 1, 2))])
def test_a_chord_has_three_pitches_of_its_mode(mode, seed):
    samples, segments = synthesize(replace(CHORDS, mode=mode), np.random.default_rng(seed))
    for segment in segments:
        amplitude = spectrum(
            samples[round(segment.start * SAMPLE_RATE):round(segment.end * SAMPLE_RATE)])
        notes = [amplitude[round(523.25 * 2 ** (semitone / 12))] for semitone in range(36)]
        loudest = np.argsort(np.array(notes).reshape(3, 12).max(axis=0))[-3:]
        assert set(loudest.tolist()) == set(segment.pitches)
        thirds = {(root + (4 if mode == "major" else 3)) % 12 for root in segment.pitches
                  if (root + 7) % 12 in segment.pitches}
        assert thirds & set(segment.pitches)  # the note between root and fifth
