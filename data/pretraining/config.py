"""The numbers of stage 0, which stands in for the pretraining of Whisper and LLaDA. Not part of
DIFFA-2."""

import argparse
from dataclasses import dataclass, fields, replace

from diffa2_mini.errors import require


@dataclass(frozen=True)
class PretrainConfig:
    """Of encoder and backbone."""

    encoder_steps: int = 7500
    encoder_batch: int = 32
    encoder_lr: float = 2e-3
    mask_frames: int = 15  # SpecAugment (arXiv 1904.08779): two stretches of up to so many mel
    mask_mels: int = 8  # frames, and two bands of up to so many mel bins, are blanked
    recall_steps: int = 2500  # at most, of the exercise that comes before the texts
    recall_loss: float = 0.05  # nats, at which the exercise ends
    recall_pairs: int = 4
    backbone_steps: int = 5500
    backbone_batch: int = 32
    backbone_lr: float = 1e-3
    silence_steps: int = 1000  # more, with frames of silence among the others, as between words
    silence_lr: float = 3e-4
    silences: int = 3  # in a row, at most
    warmup: int = 100
    shortest_time: float = 0.3  # t is uniform from here to 1; the loss is not divided by t
    eos_weight: float = 0.1  # of every EOS but the first: they are easy and many
    letter_weight: float = 4.0  # of an answer's letter: hard, and one token among many
    n_held_out: int = 1500  # texts that it is asked at the end; before that a fifth of them
    noise: float = 0.3  # standard deviation, on embeddings of the description, whose own is 1
    workers: int | None = None  # processes that draw texts ahead; None: some for a GPU alone
    dtype: str = "float32"  # or "bfloat16": of the products; weights are in float32


PRETRAINING = {  # by size
    "toy": PretrainConfig(),
    "small": PretrainConfig(recall_steps=300, backbone_batch=64, backbone_steps=3700,
                            silence_steps=400, n_held_out=1000)}


def pretrain_config(args: argparse.Namespace) -> PretrainConfig:
    """The settings of `args.size`, with what the flags of train.py change in all phases. Raises
    UserError."""
    by_ending = {"steps": args.steps, "batch": args.batch_size, "lr": args.lr,
                 "warmup": args.warmup, "workers": args.workers}
    changes = {field.name: by_ending.get(field.name.split("_")[-1])
               for field in fields(PretrainConfig)}
    changes["dtype"] = None if args.dtype == "auto" else args.dtype
    require(args.dtype in ("auto", "float32", "bfloat16"),
            f"--stage 0 computes in float32 or bfloat16, got --dtype {args.dtype}")
    return replace(PRETRAINING[args.size],
                   **{name: value for name, value in changes.items() if value is not None})
