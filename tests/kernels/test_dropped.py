"""Dropout of attention against matrices of float64, its mask by a hash of its own: outputs, gradients, statistics."""

import functools

import exact
import jax
import jax.numpy as jnp
import murmur
import numpy as np
import packs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attend import Case, check_close, draw, seeds

from lab import kernels
from lab.errors import UserError
from lab.kernels import dropout, rules
from lab.kernels.dropout import Dropped

DROPS = [name for name, row in kernels.IMPLEMENTATIONS.items() if row.drops]
REFUSING = [name for name, row in kernels.IMPLEMENTATIONS.items() if not row.drops]
CASE = Case(rule=rules.own_branch, softcap=1.5, scale=0.7)
SITE = 3, 1, 4, 1  # seed, step, layer, site


def test_the_hash_is_murmurhash3():
    """Of four zero bytes, of "test", and of nothing, as published; and of any words."""
    published = {(0, 0): 0x2362F9DE, (0x9747B28C, int.from_bytes(b"test", "little")): 0x704B81DC, (1,): 0x514E28B7}
    for words, told in published.items():
        assert murmur.hashed(*words) == told
        assert int(jax.jit(dropout.hashed)(*map(np.uint32, words))) == told
    words = np.random.default_rng().integers(-(2**31), 2**31, (5, 100)).astype(np.int32)
    np.testing.assert_array_equal(jax.jit(dropout.hashed)(*words), murmur.hashed(*words))


def dropped(rate: float, case: Case, words) -> Dropped:
    """The words of tokens: (of queries, of keys)."""
    head_H = murmur.state(*SITE, np.arange(case.H)).astype(np.uint32)
    return Dropped(jnp.float32(rate), jnp.asarray(head_H), *(jnp.asarray(x) for x in words))


def drawn_words(case: Case, seed: int) -> list:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2**32, (2, length), dtype=np.uint32) for length in (case.T, case.S)]


@functools.cache
def compiled(case: Case, implementation: str):
    """Of members in one program: (arrays, coordinates, cotangents, dropout) -> (o, lse), (dq, dk, dv)"""

    def run(arrays, coordinates, cotangents, drop):
        def attend(*arrays):
            options = dict(implementation=implementation, dropout=drop, **case.options)
            return kernels.attend(*arrays, *coordinates, case.rule, **options)

        outputs, pull = jax.vjp(attend, *arrays)
        return outputs, pull(cotangents)

    return jax.jit(jax.vmap(run))


@pytest.mark.parametrize("implementation", DROPS)
@settings(max_examples=5)
@given(seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)), rates=st.permutations((0.1, 0.5, 0.9)))
def test_members_with_rates_of_their_own_against_matrices(implementation, seed, pack, rates):
    examples = [draw(CASE, seed + member, pack) for member in range(2)]
    words = [drawn_words(CASE, seed + member) for member in range(2)]
    drops = [dropped(*one) for one in zip(rates, (CASE, CASE), words, strict=False)]
    members = [(*example, drop) for example, drop in zip(examples, drops, strict=True)]
    got = compiled(CASE, implementation)(*jax.tree.map(lambda *x: jnp.stack(x), *members))
    for member, (arrays, coordinates, cotangents) in enumerate(examples):
        heads, (of_q, of_k) = np.arange(CASE.H)[None, :, None, None], words[member]
        kept_BHTS = murmur.factors(rates[member], *SITE, heads, of_q[:, None, :, None], of_k[:, None, None, :])
        (q, k, v), seen = arrays, rules.visible(CASE.rule, *coordinates)
        scores = exact.scores(q, k, CASE.scale)
        outputs, (ds, _, dv) = exact.attend(scores, v, seen, *cotangents, softcap=CASE.softcap, kept_BHTS=kept_BHTS)
        expected = outputs, (*exact.of_scores(ds, q, k, CASE.scale), dv)
        check_close(jax.tree.map(lambda x, member=member: x[member], got), expected)


@jax.jit
def gone(rate):
    """Which probabilities a text of 96 queries and 128 keys drops, [16, 96, 128]."""
    heads, queries, keys = jnp.ogrid[:16, :96, :128]
    token = lambda time: dropout.hashed(0, 5, 0, 0, 1, time)  # noqa: E731
    state = functools.reduce(dropout.absorb, (5, 0, 1, heads, token(queries)), 0)
    return dropout.factors(state, token(keys), rate, jnp.float32) == 0


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5, 0.97])
def test_so_many_are_dropped_and_none_hangs_on_another(rate):
    """Within five standard deviations, of the whole and of pairs that share a head, a query, a key, or neither."""
    found = np.asarray(gone(np.float32(rate)))
    deviation = lambda p, n: 5 * np.sqrt(p * (1 - p) / n)  # noqa: E731
    assert abs(found.mean() - rate) < deviation(rate, found.size)
    for axis in range(3):
        lines = found.mean(axis=tuple({0, 1, 2} - {axis}))
        assert np.abs(lines - rate).max() < deviation(rate, found.size / len(lines))
        both = found & np.roll(found, 1, axis=axis)
        assert abs(both.mean() - rate**2) < deviation(rate**2, found.size) + 2 * rate * deviation(rate, found.size)


def attend(name: str | None, drop: Dropped):
    arrays, coordinates, _ = draw(CASE, 0)
    return kernels.attend(*arrays, *coordinates, CASE.rule, implementation=name, dropout=drop)


@pytest.mark.parametrize("name", REFUSING)
def test_an_implementation_that_cannot_drop_refuses_by_name(name, monkeypatch):
    monkeypatch.setattr(kernels, "_obstacle", lambda name: None)  # as where it runs
    says = f"{name!r} drops no probabilities; choose among: auto, {', '.join(DROPS)}$"
    for ask in (
        lambda: attend(name, dropped(0.1, CASE, drawn_words(CASE, 0))),
        lambda: kernels.tile_sizes(name, 70, dropping=True),
    ):
        with pytest.raises(UserError, match=says):
            ask()


def test_auto_steps_aside_and_other_heads_are_refused(monkeypatch):
    monkeypatch.setitem(kernels.AUTO, jax.default_backend(), ("pallas_triton", 2**17))
    assert [kernels.resolve("auto", 70, dropping=drops) for drops in (False, True)] == ["pallas_triton", "tiled"]
    drop = dropped(0.1, Case(H=3), drawn_words(CASE, 0))
    with pytest.raises(UserError, match="dropout of 3 heads does not fit 4 query heads; choose 4"):
        attend("reference", drop)
