"""The numbers of stage 0, which stands in for the pretraining of Whisper and LLaDA. Not part of
DIFFA-2."""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainConfig:
    """Of encoder and backbone."""

    encoder_steps: int = 3000
    encoder_batch: int = 32
    encoder_lr: float = 2e-3
    mask_frames: int = 15  # SpecAugment (arXiv 1904.08779): two stretches of up to so many mel
    mask_mels: int = 8  # frames, and two bands of up to so many mel bins, are blanked
    recall_steps: int = 2500  # at most, of the exercise that comes before the texts
    recall_loss: float = 0.05  # nats, at which the exercise ends
    recall_pairs: int = 4
    backbone_steps: int = 4000
    backbone_batch: int = 32
    backbone_lr: float = 1e-3
    silence_steps: int = 1000  # more, with frames of silence among the others, as between words
    silence_lr: float = 3e-4
    silences: int = 3  # in a row, at most
    warmup: int = 100
    shortest_time: float = 0.3  # t is uniform from here to 1; the loss is not divided by t
    eos_weight: float = 0.1  # of every EOS but the first: they are easy and many
    letter_weight: float = 4.0  # of an answer's letter: hard, and one token among many
    noise: float = 0.3  # standard deviation, on embeddings of the description, whose own is 1


def pretrain_config(args: argparse.Namespace) -> PretrainConfig:
    """The settings, with what the flags of train.py change in all phases."""
    changes = {"warmup": args.warmup}
    for name in ("encoder_steps", "recall_steps", "backbone_steps", "silence_steps"):
        changes[name] = args.steps
    for name in ("encoder_batch", "backbone_batch"):
        changes[name] = args.batch_size
    for name in ("encoder_lr", "backbone_lr", "silence_lr"):
        changes[name] = args.lr
    return PretrainConfig(**{name: value for name, value in changes.items() if value is not None})
