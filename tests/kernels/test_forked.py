"""Texts that fork and join: rules with a table of limits, against loops over pairs in float64."""

import dataclasses
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
from lab.kernels import rules, tiled, tiles

M, B, T, S = 5, 2, 70, 150  # nodes, rows, queries and keys: several tiles of either
STEP, MANY = (3, 600), (70, 600)  # queries and keys of steps of decoding, whose lists GPUs deal into parts
FORKED = [name for name, row in kernels.IMPLEMENTATIONS.items() if row.forks]
PLAIN = {
    "own_branch": lambda q, k, own: (k.branch == 0 or own) and k.time <= q.time,
    "all_branches": lambda q, k, own: k.time < q.time or k.index == q.index,
    "own_branch & window(5)": lambda q, k, own: (k.branch == 0 or own) and 0 <= q.time - k.time < 5,
}


def drawn(rng, run: int, T: int = T, S: int = S):
    """(queries, keys, limits): nodes in runs of so many tokens."""

    def at(length):
        node = np.repeat(rng.integers(0, M, (B, -(-length // run))), run, axis=1)[:, :length]
        return dataclasses.replace(packs.interleaved(rng, B, length), node=node.astype(np.int32))  # fmt: skip

    limits = rng.choice([rules.HIDDEN, -1, 0, 3, 9, rules.ENDLESS], (B, M, M)).astype(np.int32)
    return at(T), at(S), limits


def seen(name: str, q, k, limits) -> np.ndarray:
    """bool [B, T, S], pair by pair."""
    found = np.zeros((B, q.shape[1], k.shape[1]), bool)
    for b, t, s in np.ndindex(found.shape):
        one, other = packs.token(q, b, t), packs.token(k, b, s)
        limit = limits[b, one.node, other.node]
        shared = one.segment == other.segment and one.segment >= 0 and limit > rules.HIDDEN
        found[b, t, s] = shared and PLAIN[name](one, other, other.time <= limit)
    return found


@functools.cache
def attending(name: str, implementation: str):
    """(o, lse), and gradients of q, k and v, for cotangents of both."""

    def run(q, k, v, queries, keys, limits, cotangents):
        def attend(q, k, v):
            options = dict(implementation=implementation, return_lse=True, limits=limits)
            return kernels.attend(q, k, v, queries, keys, rules.parse(name), **options)

        outputs, pull = jax.vjp(attend, q, k, v)
        return *outputs, *pull(cotangents)

    return jax.jit(run)


@pytest.mark.matrix("implementation")
@pytest.mark.parametrize("implementation", FORKED)
@pytest.mark.parametrize(
    ("name", "shape", "K"),
    [
        ("own_branch", (T, S), 8),
        ("own_branch", STEP, 8),
        pytest.param("own_branch", MANY, 72, marks=pytest.mark.slow),  # of which a Triton program has half a tile
        pytest.param("all_branches", (T, S), 8, marks=pytest.mark.slow),
    ],
    ids=str,
)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 64]))
@settings(max_examples=3)
def test_attention_sees_what_limits_show(name, shape, K, implementation, seed, run):
    rng = np.random.default_rng(seed)
    queries, keys, limits = drawn(rng, run, *shape)
    T, S = shape
    q, k, v, do = (rng.normal(size=(B, *x)).astype(np.float32) for x in ((T, 4, K), (S, 2, K), (S, 2, 6), (T, 4, 6)))
    dlse, s = rng.normal(size=(B, T, 4)).astype(np.float32), exact.scores(q, k, K**-0.5)
    outputs, (ds, _, dv) = exact.attend(s, v, seen(name, queries, keys, limits), do, dlse)
    with kernels.interpreted():
        found = attending(name, implementation)(q, k, v, queries, keys, limits, (do, dlse))
    for x, y in zip(found, (*outputs, *exact.of_scores(ds, q, k, K**-0.5), dv), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5)


def test_parts_of_lists_hold_every_tile_once_where_its_index_and_branch_say():
    """In the order of index, wherever it lies."""
    rng, parts = np.random.default_rng(0), 3
    queries, keys, limits = drawn(rng, 4)
    rule, q, k = rules.forked(rules.own_branch), tiles.pad_to_tiles(queries, 4), tiles.pad_to_tiles(keys, 4)
    whole, dealt = (jax.device_get(tiles.make_tiles(rule, q, k, 4, 4, limits, n)) for n in (1, parts))
    n, real = whole.total.shape[1], np.asarray(k.segment >= 0).reshape(B, -1, 4)
    least = lambda x: np.where(real, np.asarray(x).reshape(B, -1, 4), 2**29).min(-1)  # noqa: E731
    index, branch = least(k.index), least(k.branch)
    for b, i in np.ndindex(whole.total.shape):
        listed = [dealt.keys[b, p * n + i, : dealt.total[b, p * n + i]] for p in range(parts)]
        assert sorted(np.concatenate(listed)) == sorted(whole.keys[b, i, : whole.total[b, i]])
        for p, each in enumerate(listed):
            assert ((index[b, each] // 4 + branch[b, each]) % parts == p).all()
            assert (np.diff(index[b, each]) >= 0).all()


@pytest.mark.parametrize("name", PLAIN)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 8]))
@settings(max_examples=3)
def test_lists_hold_every_tile_that_is_seen_in_the_order_of_index(name, seed, run):
    """And leave some out that the table alone hides."""
    queries, keys, limits = drawn(np.random.default_rng(seed), run)
    rule = rules.forked(rules.parse(name))
    shown = np.asarray(rules.visible(rule, queries, keys, limits))
    np.testing.assert_array_equal(shown, seen(name, queries, keys, limits))
    q, k = tiles.pad_to_tiles(queries, 4), tiles.pad_to_tiles(keys, 4)
    made = jax.device_get(tiles.make_tiles(rule, q, k, 4, 4, limits))
    pad = ((0, 0), (0, q.shape[1] - T), (0, k.shape[1] - S))
    every = np.pad(shown, pad).reshape(B, q.shape[1] // 4, 4, k.shape[1] // 4, 4)
    blocks, real = every.any((2, 4)), np.asarray(q.segment >= 0).reshape(B, -1, 4)
    first = np.where(np.asarray(k.segment) < 0, 2**29, k.index).reshape(B, -1, 4).min(-1)
    for b, i in np.ndindex(made.total.shape):
        listed = made.keys[b, i, : made.total[b, i]]
        assert all(every[b, i, real[b, i], j].all() for j in listed[: made.full[b, i]])
        assert {*np.flatnonzero(blocks[b, i])} <= {*listed.tolist()}
        assert (np.diff(first[b, listed]) >= 0).all()


def test_a_tile_of_a_node_that_is_hidden_is_left_out():
    queries, keys, _ = drawn(np.random.default_rng(0), 64)
    queries, keys = (dataclasses.replace(at, segment=0 * at.segment) for at in (queries, keys))
    limits = np.full((B, M, M), rules.HIDDEN, np.int32)
    none = tiled.plan(rules.forked(rules.own_branch), queries, keys, limits)
    assert not np.asarray(none.total).any()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=5)
def test_ranges_of_nodes_show_what_their_limits_do(seed):
    """Of own_branch, with every time shown: a tile is left out where no limit of its nodes shows anything."""
    rng = np.random.default_rng(seed)
    limits = rng.choice([rules.HIDDEN, -1, rules.ENDLESS], (1, M, M), p=[0.5, 0.2, 0.3]).astype(np.int32)
    nodes = np.sort(rng.integers(0, M, (2, 12, 4)), axis=-1).astype(np.int32)  # of tiles of four queries, or keys
    at = lambda of, branch, time: Coordinates(0 * of, 0 * of + branch, 0 * of + time, 0 * of + time, of)  # noqa: E731
    queries, keys = at(nodes[0].reshape(1, -1), 1, 9), at(nodes[1].reshape(1, -1), 2, 3)
    kinds = np.asarray(tiles.tile_kinds(rules.forked(rules.own_branch), queries, keys, 4, 4, limits=limits))
    for i, j in np.ndindex(12, 12):
        (q_low, *_, q_high), (k_low, *_, k_high) = nodes[0, i], nodes[1, j]
        of_pair = limits[0, q_low : q_high + 1, k_low : k_high + 1]
        assert (kinds[0, i, j] != tiles.EMPTY) == (of_pair > -1).any()
        assert (kinds[0, i, j] == tiles.FULL) == (of_pair == rules.ENDLESS).all()


def test_lanes_read_their_own_tiles_alone():
    """Each of many queries has keys of its own: in a page for each group, or in pages of one. What one alone sees it
    reads by itself, but for a stem, which others may come to share. All see them as without a table."""
    groups, many, page = 2, tiles.MANY - 4, 64
    lanes, rng = groups * many - 1, np.random.default_rng(0)
    node, stem = np.arange(lanes, dtype=np.int32), lanes
    held = np.full((1, 8 * groups, page), -1, np.int32)
    for group in range(groups):
        own = node[group * many : (group + 1) * many]
        held[0, 5 * group, : len(own)] = own
    held[0, 3, :9], held[0, 12, :], held[0, 7, :50], held[0, 1, :20] = 20, 20, 2, stem
    held = held.reshape(1, -1)
    branch = np.arange(lanes + 1) + 1
    branch[stem] = branch[5]  # of its prompt
    at = lambda node, time: Coordinates(np.where(node < 0, -1, 0), branch[node], 0 * node + time, 0 * node, node)  # noqa: E731
    queries, keys = at(node[None], 1), at(held, 0)
    limits = np.full((1, lanes + 1, lanes + 1), -1, np.int32)
    limits[0, node, node] = limits[0, 5, stem] = rules.ENDLESS
    q, k, v = (rng.normal(size=(1, at.shape[1], 2, 8)).astype(np.float32) for at in (queries, keys, keys))
    rule, options = rules.own_branch, dict(scale=1.0, implementation="tiled", limits=limits)
    planned = kernels.plan_tiles(queries, keys, rule, "tiled", limits=limits, lanes=True)
    together, alone = ([list(keys[:n]) for keys, n in zip(one.keys[0], one.total[0], strict=True)] for one in planned)
    assert together == [[0, 1], [5]]
    assert {lane: found for lane, found in enumerate(alone) if found} == {20: [3, 12], 2: [7]}
    shown = np.asarray(keys.branch)[:, None] == np.asarray(queries.branch)[:, :, None]
    (o, _), _ = exact.attend(
        exact.scores(q, k, 1.0), v, shown & (held >= 0)[:, None], np.zeros((1, lanes, 2, 8)), np.zeros((1, lanes, 2))
    )
    for tiles_of in (planned, None):
        attend = jax.jit(lambda *arrays, tiles=tiles_of: kernels.attend(*arrays, rule, tiles=tiles, **options))
        found = attend(q, k, v, queries, keys)
        np.testing.assert_allclose(found, o, atol=1e-5)
