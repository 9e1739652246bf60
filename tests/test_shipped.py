"""The shipped toy model answers as well as its model card says, on 100 clips of scenes that no
training has shown; and small, on its own clips where its encoder is found."""

import numpy as np
import pytest
import torch
from golden_inputs import real_encoder

from data import small, toy, toy_text
from data.pretraining.backbone import accuracy_by_type, open_and_lettered
from diffa2_mini import Diffa2, weights
from diffa2_mini.config import DATA, SIZES
from diffa2_mini.data import Example
from diffa2_mini.evaluate import scoreboard
from diffa2_mini.evaluate.answers import Respondent
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.model import Diffa2Model
from diffa2_mini.published.sources import SOURCES, load_tokenizer
from diffa2_mini.training.checkpoint import load_checkpoint
from diffa2_mini.training.features import FeatureCache

SMALL = SOURCES["small"]
SHIPPED_ANSWERS = {
    ("order_latte.flac", "How much sugar?"): "some brown sugar",
    ("order_latte.flac", "What size?"): "large",
    ("order_americano.flac", "Which roast?"): "dark roast",
    ("order_americano.flac", "How much milk?"): "none",
    ("seven_two_nine.flac", None): "seven two nine"}
SHARE_RIGHT = 0.90  # of every third open question, mean over types; measured: 0.931, of all 0.927


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder, patch = tmp_path_factory.mktemp("clips"), pytest.MonkeyPatch()
    patch.setattr(toy, "SPLITS", {"evaluation": (40, 30, 30)})
    clips = toy.make_clips(folder, "evaluation", seed=1)
    patch.undo()
    rng = np.random.default_rng(1)
    asked = [(row, question, scene.kind) for scene, row in clips
             for question in toy_text.questions(scene, rng) if "+" not in question.type]
    return [Example(folder / row["audio_filepath"], question.instruction, question.answer, "",
                    question.type, kind) for row, question, kind in asked[::3]]


def test_the_shipped_model_reaches_its_accuracy_on_100_clips(examples):
    trained = load_checkpoint(weights.SHIPPED["diffa2"])
    model = weights.build(trained.config)
    weights.restore(model, trained.model, "the shipped checkpoint")
    tokenizer = load_tokenizer(trained.config)
    features = FeatureCache(model, torch.device("cpu"), torch.float32, keep=True)
    model.eval()
    respondent = Respondent(features, tokenizer, trained.audio, trained.config.decode)
    replies, _ = respondent.answer(examples)
    figures = scoreboard.report(examples, replies).figures
    assert figures["open"] >= SHARE_RIGHT, figures


def test_the_shipped_backbone_answers_from_text_alone():
    config = SIZES["toy"][0]
    model = weights.build(config)
    rng = np.random.default_rng(0)
    examples = [toy.text_example(rng, evaluation=True) for _ in range(200)]
    accuracy = accuracy_by_type(model, load_tokenizer(config), examples)
    plain, lettered = open_and_lettered(accuracy)
    assert plain >= 0.98 and lettered >= 0.95, (plain, lettered)


def test_the_shipped_backbone_of_small_reads_what_was_ordered_and_who_speaks():
    """Measured on 1,000 texts of all kinds: 0.85 of open questions, and 0.98 to 1.00 of these."""
    config, rng = SIZES["small"][0], np.random.default_rng(0)
    model = Diffa2Model(config, llada=FastLlada).eval()
    weights.load_part(model.llada, "llada", SMALL["llada"])
    examples = [small.order_example(rng) for _ in range(120)]
    examples += [small.person_example(["the weather is nice"], rng) for _ in range(40)]
    types = {"drink", "size", "roast", "shots", "none", "adult", "child"}
    examples = [example for example in examples if example.type in types]
    accuracy = accuracy_by_type(model, load_tokenizer(config), examples)
    assert {*accuracy} == types and np.mean([*accuracy.values()]) >= 0.9, accuracy


def test_small_hears_an_order_where_the_encoder_is_found():
    encoder = real_encoder("tiny.en")
    if encoder is None:
        pytest.skip("no whisper-tiny.en is found; DIFFA2_WHISPER names its folder")
    diffa2 = Diffa2.from_pretrained("small", sources={"whisper": str(encoder)}, device="cpu")
    for (clip, question), answer in SHIPPED_ANSWERS.items():
        assert diffa2.ask(DATA / "clips" / clip, question).text == answer


def test_the_shipped_files_are_as_small_as_promised():
    parts = (weights.SHIPPED["whisper"], weights.SHIPPED["llada"])
    assert sum(path.stat().st_size for path in parts) <= 5e6
    assert weights.SHIPPED["diffa2"].stat().st_size <= 2e6
    assert sum(SMALL[part].stat().st_size for part in ("llada", "diffa2")) <= 24e6
