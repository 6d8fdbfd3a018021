"""Filters and penalties against loops in float64, draws against probabilities, and who depends on whom."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.decode import programs, sampling
from lab.decode.sampling import Sampling
from lab.errors import UserError

B, N, C = 3, 4, 11
SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.integers(0, C + 2),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
    seed=st.integers(0, 2**32 - 1),
)


def stacked(of_rows: list[Sampling]) -> Sampling:
    types = (np.float32, np.int32, np.float32, np.float32, np.float32, np.uint32)
    return Sampling(*(np.array(x, t) for x, t in zip(zip(*of_rows, strict=True), types, strict=True)))


@functools.cache
def next_tokens():
    return jax.jit(lambda z, seen, *rest: sampling.next_tokens(z, lambda: seen, *rest))


def likely(z: np.ndarray, k: int, p: float, m: float) -> set[int]:
    """Token by token, the likeliest first."""
    order = sorted(range(len(z)), key=lambda token: -z[token])[: k or len(z)]
    weights = np.exp(z[order] - z.max())
    weights /= weights.sum()
    kept, before = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        if before < p and weight >= m * weights[0]:
            kept.add(token)
        before += weight
    return kept


@given(st.integers(0, 2**32 - 1), st.integers(0, C + 2), st.floats(0.02, 0.98), st.sampled_from([0.0, 0.03, 0.3, 1.0]))
@settings(max_examples=40)
def test_filters_keep_what_a_loop_keeps(seed, k, p, m):
    z = np.random.default_rng(seed).normal(scale=2, size=(B, N, C))
    kept = np.isfinite(
        sampling.likely(z.astype(np.float32), *(np.full(B, x) for x in (k, np.float32(p), np.float32(m))))
    )
    for row, branch in np.ndindex(B, N):
        found, expected = {*np.flatnonzero(kept[row, branch])}, likely(z[row, branch], k, p, m)
        slack = likely(z[row, branch], k, p - 1e-5, m + 1e-5), likely(z[row, branch], k, p + 1e-5, m - 1e-5)
        assert found == expected or slack[0] <= found <= slack[1]  # float32 on the very edge


@pytest.mark.parametrize("p", [1e-37, 1e-39, 5e-324])
def test_however_small_a_share_is_the_likeliest_token_is_kept(p):
    """Float32 has no such number, or flushes it to 0."""
    z = np.array([[[0.0, 3.0, 1.0]]], np.float32)
    kept = sampling.likely(z, np.array([0]), np.array([p], np.float32), np.array([0.0], np.float32))
    np.testing.assert_array_equal(kept, [[[-np.inf, 3.0, -np.inf]]])


def test_a_penalty_makes_seen_tokens_less_likely():
    rng = np.random.default_rng(0)
    z, seen = rng.normal(size=(2, 1, C)).astype(np.float32), rng.random((2, 1, C)) < 0.5
    got = sampling.penalised(z, seen, np.array([2.0, 1.0], np.float32))
    expected = [[z / 2 if z > 0 else z * 2] if s else [z] for z, s in zip(z[0, 0], seen[0, 0], strict=True)]
    np.testing.assert_array_equal(got[0, 0], np.concatenate(expected))
    np.testing.assert_array_equal(got[1], z[1])


def test_tokens_are_drawn_by_their_probabilities():
    """Of one row and many branches; by temperature, too. Greedy rows take the largest."""
    draws, z = 4000, np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    asked = stacked([Sampling(1.0), Sampling(2.0), Sampling()])
    branch = np.tile(np.arange(draws), (3, 1))
    tokens = next_tokens()(
        np.tile(z, (3, draws, 1)), np.zeros((3, draws, 4), bool), asked, np.arange(3), branch, 0 * branch
    )
    for row, temperature in enumerate((1.0, 2.0)):
        p = np.exp(z / temperature) / np.exp(z / temperature).sum()
        shares = np.bincount(tokens[row], minlength=4) / draws
        assert (np.abs(shares - p) < 5 * np.sqrt(p * (1 - p) / draws)).all()
    assert (np.asarray(tokens[2]) == 2).all()


@given(st.integers(0, 2**32 - 1), st.lists(SETTINGS, min_size=2 * B, max_size=2 * B))
@settings(max_examples=25)
def test_what_is_drawn_depends_on_nobody_else(seed, given_settings):
    """One request in another row, among others that ask for other things: the same tokens."""
    rng = np.random.default_rng(seed)
    z, seen = rng.normal(size=(2, B, N, C)).astype(np.float32), rng.random((2, B, N, C)) < 0.3
    of_request, branch, step = (rng.integers(0, 2**31 - 1, (2, B)), *rng.integers(0, 9, (2, 2, B, N)))
    asked = [given_settings[:B], given_settings[B:]]
    one, other = rng.integers(0, B, 2)
    for x in (z, seen, of_request, branch, step):
        x[1, other] = x[0, one]
    asked[1][other] = asked[0][one]
    drawn = [next_tokens()(z[i], seen[i], stacked(asked[i]), of_request[i], branch[i], step[i]) for i in range(2)]
    np.testing.assert_array_equal(drawn[0][one], drawn[1][other])


def test_seed_request_branch_and_step_each_draw_anew():
    base = (5, 6, 7, 8)
    others = [tuple(x + (i == j) for j, x in enumerate(base)) for i in range(4)] + [(6, 5, 7, 8), (5, 6, 8, 7)]
    noises = [np.asarray(sampling.noise(*each, 16)) for each in (base, base, *others)]
    np.testing.assert_array_equal(noises[0], noises[1])
    assert all(np.abs(noises[0] - noise).max() > 0.1 for noise in noises[2:])


@pytest.mark.parametrize(("asked", "says"), [
    (dict(temperature=-1.0), "temperature = -1.0 is not valid; choose 0, which is greedy, or a number"),
    (dict(temperature=float("nan")), "temperature = nan is not valid"),
    (dict(temperature=1.0, top_k=2.5), "top_k = 2.5 is not valid; choose a whole number of at least 0"),
    (dict(temperature=1.0, top_p=0), "top_p = 0 is not valid; choose a number above 0 and at most 1"),
    (dict(temperature=1.0, min_p=1.5), "min_p = 1.5 is not valid; choose a number from 0 to 1"),
    (dict(repetition_penalty=0), "repetition_penalty = 0 is not valid"),
    (dict(seed=-1), "seed = -1 is not valid; choose a whole number from 0 to 2**32 - 1"),
    (dict(seed=True), "seed = True is not valid"),
    (dict(top_p=0.5), "top_p = 0.5 means nothing at temperature = 0"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(asked, says):
    with pytest.raises(UserError) as refused:
        sampling.check(Sampling(**asked))
    assert says in str(refused.value)


@given(SETTINGS, st.integers(0, 2**32 - 1))
def test_what_is_asked_reaches_the_program_as_it_is(asked, stream):
    """Through one array of int32, and lanes that ask for nothing have the defaults."""
    draws = programs.Draws(2, 3)
    draws.put(1, 2, stream=stream, **asked._asdict())
    lanes = programs.Draws.unpacked(jax.numpy.asarray(draws.packed))
    assert int(lanes["stream"][1, 2]) == stream
    for place, expected in (((1, 2), asked), ((0, 2), Sampling())):
        found = {name: lanes[name][place].item() for name in Sampling._fields}
        assert found == pytest.approx(expected._asdict(), rel=1e-6)
