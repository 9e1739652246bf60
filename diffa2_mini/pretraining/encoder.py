"""Stage 0, first half: pretrain the toy encoder, in the place of Whisper-large-v3, which comes as a
download.

Not part of DIFFA-2. It learns by predicting what its training clips are made of: for each frame
which item sounds, the how-manieth it is, and which pitches; for the whole clip its traits. That
uses the alignment of the data, which real speech recognition does without. The heads that predict
are thrown away.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..audio import encoder_frames, load_audio, log_mel
from ..config import AudioConfig, PretrainConfig
from ..data import read_manifest
from ..errors import require
from ..noise import seed_of, stream
from ..training.objective import adamw
from ..whisper import WhisperEncoder

N_ORDINALS = 5  # none, first, second, third, fourth
# what a manifest says of each thing that sounds
SEGMENT = {"start", "end", "label", "ordinal", "pitches"}


def learning_rate(step: int, n_steps: int, warmup: int) -> float:
    """Factor of the learning rate: up in a line, then down along a half cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


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
    def load(cls, manifest: Path, config: AudioConfig, progress: Callable,
             most: int | None = None) -> "LabelledClips":
        """Read the clips of a stage-0 manifest, whose entries have `segments` and `traits`; of many
        more than `most`, about so many from all over it. Raises UserError."""
        rows = read_manifest(manifest)
        for i, row in enumerate(rows, start=1):
            complete = isinstance(row, dict) and {"audio_filepath", "segments", "traits"
                                                  } <= set(row)
            require(
                complete and all(SEGMENT <= set(segment) for segment in row["segments"]),
                f"{manifest}: entry {i}: expected audio_filepath, traits and segments, each with "
                f"{', '.join(sorted(SEGMENT))}; data/toy.py and data/fsdd.py write such manifests")
        labels = sorted({segment["label"] for row in rows for segment in row["segments"]})
        values = {}
        for row in rows:
            for name, value in row["traits"].items():
                values.setdefault(name, set()).add(value)
        values = {name: sorted(found) for name, found in sorted(values.items())}
        rows = rows[::max(1, len(rows) // most)] if most else rows
        n, T = len(rows), config.max_frames // 2
        item, ordinal = torch.zeros(n, T, dtype=torch.long), torch.zeros(n, T, dtype=torch.long)
        pitch, traits = torch.zeros(n, T, 12, dtype=torch.bool), torch.full((n, len(values)), -1)
        mel = torch.empty(n, config.n_mels, config.max_frames, dtype=torch.float16)
        n_frames = torch.empty(n, dtype=torch.long)
        per_second = config.sample_rate / config.hop_length / 2  # encoder frames
        for i, row in enumerate(progress(rows)):
            samples = load_audio(manifest.parent / row["audio_filepath"], config.sample_rate,
                                 config.max_seconds)
            mel[i], n_frames[i] = log_mel(samples, config), encoder_frames(len(samples), config)
            for segment in row["segments"]:
                span = slice(round(segment["start"] * per_second), round(
                    segment["end"] * per_second))
                item[i, span] = 1 + labels.index(segment["label"])
                ordinal[i, span] = 0 if segment["pitches"] else segment["ordinal"] + 1
                pitch[i, span, segment["pitches"]] = True
            for j, (name, found) in enumerate(values.items()):
                if name in row["traits"]:
                    traits[i, j] = found.index(row["traits"][name])
        return cls(mel, n_frames, item, ordinal, pitch, traits, labels, values)


class EncoderHeads(nn.Module):
    """What predicts the targets from the encoder's final hidden state; thrown away after
    pretraining."""

    def __init__(self, width: int, clips: LabelledClips):
        super().__init__()
        self.item = nn.Linear(width, 1 + len(clips.labels))
        self.ordinal = nn.Linear(width, N_ORDINALS)
        self.pitch = nn.Linear(width, 12)
        self.traits = nn.ModuleList(
            nn.Linear(width, len(found)) for found in clips.trait_values.values())


def encoder_loss(final: Tensor, heads: EncoderHeads, clips: LabelledClips,
                 at: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of the clips numbered `at`, whose final hidden states are [B, T, E]; and the share
    of sounding frames whose item and ordinal are right."""
    item, ordinal, pitch, traits, n_frames = (x[at].to(final.device)
                                              for x in (clips.item, clips.ordinal, clips.pitch,
                                                        clips.traits, clips.n_frames))
    item_logits, ordinal_logits = heads.item(final), heads.ordinal(final)
    loss = F.cross_entropy(item_logits.transpose(1, 2), item) + F.cross_entropy(
        ordinal_logits.transpose(1, 2), ordinal)
    loss = loss + F.binary_cross_entropy_with_logits(heads.pitch(final), pitch.float())
    inside = torch.arange(final.shape[1], device=final.device) < n_frames[:, None]  # [B, T]
    mean = (final * inside[:, :, None]).sum(1) / inside.sum(1, keepdim=True)  # [B, E]
    for j, head in enumerate(heads.traits):
        target = traits[:, j]
        if (target >= 0).any():
            loss = loss + F.cross_entropy(head(mean), target, ignore_index=-1)
    right = (item_logits.argmax(-1) == item) & (ordinal_logits.argmax(-1) == ordinal)
    return loss, right[item > 0].float().mean()


def blank(mel: Tensor, config: PretrainConfig, rng: np.random.Generator) -> Tensor:
    """SpecAugment: blank two random stretches of time and two bands of frequency of each clip [B,
    n_mels, M]."""
    mel = mel.clone()
    for clip in mel:
        floor = clip.min()
        for _ in range(2):
            width, height = rng.integers(0, config.mask_frames + 1), rng.integers(
                0, config.mask_mels + 1)
            left, top = rng.integers(0, mel.shape[2] - width), rng.integers(
                0, mel.shape[1] - height)
            clip[:, left:left + width] = floor
            clip[top:top + height] = floor
    return mel


def pretrain_encoder(encoder: WhisperEncoder, clips: LabelledClips, config: PretrainConfig,
                     seed: int, progress: Callable):
    """Train the encoder in place. Yields (step, loss, frame accuracy) now and then."""
    torch.manual_seed(seed_of("encoder", seed))
    rng = stream("encoder", seed)
    device = encoder.conv1.weight.device
    heads = EncoderHeads(encoder.config.width, clips).to(device)
    both = nn.ModuleDict({"encoder": encoder.requires_grad_(True), "heads": heads})
    optimizer = adamw(dict(both.named_parameters()), config.encoder_lr, (0.9, 0.98), 0.01)
    parameters = list(both.parameters())
    order, loss_mean, right_mean = [], 0.0, 0.0
    for step in progress(range(config.encoder_steps)):
        while len(order) < config.encoder_batch:
            order += rng.permutation(len(clips.mel)).tolist()
        at = torch.tensor([order.pop(0) for _ in range(config.encoder_batch)])
        final, _ = encoder(blank(clips.mel[at].float(), config, rng).to(device))
        loss, right = encoder_loss(final, heads, clips, at)
        update(optimizer, parameters, loss,
               config.encoder_lr * learning_rate(step, config.encoder_steps, config.warmup))
        loss_mean, right_mean = 0.98 * loss_mean + 0.02 * loss.item(
        ), 0.98 * right_mean + 0.02 * right.item()
        if step % 100 == 99:
            yield step + 1, loss_mean, right_mean
    encoder.requires_grad_(False)


def update(optimizer: torch.optim.Optimizer, parameters: list, loss: Tensor, lr: float) -> None:
    """One step of the optimiser, gradients clipped to a norm of 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
