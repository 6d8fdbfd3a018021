"""Biases of scores against matrices of float64: output, normaliser, and every gradient, that of the bias included."""

import functools

import exact
import jax
import jax.numpy as jnp
import numpy as np
import packs
import pytest
from drawn_rules import Drawn, drawn_rules, terms
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attend import HERE, Case, check_close, draw, seeds, small_tiles  # noqa: F401  (a fixture)

from lab import kernels
from lab.errors import UserError
from lab.kernels import Bias, rules
from lab.kernels.rules import k, maximum, minimum, q

BIASED = [name for name in HERE if kernels.IMPLEMENTATIONS[name].biases]
REFUSING = [name for name, row in kernels.IMPLEMENTATIONS.items() if not row.biases]
CASE = Case(rule=rules.own_branch, softcap=1.5, scale=0.7)
N = 12
DISTANCE = maximum(q.time - k.time, 0)
THRESHOLDS = (9, 12, 17, 25)  # beyond 8 of their own, as T5 has beyond 16


def buckets(q, k):
    distance = np.maximum(q.time - k.time, 0)
    return np.minimum(distance, 8) + np.searchsorted(THRESHOLDS, distance, side="right")


INDICES = {
    "buckets": Drawn(minimum(DISTANCE, 8) + DISTANCE.reached(THRESHOLDS), buckets),
    "some outside the table": Drawn(k.index - q.index * 2 + 20, lambda q, k: k.index - q.index * 2 + 20),
    "one for all": Drawn(q.branch * 0 + 3, lambda q, k: 3 + 0 * (q.branch + k.branch)),
    "of keys alone": Drawn(k.branch, lambda q, k: k.branch + 0 * q.branch),
}
DISTANCES = Drawn(k.time - q.time, lambda q, k: k.time - q.time)


@functools.cache
def compiled(case: Case, implementation: str, kind: str, tree: tuple):
    """(bias array, arrays, coordinates, cotangents) -> (o, lse), (of the bias array, dq, dk, dv)"""

    def run(array, arrays, coordinates, cotangents):
        def attend(array, *arrays):
            bias = Bias(rules.Term(tree), **{kind: array})
            return kernels.attend(
                *arrays, *coordinates, case.rule, implementation=implementation, bias=bias, **case.options
            )

        outputs, pull = jax.vjp(attend, array, *arrays)
        return outputs, pull(cotangents)

    return jax.jit(run)


def expected(case: Case, seen_BTS, index_BTS, kind: str, array, arrays, cotangents):
    """The same, by matrices."""
    (queries, keys, values), array = arrays, np.asarray(array, np.float64)
    scale = case.K**-0.5 if case.scale is None else case.scale
    inside = (index_BTS >= 0) & (index_BTS < N)
    if kind == "slope_H":
        bias_BHTS = array[None, :, None, None] * index_BTS[:, None]
    else:
        bias_BHTS = np.moveaxis(np.where(inside, array[:, np.clip(index_BTS, 0, N - 1)], 0), 0, 1)
    scores = exact.scores(queries, keys, scale)
    outputs, (ds, dbias, dv) = exact.attend(scores, values, seen_BTS, *cotangents, bias_BHTS, case.softcap)
    if kind == "slope_H":
        d_array = (dbias * index_BTS[:, None]).sum((0, 2, 3))
    else:
        d_array = np.stack([(dbias * (index_BTS == n)[:, None]).sum((0, 2, 3)) for n in range(N)], axis=1)
    return outputs, (d_array, *exact.of_scores(ds, queries, keys, scale), dv)


def compare(case: Case, implementation: str, kind: str, index: Drawn, seed: int, pack: str, rule: Drawn | None = None):
    arrays, coordinates, cotangents = draw(case, seed, pack)
    pairs = [x.map(lambda x, a=axis: np.expand_dims(x, a)) for x, axis in zip(coordinates, (2, 1), strict=True)]
    seen = rules.visible(case.rule, *coordinates)
    if rule:
        seen = exact.same_segment(*coordinates) & rule.plain(*pairs)
    index_BTS = np.broadcast_to(index.plain(*pairs), seen.shape)
    rng = np.random.default_rng(seed)
    array = jnp.asarray(rng.normal(size=(case.H, N) if kind == "table_HN" else case.H) / 3, jnp.float32)
    got = compiled(case, implementation, kind, index.made.tree)(array, arrays, coordinates, cotangents)
    check_close(got, expected(case, seen, index_BTS, kind, array, arrays, cotangents))


@pytest.mark.parametrize("implementation", BIASED)
@pytest.mark.parametrize("name", INDICES)
@settings(max_examples=4)
@given(seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_a_table_against_matrices(name, implementation, seed, pack):
    compare(CASE, implementation, "table_HN", INDICES[name], seed, pack)


@pytest.mark.parametrize("implementation", BIASED)
@settings(max_examples=4)
@given(seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_slopes_against_matrices(implementation, seed, pack):
    compare(Case(rule=rules.causal, H=6, G=2), implementation, "slope_H", DISTANCES, seed, pack)


@pytest.mark.parametrize("implementation", BIASED)
def test_a_step_of_decoding_against_matrices(implementation):
    compare(Case(T=5, S=130, rule=rules.own_branch), implementation, "table_HN", INDICES["buckets"], 0, "interleaved")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BIASED)
@settings(max_examples=6)
@given(index=terms, rule=drawn_rules, seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_any_index_under_any_rule_against_matrices(implementation, index, rule, seed, pack):
    case = Case(H=2, G=1, K=4, V=3, rule=rule.made)
    compare(case, implementation, "table_HN", index, seed, pack, rule)


@pytest.mark.parametrize("implementation", BIASED)
def test_vmap_over_tables_equals_a_loop(implementation):
    examples = [draw(CASE, seed, "interleaved") for seed in range(4)]
    arrays, cotangents = (jax.tree.map(lambda *x: jnp.stack(x), *(e[i] for e in examples)) for i in (0, 2))
    tables = jnp.asarray(np.random.default_rng(0).normal(size=(4, CASE.H, N)), jnp.float32)
    run, at = compiled(CASE, implementation, "table_HN", INDICES["buckets"].made.tree), examples[0][1]
    looped = [run(table, e[0], at, e[2]) for table, e in zip(tables, examples, strict=True)]
    mapped = jax.jit(jax.vmap(run, (0, 0, None, 0)))(tables, arrays, at, cotangents)
    check_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *looped))


def test_bfloat16_is_near_the_exact_result_and_gradients_keep_their_precision():
    for implementation in BIASED:
        case = Case(rule=rules.own_branch, dtype="bfloat16")
        arrays, coordinates, cotangents = draw(case, 0, "interleaved")
        table = jnp.asarray(np.random.default_rng(0).normal(size=(case.H, N)), jnp.float32)
        run = compiled(case, implementation, "table_HN", INDICES["buckets"].made.tree)
        (o, lse), (d_table, dq, _, _) = run(table, arrays, coordinates, cotangents)
        assert (o.dtype, lse.dtype, d_table.dtype, dq.dtype) == ("bfloat16", "float32", "float32", "bfloat16")
        pairs = [x.map(lambda x, a=axis: np.expand_dims(x, a)) for x, axis in zip(coordinates, (2, 1), strict=True)]
        of = (rules.visible(case.rule, *coordinates), buckets(*pairs), "table_HN", table)
        check_close(((o, lse), d_table), (lambda y: (y[0], y[1][0]))(expected(case, *of, arrays, cotangents)), 0.02)


def test_gradients_of_a_bias_scatter_nothing():
    arrays, coordinates, cotangents = draw(CASE, 0)
    table = jnp.zeros((CASE.H, N))
    for implementation in BIASED:
        run = compiled.__wrapped__(CASE, implementation, "table_HN", INDICES["buckets"].made.tree)
        assert "scatter" not in str(jax.make_jaxpr(run)(table, arrays, coordinates, cotangents))


def attend(bias: Bias, implementation: str | None = None):
    arrays, coordinates, _ = draw(CASE, 0)
    return kernels.attend(*arrays, *coordinates, CASE.rule, implementation=implementation, bias=bias)


@pytest.mark.parametrize("name", REFUSING)
def test_an_implementation_without_biases_refuses_by_name(name, monkeypatch):
    monkeypatch.setattr(kernels, "_obstacle", lambda name: None)  # as where it runs
    says = f"{name!r} adds no bias to scores; choose among: auto, {', '.join(n for n in BIASED)}$"
    for ask in (
        lambda: attend(Bias(DISTANCE, jnp.zeros((4, N))), name),
        lambda: kernels.plan_tiles(*draw(CASE, 0)[1], CASE.rule, name, biased=True),
    ):
        with pytest.raises(UserError, match=says):
            ask()


def test_auto_steps_aside_for_a_bias(monkeypatch):
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "pallas_triton", kernels.Implementation("gpu", interpretable=True))
    monkeypatch.setitem(kernels.AUTO, jax.default_backend(), ("pallas_triton", 2**17))
    taken = [kernels.resolve("auto", 70, biased) for biased in (False, True)]
    assert taken == ["pallas_triton", "tiled"]
    bias, (_, coordinates, _) = Bias(DISTANCE, jnp.ones((4, N))), draw(CASE, 0)
    tiles = kernels.plan_tiles(*coordinates, CASE.rule, biased=True)
    assert jax.tree.structure(tiles) == jax.tree.structure(kernels.plan_tiles(*coordinates, CASE.rule, "tiled"))
    by_auto, by_tiled = (
        str(jax.make_jaxpr(lambda bias, name=name: attend(bias, name))(bias)) for name in (None, "tiled")
    )
    assert by_auto == by_tiled


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"bias of shape \(3, 12\) does not fit 4 query heads; choose \(4, N\)"):
        attend(Bias(DISTANCE, jnp.zeros((3, N))))
    with pytest.raises(UserError, match=r"bias of shape \(4, 12\) does not fit 4 query heads; choose \(4,\)"):
        attend(Bias(DISTANCE, slope_H=jnp.zeros((4, N))))
    for arrays in ({}, {"table_HN": jnp.zeros((4, N)), "slope_H": jnp.zeros(4)}):
        with pytest.raises(ValueError, match="one of the two"):
            Bias(DISTANCE, **arrays)


def test_a_bias_is_an_argument_of_compiled_functions():
    """Its index is compared by what it says: two that say the same share a program."""
    traced = []
    add = jax.jit(lambda bias: traced.append(bias) or bias.slope_H + 1)
    for _ in range(2):
        add(Bias(k.time - q.time, slope_H=jnp.zeros(4)))
    add(Bias(k.index - q.index, slope_H=jnp.zeros(4)))
    assert len(traced) == 2
