"""The learning rate of stage 0."""

import pytest

from data.pretraining.optimization import learning_rate


def test_the_learning_rate_rises_in_a_line_and_falls_to_two_percent():
    rates = [learning_rate(step, 1000, 100) for step in range(1001)]
    assert rates[0] == 0.01 and rates[49] == 0.5 and max(rates) == 1
    assert rates[-1] == pytest.approx(0.02)
    assert all(a >= b for a, b in zip(rates[100:], rates[101:]))
