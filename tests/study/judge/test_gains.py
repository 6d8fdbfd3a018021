"""Compute-equivalent gains: planted ones are found, with what becomes of them over sizes."""

import numpy as np
import pytest

from lab.errors import UserError
from lab.study.judge import gains
from lab.study.judge.gains import Side

RUNGS = ("s", "m", "l", "xl")


def made(factors, seeds=4, noise=0.003, own=0.001, price=1.0, seed=0):
    """A variant at `price` times the compute and worth `factors` times its baseline's, of L = 1.5 + 200 / C^0.25; seeds
    move both sides alike by `noise`, each by `own`."""
    draw = np.random.default_rng(seed).normal
    count = len(factors)
    compute = np.geomspace(1e10, 10.0 ** (9 + count), count)
    law = lambda c: (1.5 + 200 / c**0.25)[:, None]  # noqa: E731
    shared, spent = noise * draw(size=(count, seeds)), np.repeat(compute[:, None], seeds, axis=1)
    baseline = Side(law(compute) + shared + own * draw(size=(count, seeds)), spent)
    worth = compute * np.array(factors)
    return Side(law(worth) + shared + own * draw(size=(count, seeds)), price * spent), baseline


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [
        ((1.3, 1.3, 1.3), "holds"),
        ((0.8, 0.8, 0.8, 0.8), "holds"),
        ((1.2, 1.5, 1.9), "holds"),  # it grows
        ((1.8, 1.5, 1.25, 1.0), "shrinks"),
        ((0.6, 0.8, 0.95), "shrinks"),
        ((1.4, 1.1, 0.8), "reverses"),
        ((0.7, 1.0, 1.4), "reverses"),
        ((1.0, 1.0, 1.0), "cannot tell"),
    ],
    ids=str,
)
def test_planted_gains_are_found_and_judged(factors, verdict):
    found = gains.measured(*made(factors), RUNGS)
    np.testing.assert_allclose(found.factors, factors, rtol=0.08)
    assert found.verdict == verdict
    x = np.arange(len(factors)) * np.log(10)
    assert found.slope == pytest.approx(np.polyfit(x, np.log(factors), 1)[0], abs=0.02)


def test_intervals_hold_the_planted_gain_about_as_often_as_they_say():
    held = 0
    for seed in range(12):
        found = gains.measured(*made((1.3, 1.3, 1.3), seeds=3, seed=seed), RUNGS)
        held += sum(low <= 1.3 <= high for low, high in found.intervals)
    assert held >= 30  # of 36 intervals of 95%


def test_what_a_variant_spends_more_is_no_gain():
    """Three times the compute for what three times the compute buys: worth nothing."""
    found = gains.measured(*made((3.0, 3.0, 3.0), price=3.0), RUNGS)
    np.testing.assert_allclose(found.factors, 1.0, rtol=0.1)
    assert found.beyond == [False, False, True]


def test_noise_that_both_sides_share_is_taken_out():
    noises = dict(noise=0.01, own=0.001), dict(noise=0.0, own=0.01)
    widths = [np.diff(gains.measured(*made((1.3,) * 3, **one), RUNGS).intervals[0])[0] for one in noises]
    assert widths[0] < widths[1] / 2


def test_one_seed_has_gains_and_no_verdict():
    found = gains.measured(*made((1.3, 1.3, 1.3), seeds=1), RUNGS)
    assert found.intervals == [None] * 3 and found.slope_interval is None and found.verdict == "cannot tell"
    np.testing.assert_allclose(found.factors, 1.3, rtol=0.1)


def test_seeds_by_which_a_baseline_may_rise_tell_nothing():
    variant, baseline = made((1.3, 1.3, 1.3), noise=0.0, own=0.0, seeds=2)
    turned = baseline.losses + np.array(
        [[-0.3, 0.2], [0.0, 0.0], [0.3, -0.3]]
    )  # one of the seeds rises, the mean falls
    found = gains.measured(Side(turned - 0.02, variant.compute), Side(turned, baseline.compute), RUNGS)
    assert found.verdict == "cannot tell"


def test_a_baseline_that_larger_sizes_do_not_help_has_no_law():
    variant, baseline = made((1.3, 1.3, 1.3))
    with pytest.raises(UserError, match="the baseline's loss does not fall from m to l"):
        gains.measured(variant, Side(baseline.losses[[0, 2, 1]], baseline.compute), RUNGS)
    with pytest.raises(UserError, match="the baseline's compute does not rise from s to m"):
        gains.measured(variant, Side(baseline.losses, baseline.compute[[1, 0, 2]]), RUNGS)


def test_a_loss_below_what_any_compute_brings_is_worth_no_number():
    variant, baseline = made((1.3, 1.3, 1.3))
    with pytest.raises(UserError, match="which the baseline's law reaches with no compute"):
        gains.measured(Side(variant.losses - 1.5, variant.compute), baseline, RUNGS)
