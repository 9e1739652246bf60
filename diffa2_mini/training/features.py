"""The feature cache: hidden states of the frozen encoder, kept in memory or on disk.

The encoder is never trained, so that the hidden states of a clip are always the same. Clips are
encoded one at a time: a cached result is bit for bit what encoding the clip again would give. Where
the adapters read frames that hold sound alone, no others are kept, and these in float16.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from ..data import load_clip
from ..errors import UserError, require
from ..model import Audio, Diffa2Model
from .checkpoint import fingerprint
from .files import WriteError, save_tensors
from .processes import World

NAMES = ("final", "taps", "n_frames")  # fields of Audio
BLOCK = 2**25  # numbers in one piece of memory


class FeatureCache:
    """Hidden states of clips by path. `keep`: in memory; `folder`: on disk, for other runs too."""

    def __init__(self, model: Diffa2Model, device: torch.device, dtype: torch.dtype,
                 keep: bool = False, folder: Path | None = None):
        self.model, self.device, self.dtype, self.keep = model, device, dtype, keep
        self.keeps_features = keep or folder is not None
        self.folder = folder and folder / self.fingerprint()
        self.file_of = cache(self.find_file)  # a run looks at each clip once
        self.memory: dict[Path, Audio] = {}
        self.block = torch.empty(0)  # what is left of the last
        self.incomplete: dict[Path, str] = {}  # what is missing of clips that end early
        self.waited = 0.0  # total seconds of waiting for the disk

    def fingerprint(self) -> str:
        """Identifies the encoder: its weights, its configs, its dtype and its device."""
        config, weights = self.model.config, fingerprint(self.model.whisper.state_dict())
        about = (config.audio, config.whisper, self.dtype, self.device.type, weights)
        about += ("only sound",) * config.adapter.only_sound
        return hashlib.sha256(repr(about).encode()).hexdigest()[:16]

    def find_file(self, path: Path) -> Path:
        """Where a clip's hidden states are kept: in another file once the clip has changed."""
        status = path.stat()
        key = repr((str(path.resolve()), status.st_size, status.st_mtime_ns))
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def load(self, path: Path) -> tuple[Tensor, int]:
        """A clip's log-mel and number of frames. What it lacks is noted in `incomplete`."""
        note = partial(self.incomplete.__setitem__, path)
        return load_clip(path, self.model.config.audio, note)

    def encode(self, mel: Tensor, n_frames: int) -> Audio:
        """Hidden states of one clip, log-mel [n_mels, M], without a batch dimension."""
        return self.encode_together([(mel, n_frames)])[0]

    def encode_together(self, clips: list[tuple[Tensor, int]]) -> list[Audio]:
        """Hidden states of several clips, which may differ from `encode` by rounding."""
        mels, n_frames = torch.stack([mel for mel, _ in clips]), [n for _, n in clips]
        audio = self.model.encode(mels.to(self.device, self.dtype),
                                  torch.tensor(n_frames, device=self.device))
        rows = zip(audio.final, audio.taps, audio.n_frames)
        if self.model.config.adapter.only_sound:
            return [Audio(final[:n].half(), taps[:, :n].half(), each)
                    for n, (final, taps, each) in zip(n_frames, rows)]
        return [Audio(*row) for row in rows]

    def get(self, path: Path) -> Audio:
        """Hidden states of a clip: from memory, from disk, or encoded now and kept there. What an
        incomplete clip lacks is noted in `incomplete`."""
        if path in self.memory:
            return self.memory[path]
        audio = self.read(path) if self.folder else None
        if audio is None:
            audio = self.encode(*self.load(path))
            if self.folder:
                line = self.incomplete.get(path)
                save_tensors(self.file_of(path), vars(audio), {"incomplete": line} if line else {})
        if self.keep:
            audio = self.memory[path] = Audio(*map(self.copied, (audio.final, audio.taps)),
                                              audio.n_frames)
        return audio

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy in a large block: small tensors between those of the encoder, which come and go,
        would leave holes that take ten times as much memory."""
        n = tensor.numel()
        if n > len(self.block):
            self.block = tensor.new_empty(max(n, BLOCK))
        copy, self.block = self.block[:n].view_as(tensor).copy_(tensor), self.block[n:]
        return copy

    def read(self, path: Path) -> Audio | None:
        """Hidden states of a clip from the folder; None if they are not there, or damaged."""
        began = time.perf_counter()
        try:
            with safe_open(self.file_of(path), "pt", str(self.device)) as file:
                if line := (file.metadata() or {}).get("incomplete"):
                    self.incomplete[path] = line
                return Audio(*map(file.get_tensor, NAMES))
        except (OSError, SafetensorError):
            return None
        finally:
            self.waited += time.perf_counter() - began

    def prepare(self, paths: list[Path], progress: Callable, skip_broken: bool = False,
                world: World | None = None) -> dict[Path, str]:
        """Encode the clips that are to be kept and are not yet; with a folder, each process a part
        of them. `progress` wraps the list of paths. Returns what is wrong with clips that cannot be
        read. Raises UserError if one is and `skip_broken` is off, or if the disk is too small."""
        paths, broken = list(dict.fromkeys(paths)) if self.keeps_features else [], []
        world = world or World()
        if self.folder:
            # dealt out before looking which are there, as other processes change that
            paths = paths[world.rank::world.size]
            missing = [path for path in paths if not self.file_of(path).exists()]
            self.check_space(sum(world.gather([len(missing)])))
            paths = paths if self.keep else missing
        for path in progress([path for path in paths if path not in self.memory]):
            try:
                self.get(path)
            except UserError as error:
                require(skip_broken and not isinstance(error, WriteError), str(error))
                broken.append((path, str(error)))
        return dict(world.gather(broken))

    def check_space(self, n_clips: int) -> None:
        """Raise UserError unless the hidden states of `n_clips` clips fit on the folder's disk."""
        config = self.model.config.whisper
        n_numbers = (len(config.taps) + 1) * config.n_positions * config.width  # + 1: the final one
        n_bytes = 2 if self.model.config.adapter.only_sound else self.dtype.itemsize
        size = n_clips * n_numbers * n_bytes  # at most
        existing = next(folder for folder in self.folder.absolute().parents if folder.exists())
        free = shutil.disk_usage(existing).free
        require(size < free, f"--cache-audio {self.folder.parent}: expected {size / 2**30:.1f} GiB "
                f"free for {n_clips:,} clips, got {free / 2**30:.1f} GiB; choose another folder")

    def __call__(self, paths: list[Path], clips: list[tuple[Tensor, int]] | None = None) -> Audio:
        """Hidden states of a batch: of `clips`, log-mels [n_mels, M] with their numbers of frames,
        if given; else from what is kept or the files."""
        audios = [self.encode(*clip) for clip in clips] if clips else list(map(self.get, paths))
        if self.model.config.adapter.only_sound:
            audios = [self.padded(audio, max(len(each.final) for each in audios))
                      for audio in audios]
        return Audio(*(torch.stack([getattr(audio, name) for audio in audios]) for name in NAMES))

    def padded(self, audio: Audio, n: int) -> Audio:
        """Hidden states of one clip with zeros behind them, n frames in all."""
        behind = (0, 0, 0, n - len(audio.final))
        return Audio(F.pad(audio.final, behind).to(self.dtype),
                     F.pad(audio.taps, behind).to(self.dtype), audio.n_frames)
