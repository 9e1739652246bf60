"""Random numbers: one stream for each kind of use and each key.

A stream depends on its kind and key alone. So micro-batches, number of processes and resuming
change nothing, and no two uses share numbers. Plain seeds would not do. NumPy does not distinguish
[42], [42, 0] and [42, 0, 0], nor [0, 1] and [2**32]; torch's generator on the CPU reads only the
lowest 32 bits of its seed. So kind and key are written as text, and the seed is its SHA-256.
"""

import hashlib
import json

import numpy as np

KINDS = {  # what is drawn: the key that decides it
    "order": "of the examples in an epoch: seed, stage, epoch",
    "answers": "times and masks of training: seed, stage, epoch, example, which of its answers",
    "held-out answers": "the same, for a loss that trains nothing",
    "score": "masks that measure the variance of stage 4's margin: seed, stage",
    "dropout": "seed, stage, step, process",
    "weights": "of new adapters (stage 0) and new LoRA: seed, stage",
    "words": "of an answer, with a temperature: seed, answer, start of block, step",
    "places": "the order in which random remasking commits: the same",
    "clips": "which part of the training clips is used: seed",
    "encoder": "pretraining: seed",
    "texts": "pretraining of the backbone, texts and noise: seed, step; masks: the same, `masks`",
    "held-out texts": "seed",
    "backbone": "pretraining, weights and the exercise in recall: seed, which of them",
}


def seed_of(kind: str, *key: int | str) -> int:
    """A seed of 63 bits that depends on `kind`, one of KINDS, and `key` alone."""
    assert kind in KINDS, kind
    spelled = json.dumps([kind, *key]).encode()
    return int.from_bytes(hashlib.sha256(spelled).digest()[:8], "little") >> 1


def stream(kind: str, *key: int | str) -> np.random.Generator:
    """A generator whose numbers depend on `kind` and `key` alone."""
    return np.random.default_rng(seed_of(kind, *key))
