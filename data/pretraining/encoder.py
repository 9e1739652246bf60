"""Stage 0, first half: pretrain the toy encoder, in the place of Whisper-large-v3.

Not part of DIFFA-2. It learns by predicting what its training clips are made of: for each frame
which item sounds, its ordinal, and its pitches; for the whole clip its traits. That uses the
alignment of the data, which real speech recognition does without. The heads that predict are thrown
away.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from data.pretraining.config import PretrainConfig
from data.pretraining.optimization import learning_rate, running_mean, update
from diffa2_mini.audio import encoder_frames, load_audio, log_mel
from diffa2_mini.command.script import progress
from diffa2_mini.config import AudioConfig
from diffa2_mini.data import read_manifest
from diffa2_mini.errors import require
from diffa2_mini.fast.device import DTYPES, autocast
from diffa2_mini.noise import seed_of, stream
from diffa2_mini.training.objective import adamw
from diffa2_mini.whisper import WhisperEncoder

N_ORDINALS = 5  # none, first, second, third, fourth
# what a manifest says of each thing that sounds, and of what type that is
SEGMENT = {"start": (int, float), "end": (int, float), "label": str, "ordinal": int,
           "pitches": list}
ENTRY = {"audio_filepath": str, "segments": list, "traits": dict}


def has(found, fields: dict[str, type]) -> bool:
    """Whether it is an object with all these fields, of these types."""
    return isinstance(found, dict) and all(isinstance(found.get(name), type)
                                           for name, type in fields.items())


def is_segment(found) -> bool:
    """Whether it says what a thing is, when it sounds, and its place among four at most or its
    pitch classes."""
    if not has(found, SEGMENT):
        return False
    return (0 <= found["start"] <= found["end"] < float("inf")
            and all(isinstance(pitch, int) and 0 <= pitch < 12 for pitch in found["pitches"])
            and (found["pitches"] or 0 <= found["ordinal"] < N_ORDINALS - 1))


def read_labelled(manifest: Path) -> list[dict]:
    """The entries of a stage-0 manifest. Raises UserError if one lacks its alignment."""
    rows = read_manifest(manifest)
    for i, row in enumerate(rows, start=1):
        complete = has(row, ENTRY) and all(isinstance(v, str) for v in row["traits"].values())
        require(complete and all(map(is_segment, row["segments"])),
                f"{manifest}: entry {i}: expected audio_filepath, traits and segments, each with "
                f"{', '.join(sorted(SEGMENT))}; data/toy.py and data/fsdd.py write such manifests")
    return rows


@dataclass
class LabelledClips:
    """The encoder's training data: n clips with their targets. Class 0 of a frame is `nothing
    sounds`."""

    mel: Tensor  # [n, n_mels, M] float16
    n_frames: Tensor  # [n] encoder frames that hold sound
    item: Tensor  # [n, T] class of what sounds
    ordinal: Tensor  # [n, T] 1 for the first item, ...; 0 in music, whose notes are not counted
    pitch: Tensor  # [n, T, 12] bool, pitch classes that sound
    traits: Tensor  # [n, number of traits], -1 where a clip does not have one
    labels: list[str]  # names of the items' classes, from 1 on
    trait_values: dict[str, list[str]]

    @classmethod
    def load(cls, manifest: Path, config: AudioConfig, most: int | None = None) -> "LabelledClips":
        """Read the clips of a stage-0 manifest; of many more than `most`, about so many from all
        over it. Raises UserError."""
        rows = read_labelled(manifest)
        labels = sorted({segment["label"] for row in rows for segment in row["segments"]})
        trait_values = {}
        for name, value in sorted({pair for row in rows for pair in row["traits"].items()}):
            trait_values.setdefault(name, []).append(value)
        if most:
            rows = rows[::max(1, len(rows) // most)]
        n, T = len(rows), config.max_frames // 2
        clips = cls(
            mel=torch.empty(n, config.n_mels, config.max_frames, dtype=torch.float16),
            n_frames=torch.empty(n, dtype=torch.long),
            item=torch.zeros(n, T, dtype=torch.long),
            ordinal=torch.zeros(n, T, dtype=torch.long),
            pitch=torch.zeros(n, T, 12, dtype=torch.bool),
            traits=torch.full((n, len(trait_values)), -1),
            labels=labels, trait_values=trait_values)
        for i, row in enumerate(progress(rows, desc="reading clips")):
            samples = load_audio(manifest.parent / row["audio_filepath"], config.sample_rate,
                                 config.max_seconds)
            clips.mel[i] = log_mel(samples, config)
            clips.n_frames[i] = encoder_frames(len(samples), config)
            clips.label(i, row, config)
        return clips

    def label(self, i: int, row: dict, config: AudioConfig) -> None:
        """Write the targets of clip i, of which `row` is the entry."""
        per_second = config.sample_rate / config.hop_length / 2  # encoder frames
        for segment in row["segments"]:
            span = slice(round(segment["start"] * per_second), round(segment["end"] * per_second))
            self.item[i, span] = 1 + self.labels.index(segment["label"])
            self.ordinal[i, span] = 0 if segment["pitches"] else segment["ordinal"] + 1
            self.pitch[i, span, segment["pitches"]] = True
        for j, (name, found) in enumerate(self.trait_values.items()):
            if name in row["traits"]:
                self.traits[i, j] = found.index(row["traits"][name])


def make_heads(width: int, clips: LabelledClips) -> nn.ModuleDict:
    """What predicts the targets from the encoder's final hidden state."""
    sizes = {"item": 1 + len(clips.labels), "ordinal": N_ORDINALS, "pitch": 12}
    heads = {name: nn.Linear(width, size) for name, size in sizes.items()}
    traits = [nn.Linear(width, len(found)) for found in clips.trait_values.values()]
    return nn.ModuleDict(heads | {"traits": nn.ModuleList(traits)})


def encoder_loss(final: Tensor, heads: nn.ModuleDict, clips: LabelledClips,
                 at: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of the clips numbered `at` [B], whose final hidden states are [B, T, E]; and how
    many of the frames that sound have both item and ordinal right, from 0 to 1."""
    targets = (clips.item, clips.ordinal, clips.pitch, clips.traits, clips.n_frames)
    item, ordinal, pitch, traits, n_frames = (x[at].to(final.device) for x in targets)
    item_logits, ordinal_logits = heads["item"](final), heads["ordinal"](final)  # [B, T, classes]
    loss = F.cross_entropy(item_logits.transpose(1, 2), item)
    loss = loss + F.cross_entropy(ordinal_logits.transpose(1, 2), ordinal)
    loss = loss + F.binary_cross_entropy_with_logits(heads["pitch"](final), pitch.float())
    inside = torch.arange(final.shape[1], device=final.device) < n_frames[:, None]  # [B, T]
    mean = (final * inside[:, :, None]).sum(1) / inside.sum(1, keepdim=True)  # [B, E]
    for j, head in enumerate(heads["traits"]):
        target = traits[:, j]
        if (target >= 0).any():
            loss = loss + F.cross_entropy(head(mean), target, ignore_index=-1)
    right = (item_logits.argmax(-1) == item) & (ordinal_logits.argmax(-1) == ordinal)
    return loss, right[item > 0].float().mean()


def spec_augment(mel: Tensor, config: PretrainConfig, rng: np.random.Generator) -> Tensor:
    """SpecAugment (arXiv 1904.08779): blank two random stretches of time and two bands of frequency
    of each clip [B, n_mels, M]."""
    mel = mel.clone()
    _, n_mels, M = mel.shape
    for clip in mel:
        floor = clip.min()
        for _ in range(2):
            width = rng.integers(0, config.mask_frames + 1)
            height = rng.integers(0, config.mask_mels + 1)
            left, top = rng.integers(0, M - width), rng.integers(0, n_mels - height)
            clip[:, left:left + width] = floor
            clip[top:top + height] = floor
    return mel


def pretrain_encoder(encoder: WhisperEncoder, clips: LabelledClips, config: PretrainConfig,
                     seed: int, say: Callable = tqdm.write) -> None:
    """Train the encoder in place. Says now and then how many of the frames that sound are right."""
    torch.manual_seed(seed_of("encoder", seed))
    rng, device = stream("encoder", seed), encoder.conv1.weight.device
    heads = make_heads(encoder.config.width, clips).to(device)
    both = nn.ModuleDict({"encoder": encoder.requires_grad_(True), "heads": heads})
    parameters = dict(both.named_parameters())
    optimizer = adamw(parameters, config.encoder_lr, (0.9, 0.98), weight_decay=0.01)
    order, mean_loss, mean_right = [], 0.0, 0.0
    for step in progress(range(config.encoder_steps), desc="encoder"):
        while len(order) < config.encoder_batch:
            order += rng.permutation(len(clips.mel)).tolist()
        at, order = torch.tensor(order[:config.encoder_batch]), order[config.encoder_batch:]
        mel = spec_augment(clips.mel[at].float(), config, rng).to(device)
        with autocast(device, DTYPES[config.dtype]):
            loss, right = encoder_loss(encoder(mel)[0], heads, clips, at)
        factor = learning_rate(step, config.encoder_steps, config.warmup)
        update(optimizer, parameters.values(), loss, config.encoder_lr * factor)
        mean_loss = running_mean(mean_loss, loss.item())
        mean_right = running_mean(mean_right, right.item())
        if step % 100 == 99:
            say(f"encoder step {step + 1}: loss {mean_loss:.3f}, frames right {mean_right:.3f}")
    encoder.requires_grad_(False)
