"""Random streams: each use has one of its own, which depends on its key and on nothing else."""

import re
from itertools import product

import numpy as np
import torch
from mini import ROOT

from diffa2_mini.noise import KINDS, seed_of, stream


def test_a_stream_depends_on_its_key_alone():
    drawn = stream("answers", 42, 3, 7, 1, 0).random(16)
    np.random.seed(1), torch.manual_seed(1)
    assert (stream("answers", 42, 3, 7, 1, 0).random(16) == drawn).all()


def test_no_two_kinds_and_no_two_keys_share_a_stream():
    """Nor keys of other lengths, with zeros behind, numbers of two words, or the same digits: most
    of which NumPy's own seeds take for one."""
    numbers = [0, 1, 42, 420, 2**32, 2**32 + 1, 2**63 - 1, "0", "1, 0"]
    keys = [key for length in range(4) for key in product(numbers, repeat=length)]
    seeds = {seed_of(kind, *key) for kind in KINDS for key in keys}
    assert len(seeds) == len(KINDS) * len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    plain, longer = (np.random.default_rng(key).random() for key in ([42, 0], [42, 0, 0]))
    assert plain == longer  # why


def test_seeds_that_torch_takes_for_one_are_told_apart():
    def drawn(seed):
        return torch.rand(3, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(42), drawn(42 + 2**32))
    one, other = (drawn(seed_of("weights", seed, 0)) for seed in (42, 42 + 2**32))
    assert not torch.equal(one, other)


def test_whatever_a_seed_decides_comes_from_here():
    """Outside of noise.py a generator is given, or has a constant seed. What makes the clips in
    data/ has its own, or the clips would change."""
    files = [*(ROOT / "diffa2_mini").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py",
             *(ROOT / "tutorials").glob("claims*.py")]
    makes = re.compile(r"(default_rng|manual_seed|RandomState|SeedSequence)\((?!0\)|seed_of\()")
    found = {path.name: makes.findall(path.read_text(encoding="utf-8")) for path in files}
    kept = {"benchmarks.py"}  # files of answers hold the orders of choices that its seeds make
    assert {name for name, uses in found.items() if uses} <= kept
