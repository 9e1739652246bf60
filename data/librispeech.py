"""LibriSpeech for stage 1 at full size: download, check, unpack, and write the manifests.

    python data/librispeech.py    # train-clean-100 and dev-clean: 6.7 GB, 106 hours
    python data/librispeech.py train-clean-360 train-other-500    # further sets, beside those there

Read speech with its text, by Vassil Panayotov and others (openslr.org/12), under CC BY 4.0. `train`
sets go into stage1.json, `dev` sets into validation.json, `test` sets into test.json. A download
that was cut off goes on where it was.
"""

import sys
from pathlib import Path

# so that this file runs as a script
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffa2_mini.command.script import begin, progress, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import http.client
from pathlib import PurePosixPath

import numpy as np

from data import corpus
from data.kaldi import read_table
from diffa2_mini.audio import duration
from diffa2_mini.command.script import Parser
from diffa2_mini.config import DATA, SIZES, AudioConfig
from diffa2_mini.errors import UserError, require

URL = "https://www.openslr.org/resources/12"
SETS = {  # GB to download, hours
    "dev-clean": (0.3, 5), "dev-other": (0.3, 5), "test-clean": (0.3, 5), "test-other": (0.3, 5),
    "train-clean-100": (6.4, 101), "train-clean-360": (23, 364), "train-other-500": (31, 497),
}
ENTRIES = {  # one of each manifest that training needs
    "stage1": '{"audio_filepath": "clip.wav", "transcription": "hello there"}',
    "sft": '{"audio_filepath": "clip.wav", "input": "How many speakers are there?", '
           '"target": "two"}',
    "preference": '{"audio_filepath": "clip.wav", "input": "Who laughs?", "chosen": "a child", '
                  '"rejected": "a man"}',
}
MEND = "check --url"  # what to do where a file cannot be had
N_VALIDATION = 300
INSTRUCTIONS = (
    "Please transcribe the audio to text.",
    "Transcribe the audio.",
    "Write down what is said.",
    "What is said in the audio?",
    "Transcribe the speech into text.",
    "Convert the speech to text.",
    "What does the speaker say?",
    "Write the words that you hear.",
    "Give a transcript of the recording.",
    "Please write out the spoken words.",
    "Turn this recording into text.",
    "Type what the speaker says.",
    "What words are spoken?",
    "Provide the transcription.",
    "Listen and write down every word.",
    "Please put the speech into writing.",
    "Recognise the speech in the audio.",
    "Could you transcribe this?",
    "Repeat in writing what is said.",
    "Give me the text of this audio.",
    "Note down the sentence that is spoken.",
    "Produce a written version of the speech.",
    "Transcribe what you hear.",
    "Which words does the recording contain?",
    "Write the spoken content as text.",
)


def checksums(url: str) -> dict[str, str]:
    """MD5 by file name, from the site. Raises UserError."""
    try:
        with corpus.fetch(corpus.Archive(f"{url}/md5sum.txt", MEND)) as response:
            lines = response.read().decode("ascii", errors="replace").splitlines()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url}: could not be reached ({corpus.one_line(error)}); check "
                        "the network or --url") from None
    return {name: md5 for md5, name in (line.split() for line in lines if len(line.split()) == 2)}


def below(name: str) -> corpus.Place:
    """Where a file of a set's archive goes, relative to the set's folder."""
    top = PurePosixPath("LibriSpeech", name)
    return lambda path: path.relative_to(top) if path.is_relative_to(top) else None


def rows_of(folder: Path, rng: np.random.Generator) -> list[dict]:
    """A manifest entry for each utterance below `folder`, in lower case; those longer than the
    model hears are left out. Raises UserError."""
    rows = []
    for transcript in progress(sorted(folder.rglob("*.trans.txt")), desc=f"reading {folder.name}",
                               unit="chapter", leave=False):
        for name, text in read_table(transcript).items():
            path = transcript.with_name(f"{name}.flac")
            seconds = duration(path)
            if seconds <= AudioConfig().max_seconds:
                rows.append({
                    "audio_id": name,
                    "audio_filepath": path.relative_to(folder.parent).as_posix(),
                    "transcription": text.lower(), "input": str(rng.choice(INSTRUCTIONS)),
                    "target": text.lower(), "dataset": folder.name, "type": "asr",
                    "domain": "speech", "duration": seconds})
    require(rows, f"{folder}: expected chapters with their .trans.txt, got none; delete it and "
            "start again")
    return rows


def prepare(sets: list[str], out: Path, url: str) -> None:
    """Download and unpack what is missing, and write the manifests. Raises UserError."""
    corpus.make_folder(out)
    missing = [name for name in sets if not (out / name).is_dir()]
    known = checksums(url) if missing else {}
    for name in missing:
        file = f"{name}.tar.gz"
        require(file in known,
                f"{url}/md5sum.txt: expected a checksum of {file}, got none; {MEND}")
        corpus.obtain(corpus.Archive(f"{url}/{file}", MEND, known[file]), out / name, below(name))
    rng, manifests = np.random.default_rng(0), {}
    for folder in sorted(path for path in out.iterdir() if path.name in SETS):
        kind = {"train": "stage1", "dev": "validation", "test": "test"}[folder.name.split("-")[0]]
        manifests.setdefault(kind, []).extend(rows_of(folder, rng))
    if "validation" in manifests:
        manifests["validation"] = rng.permutation(manifests["validation"])[:N_VALIDATION].tolist()
    corpus.write_manifests(out, manifests)


def prepared(size: str, numbers: list[int]) -> Path:
    """The folder that this script makes, on which a downloaded model is trained. Raises UserError
    that says what the first of the stages `numbers` without data needs."""
    folder = DATA / "librispeech"
    for number in numbers:
        name = SIZES[size][1][number].data
        how = ("python data/librispeech.py prepares LibriSpeech" if name == "stage1" else
               "data/README.md says where the authors' data comes from")
        require((folder / f"{name}.json").exists(), f"stage {number} of size {size} needs --data: "
                f"a manifest with entries such as {ENTRIES[name]}; {how}")
    return folder


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    listed = ", ".join(f"{name} ({gb:g} GB, {hours} h)" for name, (gb, hours) in SETS.items())
    parser.add_argument("sets", nargs="*", default=["train-clean-100", "dev-clean"], metavar="SET",
                        help=listed)
    parser.add_argument("--out", type=Path, default=DATA / "librispeech",
                        help="where the data goes (default: data/librispeech)")
    parser.add_argument("--url", default=URL, help="the site or a mirror of it")
    args = parser.parse_args(argv)
    unknown = [name for name in args.sets if name not in SETS]
    require(not unknown, f"expected sets of {', '.join(SETS)}, got {', '.join(unknown)}")
    prepare(args.sets, args.out, args.url.rstrip("/"))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
