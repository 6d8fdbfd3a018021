"""Intervals, p-values and corrections against other definitions of the same things."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lab.study.judge import statistics

DIFFERENCES = st.lists(st.floats(-1, 1), min_size=2, max_size=12).filter(lambda values: np.std(values) > 1e-6)


@given(DIFFERENCES)
def test_interval_and_p_against_their_formulas(values):
    found, n = statistics.estimate(values), len(values)
    error = np.std(values, ddof=1) / math.sqrt(n)
    reach = stats.t.ppf(0.975, n - 1) * error
    assert found.t_interval == pytest.approx((np.mean(values) - reach, np.mean(values) + reach), abs=1e-9)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(np.mean(values)) / error, n - 1), abs=1e-9)
    assert statistics.half_widths(np.array(values)[:, None])[0] == pytest.approx(reach, abs=1e-9)


@given(st.lists(st.integers(1, 20), min_size=2, max_size=12).filter(lambda x: len({*x}) > 1), st.integers(-20, 20))
def test_estimates_move_and_turn_with_the_differences(values, shift):
    """Losses have no zero of their own; and the better of two is the worse seen from the other side."""
    here, there = statistics.estimate(values), statistics.estimate([shift - value for value in values])
    low, high = here.t_interval
    assert there.t_interval == pytest.approx((shift - high, shift - low), abs=1e-9)
    assert there.detectable == pytest.approx(here.detectable)


@pytest.mark.parametrize("n", [4, 6, 12])
def test_bootstrap_follows_the_skew_that_student_t_ignores(n):
    """Exponential differences: the long tail is above, so that the upper end is further off."""
    reaches = []
    for values in np.random.default_rng(n).exponential(size=(50, n)):
        found = statistics.estimate(values)
        reaches.append((found.mean - found.bootstrap_interval[0], found.bootstrap_interval[1] - found.mean))
    assert np.median(np.divide(*np.transpose(reaches))) < 0.8


@given(st.lists(st.none() | st.floats(0, 1), max_size=7))
def test_holm_is_the_closed_test_of_bonferroni(values):
    """A hypothesis falls if every set of hypotheses that holds it falls by Bonferroni."""
    known = [place for place, p in enumerate(values) if p is not None]
    for place, adjusted in enumerate(statistics.holm(values)):
        if values[place] is None:
            assert adjusted is None
            continue
        sets = [s for size in range(len(known)) for s in itertools.combinations(known, size + 1) if place in s]
        wanted = max(min(1.0, len(s) * min(values[other] for other in s)) for s in sets)
        assert adjusted == pytest.approx(wanted)


@pytest.mark.parametrize("n", [3, 5, 10, 20])
def test_detectable_difference_is_found_four_times_in_five(n):
    drawn = np.random.default_rng(n).normal(statistics.detectable(n), 1.0, (40_000, n))
    assert np.mean(stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)


def test_what_few_seeds_cannot_tell_is_none():
    assert statistics.estimate([]) == statistics.Estimate(0, None)
    assert statistics.estimate([0.5]) == statistics.Estimate(1, 0.5)
    assert statistics.estimate([0.1, 0.2, 0.4]).bootstrap_interval is None
    assert statistics.estimate([0.1, 0.2, 0.4, 0.3]).bootstrap_interval


@pytest.mark.parametrize(("values", "resolution"), [
    ([0.0] * 5, 0.0),
    ([0.1] * 5, 0.0),  # 0.1 five times has a mean that is not 0.1
    ([1e9, 1e9], 0.0),
    ([0.1, 0.1 + 1e-7, 0.1 - 1e-7], 2.4e-7),  # of losses around 3
])  # fmt: skip
def test_differences_without_a_spread_that_can_be_measured_tell_nothing(values, resolution):
    found = statistics.estimate(values, resolution)
    assert (found.n, found.mean) == (len(values), pytest.approx(np.mean(values)))
    assert (found.p, found.t_interval, found.bootstrap_interval, found.detectable) == (None,) * 4


def test_a_spread_above_the_resolution_is_one():
    values = [0.1, 0.1 + 1e-6, 0.1 - 1e-6]
    assert statistics.estimate(values, 2.4e-7) == statistics.estimate(values) and statistics.estimate(values).p < 1e-8


def test_a_resample_of_the_mean_alone_counts_as_no_difference():
    """Five times 0.25 has neither a mean nor a spread: 0 / 0, which is no infinity at either end."""
    values = [0.1, 0.2, 0.3, 0.4, 0.25]
    near = [estimate.bootstrap_interval for estimate in map(statistics.estimate, (values, [*values[:4], 0.2503]))]
    assert near[0] == pytest.approx(near[1], abs=0.01)


def test_rare_differences_have_no_bootstrap():
    rare = statistics.estimate([0.0, 0.0, 0.0, 0.0, 1.0])  # most resamples have no spread
    assert rare.bootstrap_interval is None and math.isfinite(rare.p)


@given(DIFFERENCES)
def test_the_same_differences_give_the_same_bootstrap(values):
    assert statistics.estimate(values).bootstrap_interval == statistics.estimate(values).bootstrap_interval


@pytest.mark.matrix("n")
@pytest.mark.slow
@pytest.mark.parametrize("effects", [0, 3], ids=["null", "mixed"])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_holm_keeps_the_family_error_under_five_percent(n, effects):
    """Families of ten variants with one baseline, of which `effects` do something."""
    losses = np.random.default_rng(n).normal(size=(40_000, n, 11))
    losses[:, :, 1 : 1 + effects] += 2.0
    p = stats.ttest_1samp(losses[:, :, 1:] - losses[:, :, :1], 0.0, axis=1).pvalue
    wrong = [min(statistics.holm(family)[effects:]) < 0.05 for family in p.tolist()]
    assert np.mean(wrong) < 0.05
    uncorrected = (p[:, effects:].min(axis=1) < 0.05).mean()
    assert uncorrected > 0.15  # what the correction is for
