"""Manifests from the Free Spoken Digit Dataset: people who say digits, for the stages that the toy
world serves too.

    python data/fsdd.py                    # download the recordings, write data/fsdd: a minute
    python data/fsdd.py --source ~/fsdd    # use a copy: recordings/{digit}_{speaker}_{take}.wav
    python data/fsdd.py --hold-out george  # train without george, ask about him in held_out.json

The recordings are by Zohar Jackson and others, github.com/Jakobovski/free-spoken-digit-dataset,
under CC BY-SA 4.0. The clips made here are adapted from them, so the same licence holds for the
clips. This repository contains neither.

A clip is 1 to 4 recordings of one speaker in a row. Takes 0-4 are the test split, by the convention
of the data set; we train on takes 5-44 and validate on 45-49. Training never hears a sequence of
digits of validation or test: those are `toy_text.held_out`, one sequence in five. All takes of a
held-out speaker are for testing.
"""

import sys
from pathlib import Path

# so that this file runs as a script
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffa2_mini.command.script import begin, progress, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import hashlib
import re
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import PurePosixPath

import numpy as np

from data import corpus, toy_text
from data.toy import ask_row, write_clip
from data.toy_scene import DIGITS, MAX_SECONDS, SAMPLE_RATE, Scene, Segment, shaped_noise
from diffa2_mini.audio import load_audio, resample
from diffa2_mini.errors import require

ARCHIVE = corpus.Archive(
    "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz")
# all but theo, whose recordings are not in the checksum
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "yweweler")
SHA256 = "579a37e1632d1b1a0892ab11f4d46311c1efa21032aff81bc00751740624664a"  # of their recordings
NAME = re.compile(r"([0-9])_([a-z]+)_([0-9]+)\.wav")  # digit, speaker, take
RATE = 8000  # Hz, of the recordings
LONGEST = 2.5  # seconds of a recording; then one digit fits into a clip at any speed
LOUDNESS, JITTER = 0.1, 3.0  # RMS of each recording, give or take so many dB
# seconds of silence between recordings, and before and after them
GAP, EDGE = (0.02, 0.25), (0.05, 0.30)
BANDS = np.log2([200, 900, 4000])  # Hz, where the equaliser has its three knobs
# how often training asks them without letters
TYPES = {"asr": 20, "count": 7, "first": 7, "last": 7, "who": 7}
# with letters; so a third of all questions is asr
LETTERED, SHARE_LETTERED = ("count", "first", "last"), 0.2
# per training clip; for preference; for validation, which is all of asr
N_QUESTIONS, N_PAIRS, N_PER_TYPE = 4, 480, 40
MANIFESTS = ("stage0", "stage1", "sft", "preference", "validation", "test", "held_out")


@dataclass(frozen=True)
class Split:
    """How many clips there are, of which takes, and how far they are from the recordings."""

    clips: int
    takes: range
    evaluation: bool = True  # only sequences that training never hears
    # of the playing speed, which moves pitch and formants along
    factor: tuple[float, float] = (1.0, 1.0)
    snr: tuple[float, float] = (20.0, 40.0)  # dB, of the voice to the noise
    tilt: float = 0.0  # dB, the most that a knob of the equaliser is turned up or down


SPLITS = {
    "stage0": Split(5000, range(5, 45), evaluation=False, factor=(0.80, 1.25), snr=(10.0, 40.0),
                    tilt=6.0),
    "train": Split(1800, range(5, 45), evaluation=False, factor=(0.95, 1.05), tilt=3.0),
    "validation": Split(150, range(45, 50)),
    "test": Split(300, range(5)),
    "held_out": Split(200, range(50)),  # the others are without the held-out speaker
}


@dataclass(frozen=True)
class Recording:
    name: str  # of its file, without .wav
    digit: int
    speaker: str
    take: int
    samples: np.ndarray  # at RATE, trimmed, with an RMS of LOUDNESS


def digest(folder: Path) -> str:
    """SHA-256 in hexadecimal over names and bytes of a folder's files, in the order of names."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def place(path: PurePosixPath) -> PurePosixPath | None:
    """Where a file of the archive goes: only the recordings of SPEAKERS are wanted."""
    name = NAME.fullmatch(path.name)
    wanted = path.parent.name == "recordings" and name and name[2] in SPEAKERS
    return PurePosixPath(path.name) if wanted else None


def check(recordings: Path) -> None:
    got = digest(recordings)
    require(got == SHA256, f"{ARCHIVE.url}: expected recordings with the SHA-256 {SHA256}, got "
            f"{got}; nothing was kept; {ARCHIVE.mend}")


def tidy(x: np.ndarray) -> np.ndarray:
    """Cut off both ends of x [samples] at RATE what is 30 dB below the loudest 10 ms, but for
    10 ms; fade there; make all equally loud."""
    window = RATE // 100
    power = np.convolve(x**2, np.ones(window), "same")
    loud = np.flatnonzero(power > 1e-3 * power.max())
    x = x[max(0, loud[0] - window) : loud[-1] + window]
    ramp = np.minimum(1, np.arange(1, len(x) + 1) / (window / 2))
    x = x * ramp * ramp[::-1]
    return (x * (LOUDNESS / np.sqrt(np.mean(x**2)))).astype(np.float32)


def read_recordings(source: Path) -> list[Recording]:
    """All recordings of a folder, or of its folder `recordings`."""
    folder = source / "recordings" if (source / "recordings").is_dir() else source
    recordings = []
    for path in sorted(folder.glob("*.wav")):
        if match := NAME.fullmatch(path.name):
            require(match[2] in toy_text.NAMES,
                    f"{path}: expected a speaker of {', '.join(toy_text.NAMES)}")
            x = load_audio(path, RATE, LONGEST)
            require(x.any(), f"{path}: expected a spoken digit, got silence; copy it again")
            recordings.append(Recording(path.stem, int(match[1]), match[2], int(match[3]), tidy(x)))
    require(recordings, f"{source}: expected recordings/{{digit}}_{{speaker}}_{{take}}.wav, "
            "got none; check --source")
    return recordings


def by_speaker(recordings: list[Recording], takes: range) -> dict[str, list[list[Recording]]]:
    """The recordings of some takes, by speaker and digit; each speaker must have said each
    digit."""
    pool = {speaker: [[] for _ in DIGITS] for speaker in sorted({r.speaker for r in recordings})}
    for r in recordings:
        if r.take in takes:
            pool[r.speaker][r.digit].append(r)
    for speaker, digits in pool.items():
        for digit, found in enumerate(digits):
            require(found, f"expected {digit}_{speaker}_N.wav with N of {takes[0]}-{takes[-1]}, "
                    "got none; copy again")
    return pool


def equalise(x: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Turn three knobs: x [samples] with so many dB more at BANDS, a straight line between them,
    flat outside."""
    size = 1 << len(x).bit_length()  # a power of two: fast transform
    decibel = np.interp(np.log2(np.fft.rfftfreq(size, 1 / SAMPLE_RATE) + 1), BANDS, gains)
    return np.fft.irfft(np.fft.rfft(x, size) * (10 ** (decibel / 20)).astype(np.float32))[: len(x)]


def make_clip(pool: dict, split: Split,
              rng: np.random.Generator) -> tuple[Scene, dict, np.ndarray, list[Segment]]:
    """A scene; the recordings that it is made of and their speed; the clip [samples] at
    SAMPLE_RATE, and where its digits are. `pool` is what `by_speaker` gives."""
    while True:
        speaker = str(rng.choice(list(pool)))
        takes = [pool[speaker][digit] for digit in rng.integers(10, size=rng.integers(1, 5))]
        chosen = [found[rng.integers(len(found))] for found in takes]
        factor = np.exp(rng.uniform(*np.log(split.factor)))
        # `resample` takes so many steps
        ratio = Fraction(factor * RATE / SAMPLE_RATE).limit_denominator(40)
        rate = float(ratio * SAMPLE_RATE)  # Hz at which the recordings are played
        lead, trail, *gaps = rng.uniform(*np.transpose([EDGE, EDGE, GAP, GAP, GAP]))
        while sum(len(r.samples) / rate + gap
                  for r, gap in zip(chosen, [lead + trail, *gaps])) > MAX_SECONDS - 0.01:
            chosen.pop()
        scene = Scene("speech", tuple(DIGITS[r.digit] for r in chosen), voice=speaker)
        if toy_text.held_out(scene) == split.evaluation:
            break

    at = round(lead * rate)
    pieces, segments = [np.zeros(at)], []
    for i, (r, silence) in enumerate(zip(chosen, [*gaps[: len(chosen) - 1], trail])):
        pieces += [
            r.samples * 10**(rng.uniform(-JITTER, JITTER) / 20),
            np.zeros(round(silence * rate))]
        segments.append(Segment(at / rate, (at + len(r.samples)) / rate, DIGITS[r.digit], i))
        at += len(r.samples) + len(pieces[-1])
    clip = resample(np.concatenate(pieces), ratio.numerator, ratio.denominator)
    if split.tilt:
        clip = equalise(clip, rng.uniform(-split.tilt, split.tilt, size=3))

    # Noise between white (slope 0) and pink (slope 1), then a random loudness, as in the toy world.
    slope, voiced = rng.uniform(0, 1), sum(s.end - s.start for s in segments) * SAMPLE_RATE
    level = np.sqrt(np.sum(clip**2) / voiced) * 10 ** (-rng.uniform(*split.snr) / 20)
    clip = clip + level * shaped_noise(len(clip), lambda hertz: (hertz + 20) ** (-slope / 2), rng)
    clip *= 0.9 * 10 ** (-rng.uniform(0, 14) / 20) / np.abs(clip).max()
    made_of = {"recordings": [r.name for r in chosen], "factor": round(rate / RATE, 4)}
    return scene, made_of, clip, segments


def make_clips(folder: Path, pool: dict, split: str, seed: int) -> list[tuple[Scene, dict]]:
    """Write the clips of a split; returns each scene with the manifest fields that any stage
    needs. Raises UserError when the disk is full."""
    clips = []
    for i in progress(range(SPLITS[split].clips), desc=f"making {split}", unit="clip", leave=False):
        rng = np.random.default_rng([seed, list(SPLITS).index(split), i])
        scene, made_of, samples, segments = make_clip(pool, SPLITS[split], rng)
        name = f"{split}_{i:05d}"
        path = folder / "clips" / f"{name}.wav"
        write_clip(path, samples)
        row = {
            "audio_id": name, "audio_filepath": f"clips/{name}.wav", "dataset": "fsdd",
            "domain": "speech", "duration": len(samples) / SAMPLE_RATE,
            "transcription": " ".join(scene.items), **made_of}
        # played much faster or slower, it is not the speaker's voice any more
        if split == "stage0":
            row["segments"] = [asdict(segment) for segment in segments]
            row["traits"] = {"speaker": scene.voice} if 0.95 <= row["factor"] <= 1.05 else {}
        clips.append((scene, row))
    return clips


def ask(type: str, scene: Scene, rng: np.random.Generator) -> toy_text.Question:
    """A question of `type`; the wrong answers to `who` are all other names."""
    question = toy_text.ask(type, scene, rng)
    if type == "who":
        others = tuple(name for name in toy_text.NAMES if name != scene.voice)
        question = replace(question, wrong=others)
    return question


def training_question(scene: Scene, rng: np.random.Generator) -> toy_text.Question:
    """A question of a random type, lettered or not."""
    question = ask(str(rng.choice(LETTERED)), scene, rng)
    if rng.random() < SHARE_LETTERED and len(question.wrong) > 1:
        return toy_text.lettered(question, rng)
    return ask(str(rng.choice([type for type, weight in TYPES.items() for _ in range(weight)])),
               scene, rng)


def manifests(clips: dict[str, list[tuple[Scene, dict]]], seed: int) -> dict[str, list[dict]]:
    """Every manifest, by name, from the clips of each split."""
    rng = np.random.default_rng([seed, 99])

    def rows(split: str, type: str) -> list[dict]:
        return [ask_row(row, ask(type, scene, rng), rng) for scene, row in clips[split]]

    found = {"stage0": [row for _, row in clips["stage0"]], "stage1": rows("train", "asr")}
    found["sft"] = [ask_row(row, training_question(scene, rng), rng)
                    for scene, row in clips["train"] for _ in range(N_QUESTIONS)]
    pairs = [row | {"chosen": row["target"]} for row in found["sft"] if row["rejected"]]
    found["preference"] = rng.permutation(pairs)[:N_PAIRS].tolist()
    found["validation"] = []
    for type in TYPES:
        shuffled = rng.permutation(rows("validation", type)).tolist()
        found["validation"] += shuffled if type == "asr" else shuffled[:N_PER_TYPE]
    found["test"] = [row for type in TYPES for row in rows("test", type)]
    if "held_out" in clips:  # `who` cannot be asked about someone whom training never showed
        found["held_out"] = [row for type in TYPES if type != "who"
                             for row in rows("held_out", type)]
    return found


def into_splits(recordings: list[Recording], hold_out: str | None) -> dict[str, dict]:
    """The recordings of each split, as `by_speaker` gives them. Raises UserError."""
    speakers = sorted({r.speaker for r in recordings})
    require(hold_out is None or hold_out in speakers, f"--hold-out {hold_out}: expected one of the "
            f"speakers here, which are {', '.join(speakers)}")
    known = [r for r in recordings if r.speaker != hold_out]
    other = [r for r in recordings if r.speaker == hold_out]
    require(known, f"--hold-out {hold_out}: expected another speaker to train on, got none")
    return {name: by_speaker(other if name == "held_out" else known, split.takes)
            for name, split in SPLITS.items() if name != "held_out" or hold_out}


def main(argv: list[str]) -> None:
    parser = corpus.parser_of(__doc__, "fsdd")
    parser.add_argument("--hold-out", metavar="SPEAKER", help="a speaker to keep out of training")
    args = parser.parse_args(argv)
    found = read_recordings(corpus.find(args.source, args.out, ARCHIVE, place, check))
    splits = into_splits(found, args.hold_out)
    for name in MANIFESTS:  # of an earlier run: they would not fit the clips of this one
        (args.out / f"{name}.json").unlink(missing_ok=True)
    clips = {name: make_clips(args.out, pool, name, args.seed) for name, pool in splits.items()}
    corpus.write_manifests(args.out, manifests(clips, args.seed))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
