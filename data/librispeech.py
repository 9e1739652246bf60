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

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib

import numpy as np

from data.toy import write_json
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
TRIES = 5  # of a connection that breaks
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


def fetch(url: str, start: int = 0):
    """Open a URL from byte `start` on; None if there is nothing from there on. Raises UserError if
    the server does not have it, and OSError if it may have it later."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if start and error.code == 416:
            return None
        if error.code == 429 or error.code >= 500:
            raise  # an OSError: worth another try
        raise UserError(
            f"{url}: expected a file, got '{error.code} {error.reason}'; check --url") from None


def receive(url: str, part: Path) -> None:
    """Fetch a file, or the rest of it, into `part`. Raises as `fetch` does, and UserError if the
    disk has no room for it."""
    start = part.stat().st_size if part.exists() else 0
    response = fetch(url, start)
    if response is None:  # all of it is there
        return
    with response:
        start = start if response.status == 206 else 0  # a server may not know ranges
        size = start + int(response.headers.get("Content-Length") or 0)
        free = shutil.disk_usage(part.parent).free
        require(free > 2 * size - start,
                f"{part.parent}: expected {(2 * size - start) / 1e9:.1f} GB of free space for "
                f"{part.stem} and what is in it, got {free / 1e9:.1f}; free some")
        shown = progress(total=size or None, initial=start, unit="B", unit_scale=True,
                         desc=f"downloading {part.stem}")
        with open(part, "ab" if start else "wb") as file, shown as bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size < size:
        raise OSError("the connection was closed")


def download(url: str, path: Path, md5: str) -> None:
    """Fetch a file, or the rest of it, and check its MD5. What has come so far is kept in
    `path`.part. Raises UserError."""
    part = path.with_name(f"{path.name}.part")
    for attempt in range(TRIES):
        try:
            receive(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
            require(attempt + 1 < TRIES, f"{url}: broke off {TRIES} times ({problem}); the same "
                    "command goes on from here")
            time.sleep(min(attempt, 3))
    digest = hashlib.md5()
    with open(part, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    if digest.hexdigest() != md5:
        part.unlink()
        raise UserError(f"{url}: expected the MD5 {md5}, got {digest.hexdigest()}; it was deleted, "
                        "download it again")
    part.rename(path)


def unpack(archive: Path, folder: Path) -> None:
    """Put what is in `LibriSpeech/NAME` of the archive into `folder`: all of it or nothing. Files
    and folders are all that is made, and below a folder of ours, whatever the archive says: the
    filter that tarfile has for that is missing before Python 3.10.12 and 3.11.4."""
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            top = Path(temporary).resolve()
            with tarfile.open(archive) as tar:
                for member in tar:
                    path = (top / member.name).resolve()
                    if not path.is_relative_to(top):
                        raise tarfile.TarError(f"{member.name} would be written elsewhere")
                    (path if member.isdir() else path.parent).mkdir(parents=True, exist_ok=True)
                    if member.isfile():
                        with tar.extractfile(member) as inside, open(path, "wb") as file:
                            shutil.copyfileobj(inside, file)
            (top / "LibriSpeech" / folder.name).rename(folder)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: could not be unpacked ({' '.join(str(error).split())}); "
                        "delete it and start again") from None


def checksums(url: str) -> dict[str, str]:
    """MD5 by file name, from the site."""
    try:
        with fetch(f"{url}/md5sum.txt") as response:
            lines = response.read().decode("ascii", errors="replace").splitlines()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: could not be reached ({' '.join(str(error).split())}); "
                        "check the network or --url") from None
    return {name: md5 for md5, name in (line.split() for line in lines if len(line.split()) == 2)}


def rows_of(folder: Path, rng: np.random.Generator) -> list[dict]:
    """A manifest entry for each utterance below `folder`, in lower case; those longer than the
    model hears are left out."""
    rows = []
    for transcript in progress(sorted(folder.rglob("*.trans.txt")), desc=f"reading {folder.name}",
                               unit="chapter", leave=False):
        for line in transcript.read_text(encoding="utf-8").splitlines():
            name, text = line.split(" ", 1)
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


def prepare(sets: list[str], out: Path, url: str, seed: int = 0) -> dict[str, int]:
    """Download and unpack what is missing, and write the manifests; returns how many rows each
    has."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out}: expected a folder to write to, got '{error.strerror}'; check --out") from None
    missing = [name for name in sets if not (out / name).is_dir()]
    known = checksums(url) if missing else {}
    for name in missing:
        archive = out / f"{name}.tar.gz"
        require(archive.name in known,
                f"{url}/md5sum.txt: expected a checksum of {archive.name}, got none; check --url")
        if not archive.exists():
            download(f"{url}/{archive.name}", archive, known[archive.name])
        unpack(archive, out / name)
        archive.unlink()
    rng, manifests = np.random.default_rng(seed), {}
    for folder in sorted(path for path in out.iterdir() if path.name in SETS):
        kind = {"train": "stage1", "dev": "validation", "test": "test"}[folder.name.split("-")[0]]
        manifests.setdefault(kind, []).extend(rows_of(folder, rng))
    if "validation" in manifests:
        manifests["validation"] = rng.permutation(manifests["validation"])[:N_VALIDATION].tolist()
    for name, rows in manifests.items():
        write_json(out / f"{name}.json", rows)
    return {name: len(rows) for name, rows in manifests.items()}


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
    counts = prepare(args.sets, args.out, args.url.rstrip("/"))
    print(f"{args.out}: " + ", ".join(f"{name}.json {n:,}" for name, n in counts.items()) + " rows")


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
