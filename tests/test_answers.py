"""Answers do not depend on how they are batched."""

import dataclasses

import numpy as np
import soundfile
import torch
from test_data import MICRO, examples, features_of, model  # noqa: F401  (fixtures)

from diffa2_mini.config import SIZES, AdapterConfig, LladaConfig, WhisperConfig
from diffa2_mini.data import Example
from diffa2_mini.evaluate.answers import Respondent
from diffa2_mini.model import Diffa2Model
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.training.features import FeatureCache


def test_questions_are_asked_with_the_system_prompt_of_answering(model, examples, monkeypatch):
    text = dataclasses.replace(MICRO.text, train_system="Imagine.", system="Listen.")
    monkeypatch.setattr(model, "config", dataclasses.replace(MICRO, text=text))
    tokenizer, asked = load_tokenizer(MICRO), []

    def noted(model, tokenizer, embeddings, prompts, decode, numbers):
        asked.extend(prompts)
        return torch.zeros(len(prompts), 4, dtype=torch.long), 1

    Respondent(features_of(model, True), tokenizer, ("acoustic", "semantic"), MICRO.decode,
               noted).answer(examples[:2])
    assert asked == [tokenizer.prompt("Listen.", "What is said?")] * 2


def test_answers_come_in_the_order_of_the_examples_whatever_the_batch(tmp_path):
    toy = SIZES["toy"][0]
    micro = dataclasses.replace(
        toy, audio=dataclasses.replace(
            toy.audio, max_seconds=1,
            n_mels=16), adapter=AdapterConfig(n_queries=2), whisper=WhisperConfig(
                n_mels=16, n_positions=50, width=8,
                n_layers=2, n_heads=2, taps=(1, 2)), llada=LladaConfig(
                    vocab_size=toy.llada.vocab_size, width=16, n_layers=1, n_heads=2, hidden=16))
    model, tokenizer = Diffa2Model(micro).eval(), load_tokenizer(micro)
    for weight in (p for p in model.llada.parameters() if p.dim() == 2):
        torch.nn.init.normal_(weight)  # large, so that the answers differ
    features = FeatureCache(model, torch.device("cpu"), torch.float32, keep=True)
    examples = [
        Example(tmp_path / f"{i}.wav", f"{i} " * (i + 1), "?", "", "asr", "speech")
        for i in range(5)]
    for i, item in enumerate(examples):
        soundfile.write(item.path, np.random.default_rng(i).normal(0, 0.1, 3000 * (i + 1)), 16_000)
    decode = dataclasses.replace(micro.decode, gen_length=4, block_length=4)

    def answers(batch_size, n_skipped=0, **changes):
        how = dataclasses.replace(decode, **changes)
        respondent = Respondent(features, tokenizer, ("acoustic", "semantic"), how)
        return respondent.answer(examples[n_skipped:], batch_size, range(n_skipped, len(examples)))

    texts, n_steps = answers(1)
    assert len(set(texts)) > 2 and 5 <= n_steps <= 20
    assert answers(2)[0] == answers(64)[0] == texts and answers(64)[1] <= 4
    for changes in (dict(temperature=2.0), dict(factor=None, steps=4, remasking="random")):
        drawn = answers(1, **changes)[0]
        assert answers(2, **changes)[0] == answers(64, **changes)[0] == drawn
        assert answers(64, n_skipped=2, **changes)[0] == drawn[2:]
    assert answers(64, temperature=2.0)[0] != texts
    scheduled = dict(factor=None, steps=4)
    assert answers(64, **scheduled)[1] == 4
    assert answers(64, **scheduled, cfg=1.0)[1] == 8  # guidance reads everything a second time
