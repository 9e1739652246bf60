"""The range of every number that a user can give, by a flag or in the config of a checkpoint. All
are finite, so neither inf nor nan is in any."""

import dataclasses
from typing import Literal, get_args, get_origin

from .errors import require

MANY = 10**9  # an upper limit for counts
SEED = (0, 2**63 - 1)
RANGES = {  # name of the flag or field: (least, most)
    # flags alone
    "eval_every": (0, MANY), "save_every": (1, MANY), "sample_every": (1, MANY),
    "grad_accum": (1, 2**20), "limit": (1, MANY), "numbers": (0, 99), "processes": (1, 2**16),
    "record": (0.1, 3600), "runs": (1, MANY), "shuffle_options": SEED, "threads": (1, 1024),
    "workers": (0, 256), "clips": (1, MANY), "draws": (2, MANY), "seconds": (1, 30),
    # the front end and the encoder
    "sample_rate": (2000, 10**6), "n_fft": (2, 2**20), "hop_length": (1, 2**20),
    "n_mels": (1, 4096), "max_seconds": (1, 3600), "n_positions": (1, 2**20), "taps": (0, 1000),
    # all networks
    "width": (1, 2**20), "n_layers": (1, 1000), "n_heads": (1, 2**16), "hidden": (1, 2**20),
    "n_queries": (1, 2**16), "qformer_layers": (1, 1000), "qformer_hidden": (1, 2**20),
    "semantic_stride": (1, 2**10), "n_prompts": (0, 2**16), "vocab_size": (1, 2**24),
    "rope_theta": (1, 1e12), "norm_eps": (0, 1), "rank": (1, 2**16), "alpha": (0, 1e6),
    # text and decoding
    "response_multiple": (1, 2**16), "gen_length": (1, 2**16), "block_length": (1, 2**16),
    "factor": (1e-9, 1e6), "threshold": (0, 1), "eos_threshold": (0, 1), "revise": (0, 1),
    "temperature": (0, 1e6), "cfg": (0, 1e6),
    "refresh": (1, MANY), "seed": SEED, "steps": (1, MANY),
    # training
    "number": (1, 99), "lr": (1e-12, 10), "batch_size": (1, 2**24), "micro_batch": (1, 2**24),
    "epochs": (1, MANY), "warmup": (0, MANY), "lora_dropout": (0, 0.99), "betas": (0, 0.999999),
    "adapter_dropout": (0, 0.99), "weight_decay": (0, 10), "grad_clip": (1e-9, 1e9),
    "max_tokens": (1, MANY), "vrpo_beta": (0, 1e3), "vrpo_samples": (1, 2**16),
}


def out_of_range(name: str, value, whole: bool) -> str:
    """Empty if `value` is in the range of `name` (and `whole`), else as `from 1 to 8, got 0`."""
    least, most = RANGES[name]
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if is_number and least <= value <= most:
        return ""
    what = "a whole number " if whole and isinstance(value, float) else ""
    return f"{what}from {least} to {most}, got {value!r}"


class Ranged:
    """The base of dataclasses whose numbers and choices are checked. Raises UserError."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            types = get_args(field.type) or (field.type,)  # of int | None: (int, NoneType)
            value = getattr(self, field.name)
            name = field.name.replace("_", " ")
            if get_origin(field.type) is Literal:
                require(value in types, f"{name} must be {' or '.join(types)}, got {value!r}")
            is_absent = value is None and type(None) in types
            if is_absent or not {int, float} & {*types}:
                continue
            for number in value if isinstance(value, tuple) else (value,):
                wrong = out_of_range(field.name, number, whole=float not in types)
                require(not wrong, f"{name} must be {wrong}")
