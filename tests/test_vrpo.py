"""VRPO: at the reference the loss is log 2, shared masks cancel the noise, and the estimates of a
batch stand alone."""

import math

import numpy as np
import pytest
import torch

from diffa2_mini.vrpo import draw_masks, elbo, preference_margin, vrpo_loss

V, R, MASK, BETA = 5, 6, 5, 0.2
PAIR = torch.tensor([[0, 1, 2, 3, 4, 4], [1, 1, 0, 2, 4, 4]])  # chosen, rejected
VALID = torch.ones(2, R, dtype=torch.bool)


def predictor(weights):
    """A model whose logits at a token depend on all tokens of its row; weights [V + 1, V]."""
    def logits_of(noisy, valid, masked):
        context = (weights[noisy] * valid[..., None]).sum(1, keepdim=True) / 3  # [B, 1, V]
        return (context + torch.arange(noisy.shape[1])[:, None].sin() * weights.sum(0))[masked]
    return logits_of


def masks(seed, n=4, rows=2):
    rng = np.random.default_rng(seed)
    return torch.stack([torch.from_numpy(draw_masks(rng, R, n)) for _ in range(rows)])


def bounds(weights, drawn):
    """The pair's lower bounds [1, 2]."""
    return elbo(predictor(weights), PAIR, VALID, drawn, MASK).view(1, 2)


def test_at_the_reference_the_loss_is_log_2_and_its_gradient_half_of_beta_times_the_margins():
    theta, drawn = torch.randn(V + 1, V, requires_grad=True), masks(0)
    reference = bounds(theta.detach(), drawn)
    loss = vrpo_loss(bounds(theta, drawn), reference, BETA)
    assert loss.item() == pytest.approx(math.log(2))
    gradient, = torch.autograd.grad(loss, theta)
    margin_gradient, = torch.autograd.grad(
        preference_margin(bounds(theta, drawn), reference).sum(), theta)
    assert margin_gradient.abs().max() > 0.1
    torch.testing.assert_close(gradient, -BETA / 2 * margin_gradient)


def test_the_loss_is_minus_log_sigmoid_of_beta_times_the_margin():
    policy = torch.tensor([[-10.0, -20.0], [-7.0, -5.0]])
    reference = torch.tensor([[-12.0, -19.0], [-6.0, -6.0]])
    assert preference_margin(policy, reference).tolist() == [3.0, -2.0]  # (2) - (-1) and (-1) - (1)
    expected = np.mean([math.log(1 + math.exp(-BETA * margin)) for margin in (3, -2)])
    assert vrpo_loss(policy, reference, BETA).item() == pytest.approx(expected)


def test_shared_masks_give_a_margin_of_exactly_zero_at_the_reference_and_others_do_not():
    theta = torch.randn(V + 1, V)
    policy = bounds(theta, masks(0))
    assert preference_margin(policy, bounds(theta, masks(0))).item() == 0
    assert abs(preference_margin(policy, bounds(theta, masks(1))).item()) > 0.1


def test_shared_masks_reduce_the_variance_near_the_reference():
    theta = torch.randn(V + 1, V)
    near = theta + 0.05 * torch.randn_like(theta)
    shared = [
        preference_margin(bounds(near, masks(s)), bounds(theta, masks(s))).item()
        for s in range(100)]
    others = [
        preference_margin(bounds(near, masks(s)), bounds(theta, masks(s + 1000))).item()
        for s in range(100)]
    assert np.var(shared) < np.var(others) / 10


def test_masks_hide_exactly_k_tokens_with_k_uniform_and_any_token_alike():
    drawn = draw_masks(np.random.default_rng(0), R, 60_000)
    assert drawn.shape == (60_000, R) and drawn.dtype == bool
    counts = np.bincount(drawn.sum(1), minlength=R + 1)
    assert counts[0] == 0
    # chi-square, 5 degrees of freedom, 0.1 %
    assert ((counts[1:] - 10_000) ** 2 / 10_000).sum() < 20.5
    pairs = drawn[drawn.sum(1) == 2].astype(int)
    # how often each pair of tokens is hidden alone: 15 pairs
    together = (pairs.T @ pairs)[np.triu_indices(R, 1)]
    # chi-square, 14 degrees of freedom, 0.1 %
    assert ((together - together.mean()) ** 2 / together.mean()).sum() < 36.1


def test_the_samples_of_an_example_have_counts_of_their_own():
    drawn = draw_masks(np.random.default_rng(0), 100, 8)
    assert len(set(drawn.sum(1))) == 8


def test_elbo_of_one_sample_is_l_over_k_times_its_log_likelihood():
    logits, masked = torch.randn(2, V), torch.tensor([[[False, True, False, False, True, False]]])
    seen = {}

    def logits_of(noisy, valid, masked):
        seen.update(noisy=noisy, masked=masked)
        return logits

    bound = elbo(logits_of, PAIR[:1], VALID[:1], masked, MASK)
    p = logits.log_softmax(-1)
    torch.testing.assert_close(bound, 6 / 2 * (p[0, 1] + p[1, 4])[None])
    assert seen["noisy"].tolist() == [[0, MASK, 2, 3, MASK, 4]]
    assert torch.equal(seen["masked"], masked[0])


def test_elbo_is_the_mean_over_samples():
    theta, drawn = torch.randn(V + 1, V), masks(0)
    one_by_one = torch.stack([bounds(theta, drawn[:, i:i + 1]) for i in range(4)])
    torch.testing.assert_close(bounds(theta, drawn), one_by_one.mean(0))


@pytest.mark.parametrize("padding", [0, 4])
def test_elbo_ignores_padding(padding):
    theta, drawn = torch.randn(V + 1, V), masks(0)
    wider = torch.nn.functional.pad
    padded = elbo(predictor(theta), wider(PAIR, (0, 3), value=padding), wider(VALID, (0, 3)),
                  wider(drawn, (0, 3)), MASK)
    torch.testing.assert_close(padded.view(1, 2), bounds(theta, drawn))


def test_more_samples_reduce_the_variance_in_proportion():
    theta = torch.randn(V + 1, V)
    response, valid, variance = PAIR[:1].expand(4000, R), VALID[:1].expand(4000, R), {}
    for n in (1, 4):
        variance[n] = elbo(predictor(theta), response, valid, masks(0, n=n, rows=4000),
                           MASK).var().item()
    assert variance[4] == pytest.approx(variance[1] / 4, rel=0.15)
