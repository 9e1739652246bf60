"""The forward process and its loss, against exact enumeration where the vocabulary is small enough
for it."""

from itertools import permutations, product
from math import comb, factorial

import pytest
import torch

from diffa2_mini.diffusion import (
    EPSILON,
    diffusion_loss,
    forward_exactly,
    forward_process,
    stratified,
    token_losses,
)
from diffa2_mini.vrpo import elbo

V, R, MASK = 3, 3, 3  # three words, three positions, and the mask
X = torch.tensor([[2, 0, 1]])
# [7, R]: all but the empty one
ALL_MASKS = torch.tensor(list(product((False, True), repeat=R))[1:])
VALID = torch.ones(1, R, dtype=torch.bool)


def arbitrary_model():
    """A prediction [R, V] for every noisy response, with no rhyme or reason: logits [V + 1, V + 1,
    V + 1, R, V]."""
    return torch.randn(*[V + 1] * R, R, V)


def consistent_model():
    """The exact conditionals p(x_i | what is not masked) of a joint distribution, and that joint
    [V, V, V]."""
    joint = torch.randn(*[V] * R).flatten().softmax(0).view(*[V] * R)
    table = torch.zeros(*[V + 1] * R, R, V)
    for noisy in product(range(V + 1), repeat=R):
        given = joint[tuple(
            slice(None) if token == MASK else slice(token, token + 1) for token in noisy)]
        for i in range(R):
            marginal = given.sum([d for d in range(R) if d != i])
            table[noisy][i, :len(marginal)] = (marginal / marginal.sum()).log()
    return table, joint


def logits_at(table, noisy, masked):
    """What the table predicts for the masked tokens of noisy [B, R], in row order: [K, V]."""
    return table[noisy.unbind(1)][masked]


def losses(table, x):
    """Summed cross-entropy of x [1, R] under each of ALL_MASKS: [7]."""
    x = x.expand(len(ALL_MASKS), R)
    logits = logits_at(table, x.masked_fill(ALL_MASKS, MASK), ALL_MASKS)
    of_each = token_losses(logits, x[ALL_MASKS])
    return torch.zeros(ALL_MASKS.shape).masked_scatter(ALL_MASKS, of_each).sum(1)


def exact_bound(table, x=X):
    """E_t E_mask (1/t) sum CE. A mask of k tokens weighs the integral of t^(k-1) (1-t)^(R-k), a
    Beta function."""
    k = ALL_MASKS.sum(1).tolist()
    beta = torch.tensor([factorial(n - 1) * factorial(R - n) / factorial(R) for n in k])
    return (beta * losses(table, x)).sum()


def log_p_in_order(table, order):
    """log p(X) if its tokens are revealed one at a time in this order."""
    noisy, total = torch.full((R,), MASK), 0.0
    for i in order:
        total += table[tuple(noisy)][i].log_softmax(-1)[X[0, i]]
        noisy[i] = X[0, i]
    return total


def test_a_token_costs_minus_the_logarithm_of_its_probability_in_float32_at_least():
    logits, targets = torch.randn(4, V), torch.tensor([0, 2, 1, 1])
    expected = -logits.softmax(-1).log()[range(4), targets]
    torch.testing.assert_close(token_losses(logits, targets), expected)
    assert token_losses(logits.bfloat16(), targets).dtype == torch.float32
    assert token_losses(logits.double(), targets).dtype == torch.float64


def test_the_loss_is_an_unbiased_estimate_of_the_exact_bound():
    table, n = arbitrary_model(), 200_000
    x, u = X.expand(n, R), torch.rand(n, R)
    noisy, masked, weight = forward_process(x, torch.rand(n), u, MASK)
    logits = logits_at(table, noisy, masked)
    here = torch.zeros(n, R).masked_scatter(masked, token_losses(logits, x[masked]))
    samples = here.sum(1) * weight
    error = samples.std() / n ** 0.5
    estimate = R * diffusion_loss(logits, x, masked, weight, n_tokens=n * R)
    torch.testing.assert_close(estimate, samples.mean())
    assert abs(estimate - exact_bound(table)) < 4 * error
    assert error < 0.01 * exact_bound(table)  # or the line above would prove nothing


def test_masking_exactly_k_tokens_has_the_same_expectation():
    """VRPO's estimator: k uniform in 1 ... R, then any k tokens, R/k. Here every mask once, with
    its probability."""
    table, n = arbitrary_model(), len(ALL_MASKS)
    bounds = elbo(lambda noisy, valid, masked: logits_at(table, noisy, masked),
                  X.expand(n, R), VALID.expand(n, R), ALL_MASKS[:, None], MASK)
    weights = torch.tensor([1 / (R * comb(R, k)) for k in ALL_MASKS.sum(1).tolist()])
    assert weights.sum() == pytest.approx(1)
    torch.testing.assert_close(-(weights * bounds).sum(), exact_bound(table))


@pytest.mark.parametrize("n_steps", [1, 4])
@pytest.mark.parametrize("power", [0, 1])
def test_exactly_k_masks_at_times_of_any_density_give_the_exact_bound(power, n_steps):
    """Every time and every order of the tokens once: with power 1 the numbers of masks 1, 2, 3 have
    the probabilities 1/6, 2/6, 3/6, so 6 times are enough, or 24 in steps of 4 places."""
    table, orders = arbitrary_model(), torch.tensor(list(permutations(range(R)))) / R
    within = (torch.arange(6) + 0.5) / 6  # where in its part of 0 ... 1 a time is
    places = torch.arange(n_steps).repeat_interleave(6)
    times = stratified(within.repeat(n_steps), places, n_steps)
    t = times.repeat_interleave(len(orders))
    uniforms, n = orders.repeat(len(times), 1), torch.full((len(t),), R)
    x = X.expand(len(t), R)
    noisy, masked, weight = forward_exactly(x, t, uniforms, n, MASK, power)
    logits = logits_at(table, noisy, masked)
    estimate = R * diffusion_loss(logits, x, masked, weight, n_tokens=R * len(t))
    torch.testing.assert_close(estimate, exact_bound(table))


def test_exactly_k_tokens_are_masked_and_none_of_the_padding():
    n_tokens, t = torch.tensor([3, 5, 5, 5]), torch.tensor([0.9, 0.0, 0.41, 1 - 1e-7])
    uniforms = torch.rand(4, 5)
    uniforms[0, 3:] = 2.0
    _, masked, weight = forward_exactly(torch.zeros(4, 5).long(), t, uniforms, n_tokens, MASK)
    assert masked.sum(1).tolist() == [3, 1, 3, 5] and not masked[0, 3:].any()
    torch.testing.assert_close(weight, torch.tensor([1, 5, 5 / 3, 1]))  # R / k


def test_the_bound_is_the_mean_over_orders_and_so_above_the_models_own_log_likelihood():
    table = arbitrary_model()
    in_order = torch.stack([log_p_in_order(table, order) for order in permutations(range(R))])
    torch.testing.assert_close(exact_bound(table), -in_order.mean())
    # p(X) with the order drawn at random
    assert exact_bound(table) > -in_order.exp().mean().log() + 1e-3


def test_the_bound_is_tight_for_the_conditionals_of_a_joint_distribution():
    table, joint = consistent_model()
    torch.testing.assert_close(exact_bound(table), -joint[tuple(X[0])].log())


def test_a_wrong_model_has_a_bound_above_the_entropy_of_the_data():
    table, joint = consistent_model()
    wrong = table + 0.5 * torch.randn_like(table)

    def mean_bound(model):
        return sum(
            joint[x] * exact_bound(model, torch.tensor([x])) for x in product(range(V), repeat=R))

    entropy = -(joint * joint.log()).sum()
    torch.testing.assert_close(mean_bound(table), entropy)
    assert mean_bound(wrong) > entropy + 0.01


def test_time_one_masks_everything_and_time_zero_next_to_nothing():
    response, u = torch.zeros(2, 1000).long(), torch.rand(2, 1000).clamp(2 * EPSILON, 1 - 1e-7)
    noisy, masked, weight = forward_process(response, torch.tensor([1.0, 0.0]), u, MASK)
    assert masked[0].all() and not masked[1].any()
    assert (noisy[0] == MASK).all() and torch.equal(noisy[1], response[1])
    torch.testing.assert_close(weight, torch.tensor([1.0, 1 / EPSILON]))


def test_the_share_of_masks_is_the_time():
    times = torch.tensor([0.05, 0.3, 0.5, 0.9])
    _, masked, weight = forward_process(
        torch.zeros(4, 50_000).long(), times, torch.rand(4, 50_000), MASK)
    t = 1 / weight
    error = (t * (1 - t) / 50_000).sqrt()
    assert ((masked.float().mean(1) - t).abs() < 4 * error).all()
    torch.testing.assert_close(t, times, atol=EPSILON, rtol=0)


def test_eos_that_belongs_to_the_response_counts_and_row_padding_does_not():
    eos, answer, t = 1, torch.tensor([[2, 1, 1, 1]]), torch.ones(1)  # one word and three EOS
    logits = torch.randn(4, V)
    _, masked, _ = forward_process(answer, t, torch.zeros(1, 4), MASK)
    alone = diffusion_loss(logits, answer, masked, t, n_tokens=4)
    torch.testing.assert_close(alone, -logits.log_softmax(-1)[range(4), answer[0]].mean())
    padded = torch.cat([answer, torch.full((1, 2), eos)], dim=1)
    # with a uniform number of 2, a token is never masked
    _, masked, _ = forward_process(padded, t, torch.tensor([[0.0, 0, 0, 0, 2, 2]]), MASK)
    assert torch.equal(diffusion_loss(logits, padded, masked, t, n_tokens=4), alone)


def test_the_losses_of_the_pieces_of_a_batch_add_up():
    response, u, t = torch.randint(V, (4, 8)), torch.rand(4, 8), torch.tensor([0.2, 0.5, 0.9, 1.0])
    _, masked, weight = forward_process(response, t, u, MASK)
    logits = torch.randn(4, 8, V)

    def loss(rows):
        return diffusion_loss(logits[rows][masked[rows]], response[rows], masked[rows],
                              weight[rows], n_tokens=32)

    torch.testing.assert_close(sum(loss([i]) for i in range(4)), loss([0, 1, 2, 3]))
