"""A step of decoding of few queries a row, which read large tiles; one does with one product for all of few heads."""

import functools

import exact
import jax
import numpy as np
import packs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import kernels
from lab.coordinates import Coordinates
from lab.kernels import rules, tiled, tiled_loops
from lab.kernels.bias import Bias

K, V, SCALE = 8, 6, 0.7
SEED = st.integers(0, 2**32 - 1)


@functools.cache
def attending(rule: rules.Rule, softcap: float | None, lanes: bool):
    """(arrays, coordinates, slopes or None, limits or None, cotangents) -> (o, lse), gradients of arrays and slopes"""

    def run(arrays, at, slope_H, limits, cotangents):
        planned = kernels.plan_tiles(*at, rule, "tiled", limits=limits, lanes=True) if lanes else None

        def attend(arrays, slope_H):
            bias = None if slope_H is None else Bias(rules.k.time - rules.q.time, slope_H=slope_H)
            return kernels.attend(
                *arrays, *at, rule, scale=SCALE, softcap=softcap, implementation="tiled", tiles=planned,
                return_lse=True, bias=bias, limits=limits,
            )  # fmt: skip

        outputs, pull = jax.vjp(attend, arrays, slope_H)
        return outputs, pull(cotangents)

    return jax.jit(run)


def check(rule, at, heads, rng, *, softcap=None, sloped=False, limits=None) -> None:
    """Against matrices of float64, forward and backward."""
    (H, G), (queries, keys), (B, T), S = heads, at, at[0].shape, at[1].shape[1]
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    q, k, v, do, dlse = normal(B, T, H, K), normal(B, S, G, K), normal(B, S, G, V), normal(B, T, H, V), normal(B, T, H)
    slope_H = normal(H) / S if sloped else None
    shown = np.asarray(rules.visible(rule if limits is None else rules.forked(rule), queries, keys, limits))
    far_BTS = np.asarray(keys.time)[:, None] - np.asarray(queries.time)[:, :, None]
    added = far_BTS[:, None] * np.float64(slope_H)[:, None, None] if sloped else 0.0
    outputs, (ds, dbias, dv) = exact.attend(exact.scores(q, k, SCALE), v, shown, do, dlse, added, softcap)
    run = attending(rule, softcap, limits is not None)
    found, ((*of_arrays, dv_found), dslope_H) = run((q, k, v), at, slope_H, limits, (do, dlse))
    np.testing.assert_allclose(found[0], outputs[0], atol=2e-5)
    np.testing.assert_allclose(found[1], outputs[1], atol=2e-5)
    for one, other in zip((*of_arrays, dv_found), (*exact.of_scores(ds, q, k, SCALE), dv), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1, np.abs(other).max()))
    if sloped:
        other = np.einsum("bhts,bts->h", dbias, far_BTS)
        np.testing.assert_allclose(dslope_H, other, atol=2e-5 * max(1, np.abs(other).max()))


@pytest.mark.parametrize(
    ("T", "S", "tile", "heads", "softcap", "sloped"),
    [
        (1, 1024, 256, (8, 2), None, False),
        (1, 768, 256, (6, 6), 1.5, True),
        (3, 1280, 256, (4, 2), 1.5, False),
        pytest.param(1, 640, 128, (4, 1), None, True, marks=pytest.mark.slow),
        pytest.param(1, 1024, 256, (tiled.SPREAD // 2 + 2, 2), 1.5, False, marks=pytest.mark.slow),
        pytest.param(1, 200, 64, (8, 4), None, False, marks=pytest.mark.slow),  # which no longer tile divides
        pytest.param(tiled.FEW, 1024, 256, (8, 8), None, True, marks=pytest.mark.slow),
        pytest.param(2, 1100, 64, (8, 2), None, False, marks=pytest.mark.slow),
    ],
)
@given(SEED, st.sampled_from(["ragged", "scattered"]))
@settings(max_examples=3)
def test_few_queries_read_large_tiles(T, S, tile, heads, softcap, sloped, seed, pack):
    assert tiled.tile_sizes(T, S) == (T, tile)
    rng = np.random.default_rng(seed)
    keys = packs.PACKS[pack](rng, 2, S)
    some = rng.integers(0, S, T)
    check(rules.causal, (keys.map(lambda x: x[:, some]), keys), heads, rng, softcap=softcap, sloped=sloped)


def pages(rng, rows: int, lanes: int, count: int, page: int = 64):
    """(queries of lanes, keys, limits of each row): each page is a lane's, the stem's or free, in part filled."""
    owner = rng.integers(-1, lanes + 1, (rows, count, 1))
    held = np.where(np.arange(page) < rng.integers(1, page + 1, (rows, count, 1)), owner, -1).reshape(rows, -1)
    at = lambda node, time: Coordinates(np.minimum(node, 0), np.where(node < lanes, node + 1, 0), time, time, node)  # noqa: E731
    limits = np.full((rows, lanes + 1, lanes + 1), rules.HIDDEN)
    limits[:, range(lanes), range(lanes)] = rules.ENDLESS
    limits[:, :lanes, lanes] = rng.choice([rules.HIDDEN, rules.ENDLESS], (rows, lanes))
    queries = at(np.where(rng.random((rows, lanes)) < 0.2, -1, np.arange(lanes)), np.full((rows, lanes), held.shape[1]))
    keys = at(held, np.tile(np.arange(held.shape[1]), (rows, 1)))
    int32 = lambda x: x.astype(np.int32)  # noqa: E731
    return queries.map(int32), keys.map(int32), int32(limits)


@given(SEED)
@settings(max_examples=4)
def test_lists_of_single_queries_are_read_several_at_once(seed):
    """Three at once of 22, of unlike lengths: the last turn does some again."""
    rng, heads, sloped = np.random.default_rng(seed), (4, 2), seed % 2 == 0
    *at, limits = pages(rng, 2, tiled.FEW + 3, 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_loops, "AT_ONCE", 3 * 64 * 2 * K)
        check(rules.own_branch, at, heads, rng, softcap=1.5, sloped=sloped, limits=limits)
