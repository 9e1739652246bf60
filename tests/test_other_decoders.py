"""Rules of decoding from the literature: what each commits, and that the package's own, in the same
loop, gives its tokens."""

from collections import Counter
from functools import partial

import pytest
import torch
from test_data import MICRO, examples, features_of  # noqa: F401  (a fixture)

from diffa2_mini.config import ACOUSTIC_AND_SEMANTIC
from diffa2_mini.decode import finished
from diffa2_mini.evaluate.answers import Respondent
from diffa2_mini.fast.state import DecodingState
from diffa2_mini.model import Diffa2Model
from diffa2_mini.published.sources import load_tokenizer
from tutorials import other_decoders
from tutorials.other_decoders import RULES, beside, credit_decoding, local_leap, prophet

TOKENIZER = load_tokenizer(MICRO)
EVERY = torch.ones(1, 8, dtype=torch.bool)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Diffa2Model(MICRO).eval()


def state_of(model, examples):  # noqa: F811
    audio = features_of(model, True)([each.path for each in examples])
    prompts = [TOKENIZER.prompt("", each.instruction) for each in examples]
    embeddings = model.embed_audio(audio, ACOUSTIC_AND_SEMANTIC)
    return DecodingState(model, embeddings, prompts, [16] * len(prompts), TOKENIZER.mask_id)


def logits_of(confidence):
    """Logits [1, R, 3] whose best token, number 1, has these probabilities."""
    p = torch.tensor(confidence)
    return torch.stack([(1 - p) / 2, p, (1 - p) / 2], -1).log()[None]


def test_the_packages_rule_in_this_loop_gives_its_tokens(model, examples):  # noqa: F811
    for name, changes in (("factor 0.5", {"factor": 0.5}),
                          ("threshold 0.9", {"factor": None, "threshold": 0.9})):
        decode = MICRO.decode.__class__(gen_length=16, block_length=16, steps=16, **changes)
        respond = partial(Respondent, features_of(model, True), TOKENIZER, ACOUSTIC_AND_SEMANTIC,
                          decode)
        counts = Counter()
        by_rule = respond(partial(other_decoders.counted, RULES[name], counts)).answer(examples)
        assert by_rule == respond().answer(examples)
        assert 0 < counts["tokens"] <= 16 * len(examples) and counts["passes"] >= len(examples)


@torch.no_grad()
@pytest.mark.parametrize("name", RULES)
def test_each_rule_fills_in_every_answer(name, model, examples):  # noqa: F811
    tokens, passes = RULES[name](state_of(model, examples), eos_id=TOKENIZER.eos_id)
    filled = (tokens != TOKENIZER.mask_id).all(1)
    assert (filled | finished(tokens, TOKENIZER.mask_id, TOKENIZER.eos_id)).all()
    assert (passes >= 1).all() and (passes <= 16 * 16).all()


@torch.no_grad()
def test_masks_beside_the_tokens_see_all_but_their_own_and_are_not_seen(
        model, examples):  # noqa: F811
    state = state_of(model, examples[:3])
    tokens = torch.full((3, 16), TOKENIZER.mask_id)
    plain, asked = beside(state, tokens)
    torch.testing.assert_close(asked, plain)  # each takes the place of a mask
    tokens[:, 3] = 5
    plain, asked = beside(state, tokens)
    alone = state.logits(state.forward_all(tokens))
    alone[..., TOKENIZER.mask_id] = -torch.inf
    torch.testing.assert_close(plain, alone)
    assert not torch.allclose(asked[:, 3], plain[:, 3])


def test_near_an_anchor_less_will_do():
    logits = logits_of([0.95, 0.8, 0.6, 0.5, 0.8, 0.8, 0.8, 0.8])
    _, committed = local_leap(logits, EVERY, {})
    assert committed[0].tolist() == [True, True, False, False, True, False, False, False]
    _, committed = local_leap(logits_of([0.5, 0.8] + [0.4] * 6), EVERY, {})
    assert committed[0].tolist() == [False, True] + [False] * 6  # without an anchor, one


def test_a_token_that_stays_the_likeliest_gains_credit():
    memory, logits = {}, logits_of([0.8, 0.8] + [0.5] * 6)
    n = [int(credit_decoding(logits, EVERY, memory)[1].sum()) for _ in range(4)]
    assert (n[0], n[-1]) == (1, 2)
    torch.testing.assert_close(memory["credit"][0, 0, 1], torch.tensor(0.8).sqrt() * 1.875)
    assert memory["credit"][0, :, 0].sum() == 0


def test_all_is_committed_once_the_two_best_are_far_apart_on_average():
    unsure = logits_of([0.9] * 8)
    assert prophet(unsure, EVERY, {})[1].sum() == 1
    sure = logits_of([0.999] * 8)
    assert prophet(sure, EVERY, {})[1].all()
    first = EVERY.clone()
    first[0, 1:] = False
    assert prophet(torch.cat([sure[:, :1], unsure[:, 1:]], 1), first, {})[1].sum() == 1
