"""Position maps: mapped times are exact up to a declared bound, rows end where a map does, layers have their own."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels.bands import Band
from lab.kernels.rules import parse
from lab.model import position_maps

CAUSAL = parse("causal")


def position_of(name: str, trained: int = 0, **options):
    made = tiny.config().model.position
    made.trained = trained
    made.map.update(name=name, **options)
    return made


def at(times) -> Coordinates:
    times = np.asarray(times, np.int32)[None]
    return Coordinates(0 * times, 0 * times, times, times)


def mapped(position, times) -> list[np.ndarray]:
    """Times of queries and keys as they rotate, float64 of what the kernel computes in int32 and float32."""
    found = []
    for turns in position_maps.POSITION_MAPS[position.map.name].pieces(position):
        band = Band(CAUSAL, None, turns.q_time, turns.k_time, over=turns.over)
        found += [np.asarray(band.mapped(at(times), time).time, np.float64)[0] for time in (band.q_time, band.k_time)]
    return found


def leaky_exactly(w: int, leak: Fraction, times) -> list[np.ndarray]:
    """Of near pairs and of far ones, in whole numbers of Python that have no end."""
    far = [float(w + (int(t) - w) / leak) for t in times], [float(int(t) / leak) for t in times]
    return [np.asarray(times, float)] * 2 + [np.array(one) for one in far]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.data())
def test_at_the_bound_mapped_times_are_exact_and_beyond_it_they_are_refused(denominator, data):
    numerator = data.draw(st.integers(denominator, 64 * denominator))
    leak, w = Fraction(numerator, denominator), data.draw(st.integers(2, 2**12))
    position = position_of("leaky", window=w, leak=float(leak))
    a, b = leak.numerator, leak.denominator
    most = (2**24 - w * (a - b)) // b + 1  # of which the last time is 2^24 over a
    for times in (most, data.draw(st.integers(1, most))):
        position_maps.check_times(position, "x", times)
        last = np.unique(np.maximum([0, times // 2, times - 2, times - 1], 0))
        for got, wanted in zip(mapped(position, last), leaky_exactly(w, leak, last), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2**-23)
    if most < 2**24:
        told = f"x: model.position.map.name = 'leaky' makes of {most + 1} time steps .* choose at most {most} of them"
        with pytest.raises(UserError, match=told):
            position_maps.check_times(position, "x", most + 1)


def test_where_int32_overflows_is_refused():
    """64 x 2^24 - what a window of 2^24 makes - is no int32; nor is what 2^24 steps of a leak of 159 / 20 are."""
    for options, times in (dict(window=2**24, leak=64.0), 2**24), (dict(window=8192, leak=7.95), 2**24):
        with pytest.raises(UserError, match=r"above 16777216, to which float32 counts; choose at most .* for: leak, w"):
            position_maps.check_times(position_of("leaky", **options), "x", times)


@pytest.mark.parametrize(("name", "options"), [
    ("hybrid", dict(cf=1.8)), ("hybrid", dict(cf=1.25, rounding="round")), ("rerope", {}), ("lm-infinite", {}),
    ("self-extend", dict(group=8)), ("dca", {}), ("streaming", {}), ("none", {}), ("leaky", dict(leak=16.0)),
])  # fmt: skip
def test_maps_of_the_studies_reach_a_million_tokens(name, options):
    position_maps.check_times(position_of(name, trained=8192, **options), "x", 2**20)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 7), st.data())
def test_self_extend_reaches_as_far_as_its_distances_were_trained(L, G, data):
    W = G * data.draw(st.integers(1, max(1, L // G)))
    if W > L:
        return
    position = position_of("self-extend", trained=L, window=W, group=G)
    distance = lambda i, j: i - j if i - j < W else i // G - j // G + W - W // G  # noqa: E731
    reaches = lambda N: all(distance(i, j) < L for i in range(N) for j in range(i + 1))  # noqa: E731
    most = position_maps.self_extend_most(position)
    assert reaches(most) and not reaches(most + 1)
    position_maps.check_reach(position, "x", most)
    with pytest.raises(UserError, match=f"x: .*'self-extend' reaches {most} tokens of model.position.trained = {L}"):
        position_maps.check_reach(position, "x", most + 1)


HYBRID = ("position.map.name", "hybrid"), ("position.map.cf", 3.0)
WINDOW = (("rule", "causal & window(4)"),)
L = 6


def logits(pattern: tuple, silent: int | None = None, **position):
    """[1, 20, C] of two layers of the same weights under a pattern; `silent`: a layer whose attention adds nothing."""
    fields = dict(ratio=0.0, unselected="time", trained=L, theta=50.0) | position
    made = tiny.config(
        model__pattern=pattern, model__rule="causal", run__implementation="reference",
        **{f"model__position__{name}": value for name, value in fields.items()},
    )  # fmt: skip
    model = tiny.model(made)
    if silent is not None:
        weight = model.blocks[silent].mixer.o
        weight[...] = 0 * weight[...]
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (1, 20)).astype(np.int32)
    return model, np.asarray(model(tokens, dataclasses.replace(at(np.arange(20)), branch=np.ones((1, 20), np.int32))))


@pytest.mark.slow
def test_a_method_of_chosen_layers_changes_these_alone():
    """Global layers stretched, those with a window not: with one of both silent, the other is as it is by itself."""
    chosen, none, every = (WINDOW, HYBRID), (WINDOW, ()), ((*WINDOW, *HYBRID), HYBRID)
    both = logits(chosen)[1]
    for silent, alike, unlike in ((1, none, every), (0, every, none)):
        found = logits(chosen, silent)[1]
        np.testing.assert_allclose(found, logits(alike, silent)[1], atol=1e-5)
        assert np.abs(found - logits(unlike, silent)[1])[:, L + 3 :].max() > 1e-3
        assert np.abs(found - both).max() > 1e-3
    np.testing.assert_allclose(both[:, :L], logits(none)[1][:, :L], atol=1e-5)


def test_a_dropped_rotation_is_one_by_times_of_zero():
    """DroPE, and the layers without a rotation (NoPE): every query and key turns as the first token does."""
    model, rotating = logits(((), ()))
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (1, 20)).astype(np.int32)
    still = at(np.arange(20))
    still = dataclasses.replace(still, time=0 * still.time, branch=0 * still.time + 1)
    none = tiny.config(model__position__name="none").model.position
    dropped = logits(((), ()), **{name: none[name] for name in ("name", "ratio", "unselected", "trained", "theta")})[1]
    np.testing.assert_allclose(dropped, np.asarray(model(tokens, still)), atol=1e-5)
    assert np.abs(dropped - rotating).max() > 1e-3
