"""Scores against ones worked out by hand."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from diffa2_mini.config import SIZES, AdapterConfig, LladaConfig, WhisperConfig
from diffa2_mini.data import Example
from diffa2_mini.ears import Ears
from diffa2_mini.evaluate import answer, is_right, report, table, word_errors
from diffa2_mini.model import Diffa2
from diffa2_mini.weights import load_tokenizer


@pytest.mark.parametrize("reference, hypothesis, errors", [
    ("one two three", "one two three", 0),
    ("one two three", "one three", 1),  # a deletion
    ("one two three", "one two two three", 1),  # an insertion
    ("one two three", "one four three", 1),  # a substitution
    ("one two three", "two three one", 2),  # not three substitutions
    ("one two three", "three two one", 2),
    ("one two three four", "two three five six", 3),
    ("one two three", "", 3),
    ("", "one two", 2),
    ("", "", 0),
    ("one", "two three four", 3),
    ("one  two", " one two ", 0),  # white space is none of it
    ("one two", "onetwo", 2),
])
def test_word_errors(reference, hypothesis, errors):
    assert word_errors(reference, hypothesis) == (errors, len(reference.split()))
    assert word_errors(hypothesis, reference) == (errors, len(hypothesis.split()))


def example(type, answer, domain="speech", path="clip.wav"):
    return Example(Path(path), "?", answer, "", type, domain)


@pytest.mark.parametrize("type, target, text, right", [
    ("first", "nine", "nine", True), ("first", "nine", "nine nine", False), ("first", "nine", "Nine", False),
    ("first", "nine", "", False), ("caption", "B. siren", "B. beep", False),
    ("first+abcd", "B. siren", "B. siren", True), ("first+abcd", "B. siren", "B", True),
    ("first+abcd", "B. siren", "B. beep", True), ("first+abcd", "B. siren", "A. siren", False),
    ("first+abcd", "B. siren", "siren", False), ("first+abcd", "B. siren", "", False),
])
def test_an_open_answer_counts_as_a_whole_and_a_lettered_one_by_its_letter(type, target, text, right):
    assert is_right(example(type, target), text) is right


GRADED = [  # example, answer
    (example("asr", "one two three"), "one two three"), (example("asr", "four"), "five"),
    (example("asr", "six seven"), "six"), (example("asr", "nine"), "nine nine"),
    (example("caption", "a bell", "sound"), "a bell"),
    (example("caption", "fast", "speech"), "slow"),
    (example("count", "2", "sound"), "2"), (example("count", "3", "sound"), "3"), (example("count", "3", "sound"), "2"),
    (example("count+abcd", "A. 2", "sound"), "A. 2"), (example("count+abcd", "C. 2", "sound"), "B. 2"),
    (example("first+abcd", "D. six"), "D"),
]


def test_report_by_hand():
    result = report(*zip(*GRADED))
    assert result.accuracy == pytest.approx({
        ("speech", "asr"): 1 / 4, ("sound", "caption"): 1, ("speech", "caption"): 0, ("sound", "count"): 2 / 3,
        ("sound", "count+abcd"): 1 / 2, ("speech", "first+abcd"): 1})
    assert result.count == {("speech", "asr"): 4, ("sound", "caption"): 1, ("speech", "caption"): 1,
                            ("sound", "count"): 3, ("sound", "count+abcd"): 2, ("speech", "first+abcd"): 1}
    assert result.figures == pytest.approx({
        "open": (1 / 4 + 1 + 0 + 2 / 3) / 4, "lettered": (1 / 2 + 1) / 2, "caption": 1 / 2, "overall": 6 / 12,
        "worst_open": 0, "wer": (0 + 1 + 1 + 1) / (3 + 1 + 2 + 1)})


def test_report_leaves_out_what_was_not_asked():
    figures = report([example("first+abcd", "A. six")], ["A. six"]).figures
    assert set(figures) == {"lettered", "overall", "worst_open"} and math.isnan(figures["worst_open"])
    with pytest.raises(ValueError):
        report([example("asr", "six")], [])


def test_the_table_has_a_line_per_type_and_a_column_per_domain():
    lines = table(report(*zip(*GRADED))).splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["question", "sound", "speech"], ["asr", "0.25"], ["caption", "1.00", "0.00"], ["count", "0.67"],
        ["count+abcd", "0.50"], ["first+abcd", "1.00"]]
    assert lines[1].index("0.25") + 4 == len(lines[0])  # below speech
    assert lines[-1].startswith("12 questions: open 0.479, lettered 0.750, caption 0.500, overall 0.500")



def test_answers_come_in_the_order_of_the_examples_whatever_the_batch(tmp_path):
    toy = SIZES["toy"][0]
    micro = dataclasses.replace(
        toy, audio=dataclasses.replace(toy.audio, max_seconds=1, n_mels=16), adapter=AdapterConfig(n_queries=2),
        whisper=WhisperConfig(n_mels=16, n_positions=50, width=8, n_layers=2, n_heads=2, taps=(1, 2)),
        llada=LladaConfig(vocab_size=toy.llada.vocab_size, width=16, n_layers=1, n_heads=2, hidden=16))
    model, tokenizer = Diffa2(micro).eval(), load_tokenizer(micro)
    for weight in (p for p in model.llada.parameters() if p.dim() == 2):
        torch.nn.init.normal_(weight)  # large, so that the answers differ
    ears = Ears(model, torch.device("cpu"), torch.float32, keep=True)
    examples = [dataclasses.replace(example("asr", "?", path=tmp_path / f"{i}.wav"), instruction=f"{i} " * (i + 1))
                for i in range(5)]
    for i, item in enumerate(examples):
        soundfile.write(item.path, np.random.default_rng(i).normal(0, 0.1, 3000 * (i + 1)), 16_000)
    decode = dataclasses.replace(micro.decode, gen_length=4, block_length=4)

    def answers(batch_size):
        return answer(model, tokenizer, ears, examples, ("acoustic", "semantic"), decode, batch_size)

    texts, n_steps = answers(1)
    assert len(set(texts)) > 2 and 5 <= n_steps <= 20
    assert answers(2)[0] == answers(64)[0] == texts and answers(64)[1] <= 4
