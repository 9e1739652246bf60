"""The loss of a batch is that of its examples, whatever their lengths."""

from dataclasses import replace

import pytest
import torch
from test_data import MICRO, STAGES, batch_of, examples, model  # noqa: F401  (fixtures)

from diffa2_mini.checkpoint import trained_tensors
from diffa2_mini.objective import piece_loss, preference_bounds
from diffa2_mini.weights import load_tokenizer


@pytest.mark.parametrize("number", [1, 2, 4])
def test_the_loss_of_a_batch_is_the_sum_over_its_examples(model, examples, number):  # noqa: F811
    pairs, stage, tokenizer = [(0, i) for i in (2, 0, 7, 4)], replace(STAGES[number], batch_size=4), load_tokenizer(MICRO)
    reference = {name: tensor + 0.1 for name, tensor in trained_tensors(model).items()}

    def loss(some):
        batch = batch_of(some, examples, model, number)
        return piece_loss(model, reference, batch, stage, tokenizer, n_tokens=96)

    whole, parts = loss(pairs), [loss([pair]) for pair in pairs]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(part[name] for part in parts))
    assert len({round(float(part["loss"].detach()), 4) for part in parts}) == 4


def test_both_answers_of_a_pair_are_bounded_as_if_alone(model, examples):  # noqa: F811
    stage, tokenizer = STAGES[4], load_tokenizer(MICRO)
    together = batch_of([(0, 2), (0, 0)], examples, model, 4)
    policy, reference = preference_bounds(model, trained_tensors(model), together, stage, tokenizer)
    torch.testing.assert_close(policy, reference)  # the reference is the model itself
    for i, number in enumerate((2, 0)):
        alone, _ = preference_bounds(model, {}, batch_of([(0, number)], examples, model, 4), stage, tokenizer)
        torch.testing.assert_close(alone[0], policy[i])
