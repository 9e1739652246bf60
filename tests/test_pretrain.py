"""Stage 0: what stands in the audio's place says what the clip says, and the backbone starts by
looking beside."""

from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch

from data import toy
from diffa2_mini.config import SIZES, PretrainConfig
from diffa2_mini.llada import rotary, rotate
from diffa2_mini.model import Diffa2Model
from diffa2_mini.pretraining import backbone
from diffa2_mini.pretraining.backbone import (
    TextExample,
    embed,
    frames,
    gate,
    init_backbone,
    recall_loss,
    summarize,
)
from diffa2_mini.pretraining.encoder import LabelledClips, learning_rate
from diffa2_mini.weights import load_tokenizer

TOY = SIZES["toy"][0]
EXAMPLE = TextExample(["speech", "fast"], [("first", "three"), ("second", "one")], "asr",
                      "What is said?", "three one")


@pytest.fixture(scope="module")
def model():
    model = Diffa2Model(TOY)
    init_backbone(model.llada, torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("silences", [0, 3])
def test_frames_are_traits_and_items_with_their_ordinals_in_order_of_time(model, silences):
    tokenizer, silence = load_tokenizer(TOY), model.llada.wte.weight.mean(0)
    known = {
        "speech": embed(model, tokenizer, ["speech"])[0], "fast": embed(
            model, tokenizer, ["fast"])[0], "three": embed(
                model, tokenizer, ["first", "three"]).sum(0), "one": embed(
                    model, tokenizer, ["second", "one"]).sum(0), "": silence}
    lengths = set()
    for seed in range(20):
        rows = frames(model, tokenizer, EXAMPLE, silences, np.random.default_rng(seed))
        found = [next(word for word, x in known.items() if torch.allclose(row, x)) for row in rows]
        runs = [(word, len(list(group))) for word, group in groupby(found)]
        assert [word for word, _ in runs if word] == ["speech", "fast", "three", "one"]
        assert all(n <= (5 if word else silences) for word, n in runs)
        lengths.add(len(rows))
    assert len(lengths) > 5


def test_two_heads_of_the_first_block_start_by_looking_at_the_neighbours(model):
    block, config = model.llada.blocks[0], TOY.llada
    tokens = torch.randint(0, config.vocab_size, (4, 40),
                           generator=torch.Generator().manual_seed(1))
    x, turn = block.attn_norm(model.llada.wte(tokens)), rotary(
        torch.arange(40), config.width // config.n_heads, config.rope_theta)
    q, k = (rotate(proj(x).view(4, 40, config.n_heads, -1).transpose(1, 2), turn)
            for proj in (block.q_proj, block.k_proj))
    looked_at = (q @ k.transpose(-1, -2)).argmax(-1)[:, :2, 1:-1]  # [B, 2 heads, S - 2]
    offset = (looked_at - torch.arange(1, 39)).float()
    assert ((offset[:, 0] == -1).float().mean() > 0.9) and ((offset[:, 1] == 1).float().mean()
                                                            > 0.9)


def test_recall_costs_what_guessing_costs_before_it_is_learned(model):
    words = torch.arange(100, 160)
    config = PretrainConfig(backbone_batch=64)
    with torch.no_grad():
        loss = recall_loss(model.llada, words, 10, 5, config, torch.Generator().manual_seed(0))
    assert loss > np.log(config.recall_pairs)  # nothing is learned: no better than one of the four


def test_the_gate_counts_right_answers_by_type(model):
    tokenizer, rng = load_tokenizer(TOY), np.random.default_rng(0)
    examples = [toy.text_example(rng) for _ in range(20)]
    model.eval()
    one = gate(model, tokenizer, examples)
    assert set(one) == {example.type
                        for example in examples} and all(0 <= value <= 1 for value in one.values())
    empty = [replace(example, answer="") for example in examples]
    assert sum(gate(model, tokenizer, empty).values()) + sum(one.values()) <= len(one) * 1.0001
    assert summarize({"asr": 1.0, "count": 0.5, "count+abcd": 0.2}) == (0.75, 0.2)

    def says_two(model, tokenizer, audio_embeddings, prompts, decode):
        return torch.tensor([tokenizer.response("two", 16)] * len(prompts)), 1

    spaced = [replace(examples[0], answer=answer) for answer in (" two\n", "two", "tw o", "three")]
    assert gate(model, tokenizer, spaced, write=says_two) == {examples[0].type: 0.5}


def test_labels_stand_where_the_segments_are(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SPLITS", toy.SPLITS | {"stage0": (2, 1, 1)})
        clips = [row for _, row in toy.make_clips(tmp_path, "stage0", seed=0)]
    toy.write_json(tmp_path / "stage0.json", clips)
    labelled = LabelledClips.load(tmp_path / "stage0.json", TOY.audio, iter)
    for i, row in enumerate(clips):
        for segment in row["segments"]:
            middle = int((segment["start"] + segment["end"]) / 2 * 50)  # in encoder frames of 20 ms
            assert labelled.labels[labelled.item[i, middle] - 1] == segment["label"]
        said = [labelled.labels[item - 1] for item, _ in groupby(labelled.item[i].tolist()) if item]
        wanted = [segment["label"] for segment in row["segments"]]
        if wanted[0] in ("arpeggio", "chords"):  # notes may touch
            assert set(said) == set(
                wanted) and labelled.pitch[i].any() and not labelled.ordinal[i].any()
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
    every, some = (LabelledClips.load(tmp_path / "stage0.json", TOY.audio, iter, most)
                   for most in (10, 3))
    assert (len(every.mel), len(some.mel)) == (10, 4)
    assert torch.equal(some.mel, every.mel[::3]) and torch.equal(some.item, every.item[::3])
    assert (some.labels, some.trait_values) == (every.labels, every.trait_values)


def test_the_number_of_steps_bounds_every_phase(monkeypatch):
    """Of 1,500 held-out texts no more are asked than were learned from."""
    asked, steps = [], []

    def counted(examples, *args):
        asked.append(len(examples))
        return {"asr": 1.0}

    def watched(numbers, **named):
        for number in numbers:
            steps.append(named["desc"])
            yield number

    texts = [toy.text_example(np.random.default_rng(seed)) for seed in range(20)]
    monkeypatch.setattr(backbone, "gate", lambda model, tokenizer, *args: counted(*args))
    config = PretrainConfig(recall_steps=2, backbone_steps=2, silence_steps=2, backbone_batch=3)
    sample = lambda rng, evaluation: texts[rng.integers(len(texts))]  # noqa: E731
    for *_, accuracy in backbone.pretrain_backbone(Diffa2Model(TOY), load_tokenizer(TOY), sample,
                                                   config, 0, 0, watched):
        assert all(np.isnan(lettered) and plain == 1
                   for plain, lettered in map(summarize, accuracy.values()))
    assert asked == [6, 6] and (steps.count("recall"), steps.count("backbone")) == (2, 4)


def test_the_learning_rate_rises_in_a_line_and_falls_to_two_percent():
    rates = [learning_rate(step, 1000, 100) for step in range(1001)]
    assert rates[0] == 0.01 and rates[49] == 0.5 and max(rates) == 1 and rates[-1] == pytest.approx(
        0.02)
    assert all(a >= b for a, b in zip(rates[100:], rates[101:]))
