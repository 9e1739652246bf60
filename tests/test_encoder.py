"""The encoder's half of stage 0: its targets are where the manifest says."""

from itertools import groupby

import pytest
import torch

from data import toy
from data.pretraining.encoder import LabelledClips
from diffa2_mini.config import SIZES

TOY = SIZES["toy"][0]


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
