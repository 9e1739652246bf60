"""The plain decoder: what each rule commits. test_generate.py compares it with the fast one."""

import pytest
import torch
from test_generate import EOS, MASK, restless, settings, sure

from diffa2_mini.decode import (
    above_threshold,
    commit,
    decode,
    factor_based,
    finished,
    most_confident,
    tokens_in_step,
)


@pytest.mark.parametrize("confidence, factor, expected", [
    ([1.0, 1.0, 1.0], 1.0, "111"),  # all sure
    ([0.1, 0.1, 0.1], 1.0, "100"),  # the first always
    ([0.99, 0.9, 0.6], 1.0, "110"),  # the last fails: 4 * 0.4 > 1
    ([0.6, 0.99, 0.9], 1.0, "011"),  # the same, not in order
    ([0.875, 0.75, 0.5], 0.75, "110"),  # 3 * 0.25 <= 0.75
    ([0.875, 0.74, 0.74], 0.75, "100"),  # 3 * 0.26 > 0.75
    ([0.9, 0.2, 0.9], 1.0, "101"),  # whoever fails, wherever it stands
    ([0.9, 0.8, 0.7], 2.0, "111"),  # a larger factor dares more: 4 * 0.3 <= 2
    ([0.9, 0.8, 0.7], 1.0, "110"),
    ([0.9999, 0.999, 0.99], 1e-9, "100"),  # a tiny one goes one by one
])
def test_factor_based_rule(confidence, factor, expected):
    committed = factor_based(torch.tensor([confidence]), torch.ones(1, 3, dtype=torch.bool), factor)
    assert "".join(str(int(go)) for go in committed[0]) == expected


def test_a_threshold_commits_what_is_above_it_and_the_most_confident_in_any_case():
    candidates = torch.tensor([[False, True, True, True], [False, True, True, False], [False] * 4])
    confidence = torch.tensor([[1.0, 0.95, 0.9, 0.91], [1.0, 0.2, 0.3, 1.0], [1.0] * 4])
    expected = [[False, True, False, True], [False, False, True, False], [False] * 4]
    assert above_threshold(confidence, candidates, 0.9).tolist() == expected


@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_factor_based_commits_candidates_alone_and_each_row_for_itself(factor):
    candidates = torch.tensor([[False, True, True], [False, False, False], [True, True, True]])
    confidence = torch.tensor([[1.0, 0.3, 0.2], [1.0, 1.0, 1.0], [1.0, 0.99, 0.98]])
    expected = [[False, True, factor > 1], [False] * 3, [True] * 3]
    assert factor_based(confidence, candidates, factor).tolist() == expected


def test_most_confident_takes_k_candidates_or_as_many_as_there_are():
    candidates = torch.tensor([[True, True, False, True], [False, True, False, False]])
    confidence = torch.tensor([[0.2, 0.5, 0.9, 0.4], [0.9, 0.1, 0.9, 0.9]])
    expected = [[False, True, False, True], [False, True, False, False]]
    assert most_confident(confidence, candidates, 2).tolist() == expected


@pytest.mark.parametrize("tokens, expected", [
    ([0, EOS, MASK, MASK], True), ([EOS, EOS, EOS, EOS], True), ([MASK, EOS, 0, 0], False),
    ([0, 1, 2, 3], False), ([MASK] * 4, False), ([0, 1, MASK, EOS], False)])
def test_finished_means_an_eos_without_a_mask_before_it(tokens, expected):
    assert finished(torch.tensor([tokens]), MASK, EOS).item() == expected


@pytest.mark.parametrize("block, steps, shares", [(8, 3, [3, 3, 2]), (4, 8, [1] * 4), (8, 1, [8])])
def test_a_schedule_shares_the_masks_of_a_block_among_its_steps(block, steps, shares):
    config = settings(block_length=block, steps=steps)
    assert [tokens_in_step(config, i) for i in range(config.steps_per_block)] == shares
    confidence, candidates = torch.rand(1, 8), torch.ones(1, 8, dtype=torch.bool)
    for i, share in enumerate(shares):
        assert int(commit(confidence, candidates, config, i).sum()) == share


def test_a_confidence_is_not_rounded_to_the_precision_of_the_logits():
    predict, reads = sure([0, 1, 2, 3] * 2, [0.9985] * 8), []  # in bfloat16 that is 1

    def low(tokens):
        reads.append(tokens)
        return predict(tokens).bfloat16()

    decode(low, torch.full((1, 8), MASK), settings(factor=0.005), MASK, EOS)
    assert len(reads) == 4  # two a step: 3 * 0.0015 <= 0.005 < 4 * 0.0015


def test_tokens_that_are_given_stay():
    given = torch.tensor([[0, MASK, 1, MASK, 2, MASK, 3, MASK]])
    answer = decode(restless(), given, settings(), MASK, EOS)
    assert torch.equal(answer[given != MASK], given[given != MASK])
