"""Manifests from people who read English: what they say, and whether a woman, a man, a girl or a
boy says it.

    python data/people.py                        # download the corpus, write data/people
    python data/people.py --source ~/speechocean762   # use a copy: WAVE, train and test

1,485 utterances of 250 speakers, at most 7 s each: a part of speechocean762, by Junbo Zhang and
others (openslr.org/101, github.com/jimbozhang/speechocean762), whose README allows commercial and
non-commercial use. Learners whose first language is Mandarin read them, so what is learnt here is
for teaching and nothing else. This repository contains none of it but the list of the utterances,
data/people_ids.txt. A copy may also be a folder with clips and a `people.jsonl`, whose objects have
audio, speaker, split (train or test), text, sex (woman or man) and age. The number of utterances
and of speakers is checked; nobody has told the hash of the archive yet.

A child is under 13; who is 13 to 17 is transcribed alone. The corpus has a test split, whose
speakers training never hears; one in ten of the others is for validation.
"""

import sys
from pathlib import Path

# so that this file runs as a script
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from data import corpus, toy_text
from data.kaldi import read_table
from data.librispeech import INSTRUCTIONS
from data.toy import ask_row
from data.toy_text import Question
from diffa2_mini.audio import duration
from diffa2_mini.config import DATA
from diffa2_mini.data import read_manifest
from diffa2_mini.errors import UserError, require

ARCHIVE = corpus.Archive("https://www.openslr.org/resources/101/speechocean762.tar.gz")
IDS = {*(DATA / "people_ids.txt").read_text().split()}  # of the utterances that are taken
TABLES = ("text", "utt2spk", "spk2age", "spk2gender")  # of each split, in Kaldi's format
N_SPEAKERS = 250
CHILD, ADULT = 13, 18  # years: a child is under the first, an adult at least the second
KINDS = ("woman", "man", "girl", "boy")
WORDINGS = ("Who speaks: a woman, a man, a girl or a boy?",
            "Is the speaker a woman, a man, a girl or a boy?",
            "Is this the voice of a woman, a man, a girl or a boy?")
VALIDATION = 0.1  # of the speakers of the train split
SHARE_LETTERED = 0.2
N_WHO = 3  # questions about who speaks per training clip
N_PAIRS = 480  # for preference


@dataclass(frozen=True)
class Utterance:
    path: Path
    speaker: str
    is_test: bool
    text: str
    kind: str  # one of KINDS, or empty from 13 to 17 years


def kind_of(is_woman: bool, age: int) -> str:
    if CHILD <= age < ADULT:
        return ""
    return KINDS[2 * (age < CHILD) + (not is_woman)]


def read_copy(source: Path) -> list[Utterance]:
    """The utterances of a folder with people.jsonl. Raises UserError, or what Python raises."""
    return [Utterance(source / row["audio"], row["speaker"], row["split"] == "test",
                      row["text"].lower(), kind_of(row["sex"] == "woman", row["age"]))
            for row in read_manifest(source / "people.jsonl")]


def read_corpus(source: Path) -> list[Utterance]:
    """The utterances of the corpus as it is published. Raises UserError, or what Python raises."""
    found = []
    for split in ("train", "test"):
        text, speakers, ages, sexes = (read_table(source / split / table) for table in TABLES)
        for name in sorted(IDS & {*text}):
            speaker = speakers[name]
            path = source / "WAVE" / f"SPEAKER{speaker}" / f"{name}.WAV"
            kind = kind_of(sexes[speaker] == "f", int(ages[speaker]))
            found.append(Utterance(path, speaker, split == "test", text[name].lower(), kind))
    return found


def read_people(source: Path) -> list[Utterance]:
    """The utterances that data/people_ids.txt lists, of a copy in either layout. Raises
    UserError."""
    is_copy = (source / "people.jsonl").is_file()
    try:
        found = (read_copy if is_copy else read_corpus)(source)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: expected speechocean762, got something else ({error!r}); get "
                        "it again") from None
    found = [each for each in found if each.path.stem in IDS and each.path.is_file()]
    n_speakers = len({each.speaker for each in found})
    require(len(found) == len(IDS) and n_speakers == N_SPEAKERS,
            f"{source}: expected the {len(IDS):,} utterances of people_ids.txt by {N_SPEAKERS} "
            f"speakers, got {len(found):,} by {n_speakers}; get it again")
    return sorted(found, key=lambda each: each.path.stem)


def place(path: PurePosixPath) -> PurePosixPath | None:
    """Where a file of the archive goes: the tables, and the utterances that are listed."""
    inside = PurePosixPath(*path.parts[1:])
    if inside.parts[:1] == ("WAVE",):
        return inside if inside.suffix == ".WAV" and inside.stem in IDS else None
    is_table = inside.parts[:-1] in (("train",), ("test",)) and inside.name in TABLES
    return inside if is_table else None


def transcribe(utterance: Utterance, rng: np.random.Generator) -> Question:
    return Question("asr", str(rng.choice(INSTRUCTIONS)), utterance.text, ())


def ask(utterance: Utterance, rng: np.random.Generator) -> Question:
    """Who speaks, of those with a `kind`, in a random wording. The type says whether an adult or a
    child does."""
    type = "adult" if utterance.kind in KINDS[:2] else "child"
    wrong = tuple(kind for kind in KINDS if kind != utterance.kind)
    return Question(type, str(rng.choice(WORDINGS)), utterance.kind, wrong)


def into_splits(people: list[Utterance], rng: np.random.Generator) -> dict[str, list[Utterance]]:
    """The utterances of each split; no speaker is in two."""
    known = sorted({each.speaker for each in people if not each.is_test})
    n_validation = max(1, round(VALIDATION * len(known)))
    validation = {known[i] for i in rng.permutation(len(known))[:n_validation]}
    splits = {"train": [], "validation": [], "test": []}
    for each in people:
        name = "test" if each.is_test else "validation" if each.speaker in validation else "train"
        splits[name].append(each)
    return splits


def manifests(splits: dict[str, list[Utterance]], out: Path, seed: int) -> dict[str, list[dict]]:
    """Every manifest, by name. Raises UserError."""
    rng = np.random.default_rng([seed, 99])

    def row(utterance: Utterance, question: Question) -> dict:
        path = utterance.path
        about = {"audio_id": path.stem, "speaker": utterance.speaker, "dataset": "people",
                 "audio_filepath": corpus.named_from(out, path), "domain": "speech",
                 "duration": duration(path), "transcription": utterance.text}
        return ask_row(about, question, rng)

    def transcripts(split: str) -> list[dict]:
        return [row(each, transcribe(each, rng)) for each in splits[split]]

    def who(split: str) -> list[dict]:
        return [row(each, ask(each, rng)) for each in splits[split] if each.kind]

    found = {"stage1": transcripts("train"), "sft": []}
    for each in splits["train"]:
        for _ in range(N_WHO if each.kind else 0):
            question = ask(each, rng)
            if rng.random() < SHARE_LETTERED:
                question = toy_text.lettered(question, rng)
            found["sft"].append(row(each, question))
    pairs = [pair | {"chosen": pair["target"]} for pair in who("train")]
    found["preference"] = rng.permutation(pairs)[:N_PAIRS].tolist()
    for split in ("validation", "test"):
        found[split] = transcripts(split) + who(split)
    return found


def main(argv: list[str]) -> None:
    args = corpus.parser_of(__doc__, "people").parse_args(argv)
    found = read_people(corpus.find(args.source, args.out, ARCHIVE, place, read_people))
    splits = into_splits(found, np.random.default_rng([args.seed, 98]))
    corpus.write_manifests(args.out, manifests(splits, args.out, args.seed))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
