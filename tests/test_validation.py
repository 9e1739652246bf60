"""What is measured while a model trains: in evaluation mode, in float32 where it matters, and ended
between two batches."""

from dataclasses import replace

import pytest
import torch
from test_data import MICRO, STAGES, examples, features_of, model  # noqa: F401  (fixtures)
from test_features import front_end  # noqa: F401

from diffa2_mini.evaluate.answers import Respondent
from diffa2_mini.evaluate.validation import RANKING_SAMPLES, Validator
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.training.features import FeatureCache
from diffa2_mini.training.objective import preference_bounds, set_dropout
from diffa2_mini.vrpo import preference_margin
from diffa2_mini.weights import trained_tensors
from tutorials.score_variance import score_variance


def validator_of(model, **options):
    return Validator(model, load_tokenizer(MICRO), features_of(model, keep=True), seed=0, **options)


def test_each_sample_is_another_one_until_all_have_been(model, examples, monkeypatch):
    asked = []
    monkeypatch.setattr(Validator, "answers", lambda self, stage, some: asked.extend(some) or ["a"])
    many = [replace(examples[i % 4], answer=str(i)) for i in range(14)]
    for number in range(14):
        validator_of(model).print_sample(STAGES[2], many, number)
    assert {each.answer for each in asked} == {*map(str, range(14))}
    first = [int(each.answer) for each in asked[:7]]
    assert max(first) - min(first) > 7  # through all types, which stand one after another


def test_pairs_are_measured_without_dropout_in_any_mode(model, examples):
    stage, reference = replace(STAGES[4], micro_batch=8), trained_tensors(model)
    validator = validator_of(model.train())
    set_dropout(model.acoustic_connector, 0.5)
    try:
        figures = validator.rank_pairs(stage, reference, examples * 2)
        assert model.training and figures["margin"] == 0  # the reference is the model itself
        variance = score_variance(validator, reference, stage, examples * 2)
        assert model.training
        assert variance["variance_shared"] == 0 < variance["variance_independent"]
    finally:
        set_dropout(model.eval().acoustic_connector, 0)


def test_pairs_are_ranked_by_more_samples_than_training_has(model, examples):
    stage = replace(STAGES[4], micro_batch=8, masking="published")
    validator = validator_of(model.eval())
    reference = {name: 1.1 * tensor for name, tensor in trained_tensors(model).items()}
    margins = validator.margins(stage, reference, examples)
    many = replace(stage, vrpo_samples=RANKING_SAMPLES)
    batch, = validator.pair_batches(many, examples)
    assert batch.masked.shape[1] == RANKING_SAMPLES > stage.vrpo_samples
    with torch.no_grad():
        bounds = preference_bounds(model, reference, batch, many, load_tokenizer(MICRO))
    assert margins.shape == (len(examples),) and margins.std() > 0
    torch.testing.assert_close(margins, preference_margin(*bounds))


def test_pairs_that_are_masked_wholly_need_one_sample(model, examples):
    stage, validator = replace(STAGES[4], micro_batch=8), validator_of(model.eval())
    assert stage.masking == "all-masked"
    reference = {name: 1.1 * tensor for name, tensor in trained_tensors(model).items()}
    margins = [validator.margins(replace(stage, vrpo_samples=n), reference, examples)
               for n in (1, 3)]
    assert torch.equal(*margins) and margins[0].std() > 0


def test_the_log_mel_of_measured_pairs_is_in_float32_too(front_end, model, examples):
    features = FeatureCache(model.bfloat16(), torch.device("cpu"), torch.bfloat16)
    validator = Validator(model, load_tokenizer(MICRO), features, seed=0)
    try:
        stage, reference = replace(STAGES[4], micro_batch=2), trained_tensors(model)
        validator.rank_pairs(stage, reference, examples)
        score_variance(validator, reference, stage, examples)
    finally:
        model.float()
    assert {*front_end} == {(torch.float32, False)}


def test_without_rejected_answers_no_pair_is_measured(model, examples):
    plain = [replace(example, rejected="") for example in examples]
    validator = validator_of(model)
    assert validator.rank_pairs(STAGES[4], {}, plain) == {}
    assert score_variance(validator, {}, STAGES[4], plain) == {}


def test_answers_are_those_of_all_questions_at_once_and_may_be_ended_after_any_batch(
        model, examples):
    class Ended(Exception):
        pass

    done, limit = [], 10**9

    def after_batch():
        done.append(len(done))
        if len(done) == limit:
            raise Ended

    size = STAGES[2].micro_batch
    many = (examples * size)[:size + 1]  # two batches
    validator = validator_of(model.train(), after_batch=after_batch)
    texts = validator.answers(STAGES[2], many)
    assert len(done) == 2 and len(texts) == len(many) and model.training
    model.eval()
    respondent = Respondent(validator.features, validator.tokenizer, STAGES[2].audio, MICRO.decode)
    at_once, _ = respondent.answer(many, len(many))
    assert texts == at_once
    limit = 3
    with pytest.raises(Ended):
        validator.answers(STAGES[2], many)
    assert len(done) == limit and not model.training
