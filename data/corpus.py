"""What the scripts share that prepare real recordings: downloading, unpacking, writing manifests.
data/orders.py, people.py and fsdd.py have one shape: read the recordings, put them into splits, ask
about them.

A download goes on where it broke off, or where an earlier run was stopped. Of an archive, files
alone are unpacked, below a folder of ours, and all that are wanted or none. The recordings are not
in this repository.
"""

import errno
import hashlib
import http.client
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data.toy import write_json
from diffa2_mini.command.script import Parser, progress
from diffa2_mini.config import DATA
from diffa2_mini.errors import UserError, require

TRIES = 5  # of a connection that breaks
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a file says that cannot grow
# where a file of an archive goes, relative to a folder of ours; None if it is not wanted
Place = Callable[[PurePosixPath], PurePosixPath | None]


@dataclass(frozen=True)
class Archive:
    """A .tar.gz to be downloaded. `md5` is None where nobody has told it."""

    url: str
    mend: str = "get a copy elsewhere and name it with --source DIR"  # if it cannot be had
    md5: str | None = None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def fetch(archive: Archive, start: int = 0):
    """Open an archive from byte `start` on; None if there is nothing from there on. Raises
    UserError if the server does not have it, and OSError if it may have it later."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        return urllib.request.urlopen(urllib.request.Request(archive.url, headers=headers),
                                      timeout=60)
    except urllib.error.HTTPError as error:
        if start and error.code == 416:
            return None
        if error.code == 429 or error.code >= 500:
            raise  # an OSError: worth another try
        raise UserError(f"{archive.url}: expected a file, got '{error.code} {error.reason}'; "
                        f"{archive.mend}") from None


def receive(archive: Archive, part: Path) -> None:
    """Fetch an archive, or the rest of it, into `part`. Raises as `fetch` does, and UserError if
    the disk has no room for it."""
    start = part.stat().st_size if part.exists() else 0
    response = fetch(archive, start)
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


def download(archive: Archive, path: Path) -> None:
    """Fetch an archive, or the rest of it, and check its MD5, if that is known. What has come so
    far is kept in `path`.part. Raises UserError."""
    part = path.with_name(f"{path.name}.part")
    for attempt in range(TRIES):
        try:
            receive(archive, part)
            break
        except (OSError, http.client.HTTPException) as error:
            require(getattr(error, "errno", None) not in FULL,
                    f"{part}: could not be written ({one_line(error)}); free some space")
            require(attempt + 1 < TRIES, f"{archive.url}: broke off {TRIES} times "
                    f"({one_line(error)}); the same command goes on from here, or {archive.mend}")
            time.sleep(min(attempt, 3))
    digest = hashlib.md5()
    with open(part, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    if archive.md5 not in (None, digest.hexdigest()):
        part.unlink()
        raise UserError(f"{archive.url}: expected the MD5 {archive.md5}, got "
                        f"{digest.hexdigest()}; it was deleted, download it again")
    part.rename(path)


def unpack(path: Path, folder: Path, place: Place) -> None:
    """Put the files of an archive where `place` says, relative to `folder`, or nowhere if it says
    None. Nothing but files is made, whatever the archive says: the filter that tarfile has for that
    is missing before Python 3.10.12 and 3.11.4. Raises UserError if it is damaged, if a file would
    be written elsewhere, or if none is wanted."""
    top = folder.resolve()
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                where = place(PurePosixPath(member.name)) if member.isfile() else None
                if where is None:
                    continue
                target = (top / where).resolve()
                if not target.is_relative_to(top):
                    raise tarfile.TarError(f"{member.name} would be written elsewhere")
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as inside, open(target, "wb") as file:
                    shutil.copyfileobj(inside, file)
        if not folder.is_dir():
            raise tarfile.TarError("it has none of the files that are wanted")
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        is_full = getattr(error, "errno", None) in FULL
        advice = "free some space" if is_full else "delete it and start again"
        raise UserError(f"{path}: could not be unpacked ({one_line(error)}); {advice}") from None


def obtain(archive: Archive, folder: Path, place: Place,
           check: Callable[[Path], object] = lambda folder: None) -> Path:
    """The folder with the files that `place` keeps of an archive, downloaded unless it is there.
    `check` raises UserError if they are not what was expected: then nothing is kept."""
    if folder.is_dir():
        return folder
    path = folder.with_name(f"{folder.name}.tar.gz")
    if not path.exists():
        download(archive, path)
    unpacked = folder.with_name(f"{folder.name}.unpacking")
    shutil.rmtree(unpacked, ignore_errors=True)  # what was left where unpacking was killed
    try:
        unpack(path, unpacked, place)
        path.unlink()
        check(unpacked)
        unpacked.rename(folder)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return folder


def make_folder(out: Path) -> None:
    """Make a folder for data, or raise UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out}: expected a folder to write to, got '{error.strerror}'; check --out") from None


def find(source: Path | None, out: Path, archive: Archive, place: Place,
         check: Callable[[Path], object]) -> Path:
    """The folder with a corpus: `source`, or else what `obtain` puts into `out`, which is made.
    Raises UserError."""
    require(source is None or source.is_dir(),
            f"{source}: expected a folder with recordings, got none; check --source")
    make_folder(out)
    return source or obtain(archive, out / "recordings", place, check)


def named_from(out: Path, path: Path) -> str:
    """How a manifest in `out` names a clip: relative if it is in there, else as it is."""
    path, out = path.resolve(), out.resolve()
    return (path.relative_to(out) if path.is_relative_to(out) else path).as_posix()


def write_manifests(out: Path, manifests: dict[str, list[dict]]) -> None:
    """Write each manifest, and print how many rows each has. Raises UserError when the disk is
    full."""
    for name, rows in manifests.items():
        write_json(out / f"{name}.json", rows)
    counts = (f"{name}.json {len(rows):,}" for name, rows in manifests.items())
    print(f"{out}: {', '.join(counts)} rows")


def parser_of(doc: str, name: str) -> Parser:
    """The command line that the scripts share; `name` is that of their data's folder."""
    parser = Parser(doc)
    parser.add_argument("--source", type=Path, metavar="DIR",
                        help="a copy of the data set (default: download it)")
    parser.add_argument("--out", type=Path, default=DATA / name,
                        help=f"where the data goes (default: data/{name})")
    parser.add_argument("--seed", type=int, default=0)
    return parser
