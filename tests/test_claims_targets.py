"""The losses of claims.py are what they say, their targets are counted, and the variance of a
gradient is that of its definition."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from diffa2_mini.config import SIZES
from diffa2_mini.data import AnswerBatch
from diffa2_mini.diffusion import forward_process
from diffa2_mini.model import Audio
from diffa2_mini.tokenizer import Prompt
from diffa2_mini.training import objective
from tutorials import autoregressive
from tutorials.claims_targets import (
    FEW_TARGETS,
    LIGHT_EOS,
    count_targets,
    gradient_spread,
    training_loss,
)

TOKENS = SimpleNamespace(eos_id=20, mask_id=21, eot_id=22)
STAGE = SIZES["toy"][1][2]


@pytest.fixture
def batch(config):
    """Two answers, of three and of one token before the end; the second is padded."""
    response = torch.tensor([[8, 9, 10, 22, 20, 20], [11, 22, 20, 20, 20, 20]])
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    uniforms = torch.tensor([[0.1, 0.9, 0.1, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.1, 2, 2]])
    noisy, masked, weight = forward_process(response, torch.full((2,), 0.5), uniforms, 21)
    n_frames, size = torch.tensor([8, 12]), config.whisper
    audio = Audio(torch.randn(2, size.n_positions, size.width),
                  torch.randn(2, len(size.taps), size.n_positions, size.width), n_frames)
    return AnswerBatch(examples=[], prompts=[Prompt([1, 2, 3, 4, 5], 2), Prompt([6, 7], 1)],
                       response=response, valid=valid, audio=audio, noisy=noisy, masked=masked,
                       weight=weight)


def all_losses(model, batch, noisy):
    """The cross-entropy of every token [B, R]."""
    embeddings = model.embed_audio(batch.audio, STAGE.audio)
    hidden = model.hidden_states(embeddings, batch.prompts, noisy, batch.valid)
    return F.cross_entropy(model.llada.logits(hidden).transpose(1, 2), batch.response,
                           reduction="none")


def test_without_a_kind_it_is_the_loss_of_the_stage(model, batch):
    found = training_loss(model, batch, STAGE, TOKENS, causal=False)
    torch.testing.assert_close(found, objective.answer_loss(model, batch, STAGE, 10))
    found = training_loss(model, batch, STAGE, TOKENS, causal=True)
    torch.testing.assert_close(found, autoregressive.answer_loss(model, batch, STAGE, TOKENS))


def test_every_eos_but_the_first_counts_a_tenth(model, batch):
    counts = torch.tensor([[1, 1, 1, 1, 1, 0.1], [1, 1, 1, 0.1, 0, 0]])
    losses = all_losses(model, batch, batch.noisy) * batch.weight[:, None] * batch.masked
    found = training_loss(model, batch, STAGE, TOKENS, False, LIGHT_EOS)
    torch.testing.assert_close(found, (losses * counts).sum() / counts.sum())


def test_few_targets_are_those_of_the_answer_that_the_noise_masks(model, batch):
    counted = torch.tensor([[1., 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    embeddings = model.embed_audio(batch.audio, STAGE.audio)
    wanted = autoregressive.next_token_loss(model, embeddings, batch.prompts, batch.response,
                                            batch.valid, counted)
    found = training_loss(model, batch, STAGE, TOKENS, True, FEW_TARGETS)
    torch.testing.assert_close(found, wanted)
    batch.masked[:] = False  # not one target
    assert training_loss(model, batch, STAGE, TOKENS, True, FEW_TARGETS) == 0


@pytest.mark.parametrize("causal, kind, counts", [
    (False, None, (7, 4, 2)),  # the second answer is masked as a whole
    (False, LIGHT_EOS, (7, 4, 2)), (True, None, (6, 6, 2)), (True, FEW_TARGETS, (4, 4, 2))])
def test_targets_are_counted(batch, causal, kind, counts):
    found = count_targets(batch, TOKENS, causal, kind)
    names = ("targets", "answer_targets", "targets_from_audio_alone")
    assert found == dict(zip(names, counts))


def test_the_variance_of_a_gradient_is_the_mean_squared_distance_from_its_mean():
    w, b = torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)
    x = torch.randn(500, 5) + 2
    losses = [(w * row[:3]).sum() + (b * row[3:]).sum() for row in x]
    variance, square = gradient_spread(losses, [w, b])
    assert variance == pytest.approx(float(x.var(0).sum()), rel=1e-4)
    assert square == pytest.approx(float(x.mean(0).square().sum()) - variance / 500, rel=1e-4)
