"""Manifests from the Free Spoken Digit Dataset: people who say digits, for the stages that the toy world serves too.

    python data/fsdd.py                                # download the recordings, write all of it into data/fsdd
    python data/fsdd.py --source ~/fsdd                # use a copy that has recordings/{digit}_{speaker}_{take}.wav
    python data/fsdd.py --hold-out george              # hear nothing of george in training, ask about him in held_out.json

The recordings are by Zohar Jackson and others, github.com/Jakobovski/free-spoken-digit-dataset, under CC BY-SA 4.0. The
clips made here are adapted from them, so the same licence holds for the clips. This repository contains neither.

A clip is 1 to 4 recordings of one speaker in a row. Takes 0-4 are the test split, by the convention of the data set;
we train on takes 5-44 and validate on 45-49. Training never sees a sequence of digits of validation or test: those
are `toy_text.held_out`, one sequence in five. Of a held-out speaker all takes are for testing.
"""

import argparse
import http.client
import re
import shutil
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that this file runs as a script

from data import toy_text
from data.toy import ask_row, write_json
from data.toy_sound import DIGITS, MAX_SECONDS, SAMPLE_RATE, Scene, Segment, shaped_noise
from diffa2_mini.audio import load_audio, resample
from diffa2_mini.config import ASSETS, UserError, require

URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz"
TIMEOUT = 30  # seconds without a byte
NAME = re.compile(r"([0-9])_([a-z]+)_([0-9]+)\.wav")  # digit, speaker, take

RATE = 8000  # Hz, of the recordings
LONGEST = 2.5  # seconds of a recording; then one digit fits into a clip at any speed
LOUDNESS, JITTER = 0.1, 3.0  # RMS of each recording, give or take so many dB
GAP, EDGE = (0.02, 0.25), (0.05, 0.30)  # seconds of silence between recordings, and before and after them
BANDS = np.log2([200, 900, 4000])  # Hz, where the equaliser has its three knobs
FFT_SIZE = 1 << 16  # longer than any clip
OCTAVES = np.log2(np.fft.rfftfreq(FFT_SIZE, 1 / SAMPLE_RATE) + 1)

TYPES = {"asr": 20, "count": 7, "first": 7, "last": 7, "who": 7}  # how often training asks them without letters
SHARE_LETTERED = 0.2  # of the questions in training; with the weights above a third of all is asr
N_QUESTIONS = 4  # per training clip
N_PAIRS = 480  # preference pairs
N_PER_TYPE = 40  # questions of each type in the validation set; asr is asked of all clips
MANIFESTS = ("stage0", "stage1", "sft", "preference", "validation", "test", "held_out")


@dataclass(frozen=True)
class Split:
    """How many clips there are, of which takes, and how far they are from the recordings."""

    clips: int
    takes: range
    evaluation: bool = True  # only sequences that training never sees
    factor: tuple[float, float] = (1.0, 1.0)  # of the playing speed, which moves pitch and formants along
    snr: tuple[float, float] = (20.0, 40.0)  # dB, of the voice to the noise
    tilt: float = 0.0  # dB, the most that a knob of the equaliser is turned up or down


TEST, TRAIN, VALIDATION, ANY = range(5), range(5, 45), range(45, 50), range(1_000_000)  # takes
SPLITS = {
    "stage0": Split(5000, TRAIN, evaluation=False, factor=(0.80, 1.25), snr=(10.0, 40.0), tilt=6.0),
    "train": Split(1800, TRAIN, evaluation=False, factor=(0.95, 1.05), tilt=3.0),
    "validation": Split(150, VALIDATION),
    "test": Split(300, TEST),
    "held_out": Split(200, ANY),
}
SAME_VOICE = (0.95, 1.05)  # factors at which a speaker can still be told by ear


@dataclass(frozen=True)
class Recording:
    name: str  # of its file, without .wav
    digit: int
    speaker: str
    take: int
    samples: np.ndarray  # at RATE, trimmed, with an RMS of LOUDNESS


Pool = dict[str, list[list[Recording]]]  # by speaker and digit


# ----------------------------------------------------------------------------------------------------- recordings


def download(folder: Path) -> Path:
    """Fetch the public copy into `folder`, unless it is there; only the recordings, and all of them or nothing."""
    if (folder / "recordings").is_dir():
        return folder
    print(f"downloading {URL}")
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            archive, unpacked = Path(temporary, "fsdd.tar.gz"), Path(temporary, "recordings")
            unpacked.mkdir()
            with urllib.request.urlopen(URL, timeout=TIMEOUT) as response, open(archive, "wb") as file:
                shutil.copyfileobj(response, file)
            with tarfile.open(archive) as tar:
                for member in tar:
                    *_, parent, name = ("", *member.name.split("/"))
                    if member.isfile() and parent == "recordings" and NAME.fullmatch(name):
                        member.name = name
                        tar.extract(member, unpacked, filter="data")
            unpacked.rename(folder / "recordings")
    except (OSError, http.client.HTTPException, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"could not download {URL} ({' '.join(str(error).split())}); get a copy elsewhere and name it "
                        "with --source DIR") from None
    return folder


def trim(x: np.ndarray) -> np.ndarray:
    """Cut off what is 30 dB below the loudest 10 ms on both ends but for 10 ms, and fade there."""
    window = RATE // 100
    power = np.convolve(x**2, np.ones(window), "same")
    loud = np.flatnonzero(power > 1e-3 * power.max())
    x = x[max(0, loud[0] - window) : loud[-1] + window]
    ramp = np.minimum(1, np.arange(1, len(x) + 1) / (window / 2))
    return x * ramp * ramp[::-1]


def read_recordings(source: Path) -> list[Recording]:
    """All recordings of a folder, or of its folder `recordings`."""
    folder = source / "recordings" if (source / "recordings").is_dir() else source
    require(folder.is_dir(), f"{source}: expected a folder with recordings, got none; check --source")
    recordings = []
    for path in sorted(folder.glob("*.wav")):
        if match := NAME.fullmatch(path.name):
            digit, speaker, take = int(match[1]), match[2], int(match[3])
            require(speaker in toy_text.NAMES, f"{path}: expected a speaker of {', '.join(toy_text.NAMES)}")
            x = load_audio(path, RATE, LONGEST)
            require(x.any(), f"{path}: expected a spoken digit, got silence; copy it again")
            x = trim(x)
            x = (x * (LOUDNESS / np.sqrt(np.mean(x**2)))).astype(np.float32)
            recordings.append(Recording(path.stem, digit, speaker, take, x))
    require(recordings, f"{source}: expected recordings/{{digit}}_{{speaker}}_{{take}}.wav, got none; check --source")
    return recordings


def select(recordings: list[Recording], takes: range) -> Pool:
    """The recordings of some takes, by speaker and digit; each speaker must have said each digit."""
    pool = {speaker: [[] for _ in DIGITS] for speaker in sorted({r.speaker for r in recordings})}
    for r in recordings:
        if r.take in takes:
            pool[r.speaker][r.digit].append(r)
    for speaker, digits in pool.items():
        for digit, found in enumerate(digits):
            require(found, f"expected {digit}_{speaker}_TAKE.wav with a take of {takes[0]}-{takes[-1]}, got none; "
                           "the copy is not complete")
    return pool


# ---------------------------------------------------------------------------------------------------------- clips


def equalise(x: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Turn three knobs: x [samples] with so many dB more at BANDS, a straight line between them, flat outside."""
    response = 10 ** (np.interp(OCTAVES, BANDS, gains) / 20)
    return np.fft.irfft(np.fft.rfft(x, FFT_SIZE) * response)[: len(x)]


def make_clip(pool: Pool, split: Split, rng: np.random.Generator) -> tuple[Scene, dict, np.ndarray, list[Segment]]:
    """A scene; the recordings that it is made of and their speed; the clip [samples], and where its digits are."""
    while True:
        speaker = str(rng.choice(list(pool)))
        takes = [pool[speaker][digit] for digit in rng.integers(10, size=rng.integers(1, 5))]
        chosen = [found[rng.integers(len(found))] for found in takes]
        factor = np.exp(rng.uniform(*np.log(split.factor)))
        ratio = Fraction(factor * RATE / SAMPLE_RATE).limit_denominator(40)  # `resample` takes a step for each 1/40
        rate = float(ratio * SAMPLE_RATE)  # Hz at which the recordings are played
        lead, trail, *gaps = rng.uniform(*np.transpose([EDGE, EDGE, GAP, GAP, GAP]))
        while sum(len(r.samples) for r in chosen) / rate + lead + trail + sum(gaps[: len(chosen) - 1]) > MAX_SECONDS - 0.01:
            chosen.pop()
        scene = Scene("speech", tuple(DIGITS[r.digit] for r in chosen), voice=speaker)
        if toy_text.held_out(scene) == split.evaluation:
            break

    at, pieces, segments = round(lead * rate), [np.zeros(round(lead * rate))], []
    for i, (r, silence) in enumerate(zip(chosen, [*gaps[: len(chosen) - 1], trail])):
        end = at + len(r.samples)
        segments.append(Segment(at / rate, end / rate, DIGITS[r.digit], i))
        pieces += [r.samples * 10 ** (rng.uniform(-JITTER, JITTER) / 20), np.zeros(round(silence * rate))]
        at = end + len(pieces[-1])
    clip = resample(np.concatenate(pieces), ratio.numerator, ratio.denominator)
    if split.tilt:
        clip = equalise(clip, rng.uniform(-split.tilt, split.tilt, size=3))

    # Noise between white (slope 0) and pink (slope 1), then a random loudness, as in the toy world.
    slope, voiced = rng.uniform(0, 1), sum(s.end - s.start for s in segments) * SAMPLE_RATE
    level = np.sqrt(np.sum(clip**2) / voiced) * 10 ** (-rng.uniform(*split.snr) / 20)
    clip = clip + level * shaped_noise(len(clip), lambda hertz: (hertz + 20) ** (-slope / 2), rng)
    clip *= 0.9 * 10 ** (-rng.uniform(0, 14) / 20) / np.abs(clip).max()
    made_of = {"recordings": [r.name for r in chosen], "factor": round(rate / RATE, 4)}
    return scene, made_of, clip.astype(np.float32), segments


def make_clips(folder: Path, recordings: list[Recording], split: str, seed: int) -> list[tuple[Scene, dict]]:
    """Write the clips of a split; returns each scene with the manifest fields that any stage needs."""
    from tqdm import tqdm

    pool, clips = select(recordings, SPLITS[split].takes), []
    for i in tqdm(range(SPLITS[split].clips), desc=f"making {split}", unit="clip", leave=False):
        rng = np.random.default_rng([seed, list(SPLITS).index(split), i])
        scene, made_of, samples, segments = make_clip(pool, SPLITS[split], rng)
        name = f"{split}_{i:05d}"
        soundfile.write(folder / "clips" / f"{name}.wav", samples, SAMPLE_RATE, subtype="PCM_16")
        row = {"audio_id": name, "audio_filepath": f"clips/{name}.wav", "dataset": "fsdd", "domain": "speech",
               "duration": len(samples) / SAMPLE_RATE, "transcription": " ".join(scene.items), **made_of}
        if split == "stage0":
            row["segments"] = [asdict(segment) for segment in segments]
            row["traits"] = {"speaker": scene.voice} if SAME_VOICE[0] <= row["factor"] <= SAME_VOICE[1] else {}
        clips.append((scene, row))
    return clips


# ------------------------------------------------------------------------------------------------------ manifests


def training_question(scene: Scene, rng: np.random.Generator) -> toy_text.Question:
    """A question of a random type, lettered or not."""
    while rng.random() < SHARE_LETTERED:
        question = toy_text.ask(str(rng.choice(("count", "first", "last"))), scene, rng)
        if len(question.wrong) > 1:
            return toy_text.lettered(question, rng)
    weights = np.array(list(TYPES.values()))
    return toy_text.ask(str(rng.choice(list(TYPES), p=weights / weights.sum())), scene, rng)


def all_questions(clips: list[tuple[Scene, dict]], types: list[str], rng: np.random.Generator) -> dict[str, list[dict]]:
    """Each of these questions about each clip, by type."""
    return {type: [ask_row(row, toy_text.ask(type, scene, rng), rng) for scene, row in clips] for type in types}


def make_manifests(source: Path | None, out: Path, hold_out: str | None = None, seed: int = 0) -> dict[str, list[dict]]:
    """Write all clips and manifests into `out`; returns the manifests by name."""
    require(seed >= 0, f"--seed must not be negative, got {seed}")
    try:
        (out / "clips").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: expected a folder to write to, got '{error.strerror}'; check --out") from None
    recordings = read_recordings(source or download(out))
    speakers = sorted({r.speaker for r in recordings})
    require(hold_out is None or hold_out in speakers,
            f"--hold-out {hold_out}: expected one of the speakers here, which are {', '.join(speakers)}")
    known = [r for r in recordings if r.speaker != hold_out]
    require(known, f"--hold-out {hold_out}: expected another speaker to train on, got none")
    for name in MANIFESTS:  # of an earlier run: they would not fit the clips of this one
        (out / f"{name}.json").unlink(missing_ok=True)

    clips = {split: make_clips(out, known, split, seed) for split in SPLITS if split != "held_out"}
    rng = np.random.default_rng([seed, 99])
    stage1 = [ask_row(row, toy_text.ask("asr", scene, rng), rng) for scene, row in clips["train"]]
    sft = [ask_row(row, training_question(scene, rng), rng) for scene, row in clips["train"] for _ in range(N_QUESTIONS)]
    pairs = [row | {"chosen": row["target"]} for row in sft if row["rejected"]]
    validation = all_questions(clips["validation"], list(TYPES), rng)
    some = {type: rows if type == "asr" else [rows[i] for i in rng.permutation(len(rows))[:N_PER_TYPE]]
            for type, rows in validation.items()}
    manifests = {
        "stage0": [row for _, row in clips["stage0"]],
        "stage1": stage1,
        "sft": sft,
        "preference": [pairs[i] for i in rng.permutation(len(pairs))[:N_PAIRS]],
        "validation": sum(some.values(), []),
        "test": sum(all_questions(clips["test"], list(TYPES), rng).values(), []),
    }
    if hold_out:  # `who` cannot be asked about someone never heard
        heard = make_clips(out, [r for r in recordings if r.speaker == hold_out], "held_out", seed)
        manifests["held_out"] = sum(all_questions(heard, [t for t in TYPES if t != "who"], rng).values(), [])
    for name, rows in manifests.items():
        write_json(out / f"{name}.json", rows)
    return manifests


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, metavar="DIR", help="a copy of the data set (default: download it)")
    parser.add_argument("--out", type=Path, default=ASSETS / "fsdd", help="where the data goes (default: data/fsdd)")
    parser.add_argument("--hold-out", metavar="SPEAKER", help="a speaker to keep out of training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        manifests = make_manifests(args.source, args.out, args.hold_out, args.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: " + ", ".join(f"{name} {len(rows)}" for name, rows in manifests.items()) + " rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
