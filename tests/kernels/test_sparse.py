"""Sparse rules in the order that saves tiles: the same attention as all pairs in float64."""

import jax
import numpy as np
import pytest
from test_order import moved

from lab import kernels
from lab.coordinates import Coordinates
from lab.kernels import rules, tiled

T, K, SIDE = 192, 4, 16


def dense(q, k, v, weight, seen):
    """(output, gradients of sum(output * weight)) of one row and head, in float64."""
    q, k, v, weight = (np.asarray(x[0, :, 0], np.float64) for x in (q, k, v, weight))
    s = np.where(seen, np.exp(q @ k.T / np.sqrt(K)), 0)
    p = s / np.maximum(s.sum(-1, keepdims=True), 1e-300)
    dp = weight @ v.T
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(K)
    return p @ v, (ds @ k, ds.T @ q, p.T @ weight)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["causal & strided(16)", "causal & (summary(16, 2) | every(16))"])
def test_attention_over_patches_is_that_over_all_pairs(monkeypatch, text):
    monkeypatch.setattr(tiled, "tile_sizes", lambda T, S: (SIDE, SIDE))
    rule, alone = rules.parse(text), Coordinates.single(1, T)
    order, share = kernels.arrange(alone, [rule], "tiled")
    assert (order != np.arange(T)).any() and share < 0.5
    at = moved(alone, order)
    rng = np.random.default_rng(0)
    q, k, v, weight = (rng.normal(size=(1, T, 1, K)).astype(np.float32) for _ in range(4))
    tiles = kernels.plan_tiles(at, at, rule, "tiled")

    def attended(q, k, v):
        return kernels.attend(q, k, v, at, at, rule, implementation="tiled", tiles=tiles)

    found, pull = jax.vjp(attended, q, k, v)
    time = at.time[0]
    back = np.subtract.outer(time, time)
    seen = (back >= 0) & ((back < 16) | (back % 16 == 0) if "strided" in text else (time % 16 >= 14) | (back % 16 == 0))
    assert int(tiles.total.sum()) < (T // SIDE) ** 2 / 2
    expected, gradients = dense(q, k, v, weight, seen)
    np.testing.assert_allclose(found[0, :, 0], expected, atol=2e-5)
    for one, other in zip(pull(weight), gradients, strict=True):
        np.testing.assert_allclose(one[0, :, 0], other, atol=5e-5)
