"""A few seconds of stage 1 with the shipped encoder and backbone: whatever the seed, the adapter
learns to hear."""

import pytest
import torch
from mini import train_here

from data import toy
from diffa2_mini import weights
from diffa2_mini.config import SIZES
from diffa2_mini.data import BatchDataset, Entry, load_examples
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.model import Audio
from diffa2_mini.noise import seed_of
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.training.checkpoint import load_checkpoint
from diffa2_mini.training.features import FeatureCache
from diffa2_mini.training.objective import answer_loss

CONFIG, STAGE = SIZES["toy"][0], SIZES["toy"][1][1]
N_CLIPS = 8
FLAGS = ["--stage", "1", "--steps", "60", "--batch-size", str(N_CLIPS), "--lr", "3e-3",
         "--warmup", "5", "--save-every", "100", "--sample-every", "100"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The world with eight spoken clips, and a question to validate on."""
    folder = tmp_path_factory.mktemp("clips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SPLITS", toy.SPLITS | {"train": (N_CLIPS, 0, 0),
                                                   "evaluation": (1, 0, 0)})
        patch.setattr(toy, "N_PAIRS", 4)
        toy.make_world(folder)
    return folder


@torch.no_grad()
def losses(clips, seed, checkpoint=None):
    """Of the transcripts, under noise that no training has, before or after training: given each
    clip, and given another."""
    torch.manual_seed(seed_of("weights", seed, 0))
    model = weights.build(CONFIG, llada=FastLlada).eval()
    if checkpoint:
        weights.restore(model, load_checkpoint(checkpoint).model, str(checkpoint))
    examples = load_examples(clips / "stage1.json", STAGE, CONFIG)
    dataset = BatchDataset(examples, 0, STAGE, CONFIG, load_tokenizer(CONFIG),
                           noise="held-out answers")
    features = FeatureCache(model, torch.device("cpu"), torch.float32, keep=True)
    batch = dataset[[Entry(epoch, i, i) for epoch in range(8) for i in range(N_CLIPS)]]
    batch = batch.encoded(features, features.device)
    own, n = batch.audio, int(batch.valid.sum())
    found = [float(answer_loss(model, batch, STAGE, n))]
    batch.audio = Audio(*(tensor.roll(1, dims=0) for tensor in vars(own).values()))
    return *found, float(answer_loss(model, batch, STAGE, n))


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long)
                                       for n in range(1, 10))])
def test_stage_1_learns_to_hear_eight_clips_within_seconds(seed, clips, tmp_path):
    before, _ = losses(clips, seed)
    train_here(clips, tmp_path, *FLAGS, "--seed", str(seed))
    after, other = losses(clips, seed, tmp_path / "stage1.safetensors")
    print(f"seed {seed}: {before:.3f} before, {after:.3f} after, {other:.3f} of another clip")
    # of seeds 0 to 9 after / before is 0.06 at most, after / other 0.07 (losses of 2.58 to 3.01,
    # 0.02 to 0.14, 1.96 to 2.59): python -m pytest -s -m "long or not long" tests/test_learning.py
    # on 2 cores of an AMD EPYC (family 25, model 17), at this commit
    assert after < before / 3 and after < other / 2
