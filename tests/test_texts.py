"""The texts of stage 0: what stands in the audio's place says what the clip says."""

from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch

from data.pretraining.backbone import init_backbone
from data.pretraining.config import PretrainConfig
from data.pretraining.texts import (
    Texts,
    as_sentence,
    embed,
    ids_of,
    like_audio,
    pairs_of,
    token_weights,
)
from data.toy import TextExample
from diffa2_mini.config import SIZES
from diffa2_mini.model import Diffa2Model
from diffa2_mini.published.sources import load_tokenizer

TOY = SIZES["toy"][0]
EXAMPLE = TextExample(["speech", "fast"], [("first", "three"), ("second", "one")], "asr",
                      "What is said?", "three one")


@pytest.fixture(scope="module")
def model():
    model = Diffa2Model(TOY)
    init_backbone(model.llada, torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("max_silences", [0, 3])
def test_traits_and_items_with_their_ordinals_come_in_order_of_time(model, max_silences):
    tokenizer = load_tokenizer(TOY)
    wte = model.llada.wte.weight.detach()
    known = {
        "speech": wte[ids_of(tokenizer, ["speech"])][0],
        "fast": wte[ids_of(tokenizer, ["fast"])][0],
        "three": wte[ids_of(tokenizer, ["first", "three"])].sum(0),
        "one": wte[ids_of(tokenizer, ["second", "one"])].sum(0),
        "": wte.mean(0),  # silence
    }
    lengths = set()
    for seed in range(20):
        described = like_audio(tokenizer, EXAMPLE, max_silences, np.random.default_rng(seed))
        pairs = pairs_of([described, as_sentence(tokenizer, EXAMPLE)], len(wte))
        rows, words = embed(model, pairs, [len(described), len(pairs) - len(described)])
        assert torch.equal(words, wte[ids_of(tokenizer, EXAMPLE.words())])
        found = [next(word for word, x in known.items() if torch.allclose(row, x)) for row in rows]
        runs = [(word, len(list(group))) for word, group in groupby(found)]
        assert [word for word, _ in runs if word] == ["speech", "fast", "three", "one"]
        assert all(n <= (5 if word else max_silences) for word, n in runs)
        lengths.add(len(rows))
    assert len(lengths) > 5


def test_the_letter_of_a_choice_counts_more_and_every_eos_but_the_first_less():
    tokenizer, config = load_tokenizer(TOY), PretrainConfig()
    response = torch.tensor([tokenizer.response("B. two", 8)])
    letter, eos = tokenizer.encode("B.")[0], tokenizer.eos_id
    weights, ends = token_weights(response, tokenizer, config)[0].tolist(), 0
    for token, weight in zip(response[0].tolist(), weights):
        ends += token == eos
        expected = config.letter_weight if token == letter else 1.0
        assert weight == pytest.approx(config.eos_weight if ends > 1 else expected)
    assert response[0, 0] == letter and ends > 1


def test_a_batch_depends_on_its_step_alone_and_processes_that_draw_ahead_change_nothing(model):
    pretrain = PretrainConfig(backbone_batch=8, backbone_steps=2)
    texts = Texts(TOY, pretrain, load_tokenizer(TOY), 0)
    two = replace(texts, pretrain=replace(pretrain, workers=2))
    ahead = [*two.batches(range(1, 4), torch.device("cpu"))]
    here = [*texts.batches(range(1, 4), torch.device("cpu"))]
    for one, two in zip(ahead, here, strict=True):
        assert one.prompts == two.prompts and torch.equal(one.response, two.response)
        for row, again in zip(one.audio_embeddings(model), two.audio_embeddings(model)):
            assert torch.equal(row, again)
    assert not torch.equal(here[0].response, here[1].response)
    # silence only after the first steps
    assert [bool((each.audio == len(model.llada.wte.weight)).any()) for each in here] == [
        False, True, True]
