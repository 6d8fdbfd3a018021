"""Scaling laws: planted constants are found, intervals hold them, and what cannot be told is refused."""

import math

import numpy as np
import pytest
import scaling_coverage
from scipy import optimize

from lab.errors import UserError
from lab.study.judge import scaling


def test_losses_without_noise_give_back_the_constants(monkeypatch):
    monkeypatch.setattr(scaling, "RESAMPLES", 5)
    fit = scaling.of_parameters_and_tokens(*scaling_coverage.simulated(0, noise=0.0))
    assert tuple(fit.constants) == ("E", "A", "a", "B", "b")
    np.testing.assert_allclose([*fit.constants.values()], scaling_coverage.TRUE, rtol=2e-3)
    assert fit.residual < 1e-5 and all(low <= high for low, high in fit.intervals.values())


def test_intervals_hold_planted_constants_about_as_often_as_they_say(monkeypatch):
    """Sixty intervals of 95%: tests/scaling_coverage.py counts a thousand."""
    monkeypatch.setattr(scaling, "RESAMPLES", 25)
    assert np.sum([scaling_coverage.held(seed) for seed in range(12)]) >= 45


def test_intervals_are_no_wider_than_the_noise_asks_for(monkeypatch):
    monkeypatch.setattr(scaling, "RESAMPLES", 20)
    widths = []
    for noise in (0.0005, 0.005):
        low, high = scaling.of_parameters_and_tokens(*scaling_coverage.simulated(1, noise)).intervals["a"]
        widths.append(high - low)
    assert widths[0] < 0.02 and 3 < widths[1] / widths[0] < 30


def huber(residual):
    delta = 1e-3
    return residual**2 / 2 if abs(residual) <= delta else delta * (abs(residual) - delta / 2)


def test_the_objective_is_the_summed_huber_loss_of_log_losses():
    """Against the formula run by run, and its gradient against differences."""
    n, d, losses = scaling_coverage.simulated(3)
    losses[::5] *= 1.01  # beyond the quadratic part
    theta = np.log([1.5, 300, 500, 0.32, 0.3])
    expected = sum(
        huber(math.log(1.5 + 300 / size**0.32 + 500 / amount**0.3) - math.log(loss))
        for size, amount, loss in zip(n, d, losses, strict=True)
    )
    arguments = np.log([n, d]), np.log(losses)
    value, gradient = scaling._objective(theta, *arguments)
    assert value * scaling.DELTA**2 == pytest.approx(expected, rel=1e-9)
    assert scaling._values(theta[None], *arguments)[0] == pytest.approx(value)
    differences = optimize.approx_fprime(theta, lambda at: scaling._objective(at, *arguments)[0], 1e-7)
    np.testing.assert_allclose(gradient, differences, rtol=1e-3)


def test_one_run_that_went_wrong_moves_little(monkeypatch):
    monkeypatch.setattr(scaling, "RESAMPLES", 0)
    n, d, losses = scaling_coverage.simulated(4, noise=1e-4)
    losses[5] *= 1.1
    fit = scaling.of_parameters_and_tokens(n, d, losses)
    assert fit.constants["a"] == pytest.approx(0.34, abs=0.01) and fit.intervals["a"] is None


def test_a_law_of_compute_and_its_inverse(monkeypatch):
    monkeypatch.setattr(scaling, "RESAMPLES", 20)
    compute = np.geomspace(1e12, 1e18, 7)
    fit = scaling.of_compute(compute, 1.8 + 300 / compute**0.15)
    np.testing.assert_allclose([*fit.constants.values()], (1.8, 300, 0.15), rtol=2e-3)
    np.testing.assert_allclose(fit.law.compute(fit.law.loss(compute)), np.log(compute), rtol=1e-9)
    assert fit.law.compute(1.7) == math.inf


SIX = [1e6, 1e6, 1e6, 1e7, 1e7, 1e7]


@pytest.mark.parametrize(
    ("n", "d", "told"),
    [
        (
            SIX,
            [1, 2, 3, 4, 5, 6],
            "there are 2 sizes N, 6 amounts of tokens D and 6 pairs of both, and it needs 3, 3 and 6",
        ),
        ([1, 2, 3, 4, 5], [5, 1, 4, 2, 3], "5 sizes N, 5 amounts of tokens D and 5 pairs of both, and it needs 3, 3"),
        ([1, 2, 3] * 4, [4, 1, 2] * 4, "3 sizes N, 3 amounts of tokens D and 3 pairs of both"),  # seeds are no sizes
        ([1, 2, 3, 4, 5, 6], [7] * 6, "6 sizes N, 1 amounts of tokens D and 6 pairs"),
        ([1, 2, 3, 4, 5, 6], [20, 40, 60, 80, 100, 121], "N decides D, as where D / N is constant"),
        ([1, 2, 3, 4, 5, 6], [1, 4, 9, 16, 25, 36], "N decides D"),
    ],
    ids=str,
)
def test_a_law_that_runs_cannot_tell_is_refused_in_one_line(n, d, told):
    with pytest.raises(UserError, match=told) as error:
        scaling.of_parameters_and_tokens(n, d, [3.0] * len(n))
    assert "L = E + A / N^a + B / D^b cannot be fitted" in str(error.value) and "\n" not in str(error.value)


def test_a_law_of_two_amounts_of_compute_is_refused():
    with pytest.raises(UserError, match=r"there are 2 amounts of compute C, and it needs 3"):
        scaling.of_compute([1e9, 1e9, 1e10], [3.0, 3.1, 2.9])


def test_few_runs_have_a_law_without_intervals():
    fit = scaling.of_compute([1e9, 1e10, 1e11], [3.0, 2.5, 2.2])
    assert set(fit.intervals.values()) == {None} and fit.residual < 1e-3
