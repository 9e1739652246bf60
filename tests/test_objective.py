"""The loss of a batch is that of its examples, whatever their lengths."""

from dataclasses import replace

import pytest
import torch
from test_data import MICRO, STAGES, batch_of, examples, model  # noqa: F401  (fixtures)

from diffa2_mini.config import ACOUSTIC_AND_SEMANTIC
from diffa2_mini.data import Entry
from diffa2_mini.model import Diffa2Model
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.training.objective import (
    adamw,
    learning_rate,
    piece_loss,
    preference_bounds,
)
from diffa2_mini.weights import trained_tensors


@pytest.mark.parametrize("number", [1, 2, 4])
def test_the_loss_of_a_batch_is_the_sum_over_its_examples(model, examples, number):
    pairs, stage = [Entry(0, i) for i in (2, 0, 7, 4)], replace(STAGES[number], batch_size=4)
    tokenizer = load_tokenizer(MICRO)
    reference = {name: tensor + 0.1 for name, tensor in trained_tensors(model).items()}

    def loss(some):
        batch = batch_of(some, examples, model, number)
        return piece_loss(model, reference, batch, stage, tokenizer, n_tokens=96)

    whole, parts = loss(pairs), [loss([pair]) for pair in pairs]
    for name, value in whole.items():
        parted = sum(part[name] for part in parts)
        torch.testing.assert_close(value, parted, atol=1e-4, rtol=1e-4)  # of float32 sums
    assert len({round(float(part["loss"].detach()), 4) for part in parts}) == 4


def test_both_answers_of_a_pair_are_bounded_as_if_alone(model, examples):
    stage, tokenizer = STAGES[4], load_tokenizer(MICRO)
    together = batch_of([Entry(0, 2), Entry(0, 0)], examples, model, 4)
    policy, reference = preference_bounds(model, trained_tensors(model), together, stage, tokenizer)
    torch.testing.assert_close(policy, reference)  # the reference is the model itself
    for i, number in enumerate((2, 0)):
        batch = batch_of([Entry(0, number)], examples, model, 4)
        alone, _ = preference_bounds(model, {}, batch, stage, tokenizer)
        torch.testing.assert_close(alone[0], policy[i])


@pytest.mark.parametrize(("numbers", "n_rows"), [((0, 3, 6), 3), ((0, 1, 3), 6)])
def test_a_pair_that_is_masked_wholly_is_read_once_if_its_answers_are_as_long(
        model, examples, numbers, n_rows):
    stage, tokenizer = replace(STAGES[4], masking="all-masked"), load_tokenizer(MICRO)
    batch = batch_of([Entry(0, i) for i in numbers], examples, model, stage)
    assert (batch.masked == batch.valid[:, None]).all()
    seen = []
    hook = model.llada.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    once, twice = (preference_bounds(model, trained_tensors(model), batch, each, tokenizer)[0]
                   for each in (stage, replace(stage, masking="published")))
    hook.remove()
    assert seen == [n_rows] * 2 + [6] * 2  # policy and reference
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("schedule, at_a_quarter", [("linear", 0.75), ("cosine", (2 + 2**0.5) / 4)])
def test_the_learning_rate_warms_up_and_decays_to_zero(schedule, at_a_quarter):
    stage = replace(STAGES[1], lr=2.0, warmup=4, schedule=schedule)
    rates = [learning_rate(step, 12, stage) for step in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[6::2] == pytest.approx([2 * at_a_quarter, 1.0, 2 * (1 - at_a_quarter), 0.0])
    assert learning_rate(0, 12, replace(stage, warmup=0)) == 2.0


def test_matrices_decay_and_biases_and_norms_do_not():
    model = Diffa2Model(MICRO)
    model.add_lora()
    trained = model.train_only((*ACOUSTIC_AND_SEMANTIC, "prompts", "lora"))
    optimizer = adamw(trained, lr=0.1, betas=(0.9, 0.999), weight_decay=0.5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    before = {name: p.detach().clone() for name, p in trained.items()}
    for p in trained.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in trained.items():
        still = name.endswith("bias") or "norm" in name.lower() or "proj.0" in name
        torch.testing.assert_close(p.detach(), before[name] * (1 if still else 0.95))
        assert not still or p.dim() == 1
