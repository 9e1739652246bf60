"""Where all random numbers come from: a stream of them for each kind of use and key.

A stream depends on its kind and its key alone, so that batch size, number of processes and resuming
change nothing, and no two uses see the same numbers. NumPy's own seeds do not tell keys apart:
[42], [42, 0] and [42, 0, 0] are one stream, and so are [0, 1] and [2**32]; torch's generator on the
CPU reads the lowest 32 bits of its seed. So kind and key are spelled out as text, and its SHA-256
is the seed.
"""

import hashlib
import json

import numpy as np

KINDS = {  # what is drawn, and the key that decides it
    "order": "in which an epoch goes through the examples: seed, stage, epoch",
    "answers": "times and masks of training: seed, stage, epoch, example, which of its answers",
    "held-out answers": "likewise, where nothing is trained",
    "score": "masks that measure how noisy the score of stage 4 is: seed, stage",
    "dropout": "seed, stage, step, process",
    "weights": "of new adapters (stage 0) and new LoRA: seed, stage",
    "words": "of an answer, where there is a temperature: seed, answer, start of block, step",
    "places": "in which order an answer settles them, at random: likewise",
    "clips": "a part of the training clips: seed",
    "encoder": "pretraining: seed",
    "texts": "pretraining of the backbone, texts and noise: seed",
    "held-out texts": "seed",
    "backbone": "pretraining, weights and the exercise in recall: seed, which of them",
}


def seed_of(kind: str, *key: int | str) -> int:
    """A seed of 63 bits, for torch, that depends on one of KINDS and its key alone."""
    assert kind in KINDS, kind
    spelled = json.dumps([kind, *key]).encode()
    return int.from_bytes(hashlib.sha256(spelled).digest()[:8], "little") >> 1


def stream(kind: str, *key: int | str) -> np.random.Generator:
    """A generator whose numbers depend on one of KINDS and its key alone."""
    return np.random.default_rng(seed_of(kind, *key))
