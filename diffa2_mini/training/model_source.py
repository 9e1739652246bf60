"""Where a model comes from: a size of ours, a checkpoint, or what the authors published."""

import sys
from pathlib import Path
from typing import NamedTuple

from ..config import SIZES, Config
from ..errors import require
from ..published.sources import locate_all
from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, fingerprints_of


class Source(NamedTuple):
    """Where a model comes from."""

    config: Config
    trained: Checkpoint | None
    paths: dict[str, Path]  # of whisper and llada, and of diffa2 if there is no checkpoint
    fingerprints: dict[str, str]  # of whisper, llada and diffa2


def find_source(size: str | None = None, checkpoint: str | Path | None = None,
                sources: dict[str, str | None] | None = None, other_parts: bool = False) -> Source:
    """Where the model of a size or of a checkpoint is; `sources` as for `Diffa2.from_pretrained`.
    Raises UserError if something is missing, or if the checkpoint was trained on other frozen parts
    and `other_parts` are not allowed."""
    given = dict.fromkeys(("whisper", "llada", "diffa2")) | (sources or {})
    require(len(given) == 3, f"expected sources of whisper, llada and diffa2, got {list(given)}")
    published = given.pop("diffa2")
    require(not (published and checkpoint),
            "--diffa2 and --checkpoint exclude each other; choose one")
    if published or not (checkpoint or SIZES[size or "toy"][0].from_scratch):
        size = size or "full"
        paths = locate_all(given | {"diffa2": published}, size)
        return Source(SIZES[size][0], None, paths, fingerprints_of(paths))
    path = Path(checkpoint or locate_all({"diffa2": None}, size or "toy")["diffa2"])
    trained = checkpoints.load_checkpoint(path)
    found = trained.config.size
    require(size in (None, found), f"{path}: is of size {found}, not {size}; leave --size out")
    paths = locate_all(given, found)
    fingerprints = fingerprints_of(paths) | {"diffa2": checkpoints.fingerprint(trained.model)}
    if not other_parts:
        checkpoints.require_same_parts(path, trained, fingerprints)
    if not trained.fingerprints and any(given.values()):
        print(f"note: {path} does not tell which encoder and backbone it was trained on",
              file=sys.stderr)
    return Source(trained.config, trained, paths, fingerprints)
