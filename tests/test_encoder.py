"""The encoder's half of stage 0: its targets are where the manifest says."""

from itertools import groupby

import pytest
import torch

from data import toy
from data.pretraining.encoder import LabelledClips, encoder_loss
from diffa2_mini.config import SIZES

TOY = SIZES["toy"][0]


def test_the_loss_of_perfect_heads_is_zero_and_of_wrong_ones_is_not():
    rng = torch.Generator().manual_seed(0)
    item, ordinal = (torch.randint(n, (2, 6), generator=rng) for n in (3, 5))
    pitch, traits = torch.rand(2, 6, 12, generator=rng) < 0.3, torch.tensor([[0, -1], [1, 0]])
    clips = LabelledClips(None, torch.tensor([4, 6]), item, ordinal, pitch, traits, [], {})

    def one_hot(classes, n):
        return 50 * torch.nn.functional.one_hot(classes, n).float()

    # a state [22] of a frame spells its targets; at padding, which no trait reads, wrong traits
    of_clip = torch.cat([one_hot(each, 2) for each in traits.clamp(min=0).T], 1)  # [2, 4]
    spelled = of_clip[:, None].repeat(1, 6, 1)  # [2, 6, 4]
    spelled[0, 4:] = 200 - 8 * spelled[0, 4:]
    final = torch.cat([one_hot(item, 3), one_hot(ordinal, 5), 100 * pitch.float() - 50, spelled], 2)
    heads = {"item": lambda x: x[..., :3], "ordinal": lambda x: x[..., 3:8],
             "pitch": lambda x: x[..., 8:20],
             "traits": [lambda x: x[..., 20:22], lambda x: x[..., 22:]]}
    at = torch.tensor([1, 0])
    loss, right = encoder_loss(final[at], heads, clips, at)
    assert loss < 1e-6 and right == 1
    for name in ("item", "ordinal", "pitch"):
        def late(x, head=heads[name]):
            return head(x).roll(1, dims=1)
        assert encoder_loss(final[at], heads | {name: late}, clips, at)[0] > 1
    swapped = heads | {"traits": heads["traits"][::-1]}
    assert encoder_loss(final[at], swapped, clips, at)[0] > 1


def test_labels_stand_where_the_segments_are(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SPLITS", toy.SPLITS | {"stage0": (2, 1, 1)})
        clips = [row for _, row in toy.make_clips(tmp_path, "stage0", seed=0)]
    toy.write_json(tmp_path / "stage0.json", clips)
    labelled = LabelledClips.load(tmp_path / "stage0.json", TOY.audio)
    for i, row in enumerate(clips):
        for segment in row["segments"]:
            middle = int((segment["start"] + segment["end"]) / 2 * 50)  # in encoder frames of 20 ms
            assert labelled.labels[labelled.item[i, middle] - 1] == segment["label"]
        said = [labelled.labels[item - 1] for item, _ in groupby(labelled.item[i].tolist()) if item]
        wanted = [segment["label"] for segment in row["segments"]]
        if wanted[0] in ("arpeggio", "chords"):  # notes may touch
            assert set(said) == set(wanted)
            assert labelled.pitch[i].any() and not labelled.ordinal[i].any()
        else:
            assert [word for word, _ in groupby(said)] == [word for word, _ in groupby(wanted)]
            assert labelled.ordinal[i].max() == len(wanted) and not labelled.pitch[i].any()
        for name, value in row["traits"].items():
            j = list(labelled.trait_values).index(name)
            assert labelled.trait_values[name][labelled.traits[i, j]] == value


def test_no_more_clips_are_read_than_are_learned_from(tmp_path):
    """But all of them say which labels there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SPLITS", toy.SPLITS | {"stage0": (4, 3, 3)})
        clips = [row for _, row in toy.make_clips(tmp_path, "stage0", seed=0)]
    toy.write_json(tmp_path / "stage0.json", clips)
    every, some = (LabelledClips.load(tmp_path / "stage0.json", TOY.audio, most)
                   for most in (10, 3))
    assert (len(every.mel), len(some.mel)) == (10, 4)
    assert torch.equal(some.mel, every.mel[::3]) and torch.equal(some.item, every.item[::3])
    assert (some.labels, some.trait_values) == (every.labels, every.trait_values)
