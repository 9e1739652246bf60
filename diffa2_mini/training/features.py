"""What the frozen encoder makes of clips. As it is never trained, its hidden states can be kept: in
memory, or on disk.

Clips are encoded one at a time, so that what is kept is, bit for bit, what encoding again would
give.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data import load_clip
from ..errors import UserError, require
from ..model import Audio, Diffa2Model
from ..weights import save_tensors
from .processes import World

NAMES = ("final", "taps", "n_frames")  # fields of Audio


class FeatureCache:
    """Hidden states of clips by path. `keep` keeps them in memory; a `folder` keeps them there, for
    other runs too."""

    def __init__(self, model: Diffa2Model, device: torch.device, dtype: torch.dtype,
                 keep: bool = False, folder: Path | None = None):
        self.model, self.device, self.dtype, self.keep = model, device, dtype, keep
        self.folder = folder and folder / self.fingerprint()
        self.kept: dict[Path, Audio] = {}
        self.incomplete: dict[Path, str] = {}  # what clips lack that were heard nevertheless
        self.files: dict[Path, Path] = {}
        self.waited = 0.0  # seconds for the folder's disk, in all

    @property
    def keeps_features(self) -> bool:
        return self.keep or self.folder is not None

    def fingerprint(self) -> str:
        """Tells encoders apart: by their weights, their precision, their device, and what they are
        given to hear."""
        digest = hashlib.sha256(
            repr((self.model.config.audio, self.model.config.whisper, self.dtype,
                  self.device.type)).encode())
        for tensor in self.model.whisper.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def file_of(self, path: Path) -> Path:
        """Where the hidden states of a clip are kept. A clip that has changed before this run has
        another file."""
        if path not in self.files:
            about = path.stat()
            name = repr((str(path.resolve()), about.st_size, about.st_mtime_ns))
            self.files[
                path] = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
        return self.files[path]

    def encode(self, mel: Tensor, n_frames: int) -> Audio:
        """Hidden states of one clip, log-mel [n_mels, M], without the dimension of the batch."""
        audio = self.model.encode(mel[None].to(self.device, self.dtype),
                                  torch.tensor([n_frames], device=self.device))
        return Audio(audio.final[0], audio.taps[0], audio.n_frames[0])

    def listen(self, path: Path) -> Audio:
        """Hidden states of a clip, kept if any are."""
        if path in self.kept:
            return self.kept[path]
        if not self.folder:
            audio = self.embed_audio(path)
        else:
            audio = self.remembered(path) or self.write(path)
        if self.keep:
            self.kept[path] = audio
        return audio

    def embed_audio(self, path: Path) -> Audio:
        """Hidden states of a clip, from the file. If it is incomplete, that is noted."""
        note = partial(self.incomplete.__setitem__, path)
        return self.encode(*load_clip(path, self.model.config.audio, note))

    def remembered(self, path: Path) -> Audio | None:
        """What the folder holds of a clip; None if that is not there, or damaged."""
        began = time.perf_counter()
        try:
            with safe_open(self.file_of(path), "pt", str(self.device)) as file:
                audio = Audio(*map(file.get_tensor, NAMES))
                if line := (file.metadata() or {}).get("incomplete"):
                    self.incomplete[path] = line
            return audio
        except (OSError, SafetensorError):
            return None
        finally:
            self.waited += time.perf_counter() - began

    def write(self, path: Path) -> Audio:
        audio = self.embed_audio(path)
        metadata = {"incomplete": self.incomplete[path]} if path in self.incomplete else {}
        save_tensors(self.file_of(path), {name: getattr(audio, name) for name in NAMES}, metadata)
        return audio

    def prepare(self, paths: list[Path], progress: Callable, skip_broken: bool = False,
                world: World = World()) -> dict[Path, str]:
        """Encode ahead of time the clips that are to be kept and are not yet; for a folder, each
        process its share. Returns what is wrong with those that cannot be heard. Raises UserError
        if there is one that is not to be skipped, or if the folder's disk has too little space."""
        paths = list(dict.fromkeys(paths)) if self.keeps_features else []
        if self.folder:
            # before any look at what is there, which another may be about to change
            paths = paths[world.rank::world.size]
            missing = [path for path in paths if not self.file_of(path).exists()]
            self.check_space(sum(world.gather([len(missing)])))
            paths = paths if self.keep else missing
        paths, broken = [path for path in paths if path not in self.kept], []
        for path in progress(paths):
            try:
                self.listen(path)
            except UserError as error:
                if not skip_broken:
                    raise
                broken.append((path, str(error)))
        return dict(world.gather(broken))

    def check_space(self, n_clips: int) -> None:
        """Raise UserError unless the hidden states of so many clips fit on the folder's disk."""
        config = self.model.config.whisper
        size = n_clips * (len(config.taps) +
                          1) * config.n_positions * config.width * self.dtype.itemsize
        there = next(folder for folder in self.folder.absolute().parents if folder.exists())
        free = shutil.disk_usage(there).free
        require(
            size < free,
            f"--cache-audio {self.folder.parent}: expected {size / 2**30:.1f} GiB free for {n_clips:,} clips, "
            f"got {free / 2**30:.1f} GiB; choose another folder, or leave it out")

    def __call__(self, paths: list[Path], clips: list[tuple[Tensor, int]] | None = None) -> Audio:
        """Hidden states of clips, with the dimension of the batch. What is not kept is encoded from
        `clips`, log-mels [n_mels, M] with their numbers of frames, or else from the files."""
        audio_embeddings = [self.encode(*clip)
                            for clip in clips] if clips else [self.listen(path) for path in paths]
        return Audio(*(torch.stack([getattr(audio, name)
                                    for audio in audio_embeddings])
                       for name in NAMES))


class InterruptibleFeatures:
    """Ears that call `look` before each batch that they hear: it may raise something that ends a
    long measurement."""

    def __init__(self, features: FeatureCache, look: Callable):
        self.features, self.look, self.device, self.dtype = features, look, features.device, features.dtype

    def __call__(self, *asked) -> Audio:
        self.look()
        return self.features(*asked)
