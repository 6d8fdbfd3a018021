"""K and V widths differ from each other throughout, so that mixing them up fails."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import packs
import pytest
from drawn_rules import drawn_rules
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import kernels
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels import pallas_tpu, pallas_triton, rules
from lab.kernels.rotary import rotate, rotation
from lab.kernels.rules import Rule

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """Several tiles in short rows: interpreted, a kernel may have any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "tile_sizes", lambda T, S: (32, 16))
        patch.setattr(pallas_triton, "tile_sizes", lambda T, S: (32, 32))  # two blocks each where heads are wide
        yield


@dataclasses.dataclass(frozen=True)
class Case:
    """What an attention is compiled for."""

    T: int = 70  # more than a tile, and no multiple of one
    S: int = 70
    rule: Rule = rules.all_branches
    H: int = 4
    G: int = 2
    K: int = 8
    V: int = 6
    scale: float | None = None
    softcap: float | None = None
    dtype: str = "float32"

    @property
    def options(self) -> dict:
        return dict(scale=self.scale, softcap=self.softcap, return_lse=True)


CASES = {
    "all_branches": Case(),
    "own_branch, capped": Case(rule=rules.own_branch & rules.window(9), softcap=1.5, scale=0.7, H=6, G=2),
    "causal, few queries": Case(T=3, S=130, rule=rules.causal, H=2, G=2, K=6, V=16),
}
SLOW_CASES = {
    "own_branch": Case(T=130, S=130, rule=rules.own_branch, H=8, G=1),
    "window": Case(rule=rules.window(7), H=3, G=1, V=12),
    "few keys": Case(T=130, S=5, rule=rules.all_branches, H=2, G=1),
    "one query": Case(T=1, S=90, rule=rules.own_branch),
    "even tiles, capped": Case(T=128, S=192, rule=rules.causal & rules.window(40), softcap=5.0, H=4, G=4),
    "one of everything": Case(T=1, S=1, rule=rules.causal, H=1, G=1, K=2, V=1),
}
# (K, V) of the published attention variants, the absorbed form of MLA among them.
WIDTHS = ((128, 128), (192, 128), (192, 192), (256, 256), (576, 512))
HERE = [name for name, row in kernels.IMPLEMENTATIONS.items() if row.platform is None or row.interpretable]
OTHERS = [name for name in HERE if name != "reference"]
MARKED = [*CASES] + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES]


def interpreted(implementation: str) -> bool:
    """Whether the kernel is of a machine that is not here."""
    return kernels.IMPLEMENTATIONS[implementation].platform is not None


def slowly(names, slow=interpreted) -> list:
    """The names, those marked that take long: an interpreter takes a second for what takes a millisecond there."""
    return [pytest.param(name, marks=pytest.mark.slow) if slow(name) else name for name in names]


def each(cases, implementations) -> list:
    """Every case with every implementation: fast are those that are compiled for here, and one case of each other."""
    fast = lambda name, which: name in CASES and (name == "all_branches" or not interpreted(which))  # noqa: E731
    pairs = [(name, which) for name in cases for which in implementations]
    return [pytest.param(*pair, marks=[] if fast(*pair) else pytest.mark.slow) for pair in pairs]


BATCH = 2


def draw(case: Case, seed: int, pack: str = "scattered"):
    """((q, k, v), (query, key) coordinates, (cotangent of o, of lse))"""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), case.dtype)  # noqa: E731
    arrays = (
        normal(BATCH, case.T, case.H, case.K),
        normal(BATCH, case.S, case.G, case.K),
        normal(BATCH, case.S, case.G, case.V),
    )
    keys = packs.PACKS[pack](rng, BATCH, case.S)
    some = np.sort(rng.permutation(case.S)[: case.T])
    short = case.T <= case.S  # queries are tokens among the keys where there are enough of them
    queries = keys.map(lambda x: x[:, some]) if short else packs.PACKS[pack](rng, BATCH, case.T)
    cotangents = normal(BATCH, case.T, case.H, case.V), normal(BATCH, case.T, case.H).astype(jnp.float32)
    return arrays, (queries, keys), cotangents


@functools.cache
def compiled(case: Case, implementation: str):
    """(arrays, coordinates, cotangents) -> (o, lse), (dq, dk, dv)"""

    def run(arrays, coordinates, cotangents):
        def attend(*arrays):
            return kernels.attend(*arrays, *coordinates, case.rule, implementation=implementation, **case.options)

        outputs, pull = jax.vjp(attend, *arrays)
        return outputs, pull(cotangents)

    return jax.jit(run)


def by_loop(case: Case, arrays, coordinates):
    """(o, lse) in float64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in arrays)
    queries, keys = coordinates
    o, lse = np.zeros((BATCH, case.T, case.H, case.V)), np.full((BATCH, case.T, case.H), -np.inf)
    seen = rules.visible(case.rule, queries, keys)
    scale = case.K**-0.5 if case.scale is None else case.scale
    for b, t, h in np.ndindex(BATCH, case.T, case.H):
        visible, g = np.flatnonzero(seen[b, t]), h // (case.H // case.G)
        if not len(visible):
            continue
        scores = np.array([scale * np.dot(q[b, t, h], k[b, s, g]) for s in visible])
        if case.softcap:
            scores = case.softcap * np.tanh(scores / case.softcap)
        weights = np.exp(scores - scores.max())
        lse[b, t, h] = scores.max() + np.log(weights.sum())
        o[b, t, h] = weights / weights.sum() @ v[b, visible, g]
    return o, lse


def check_close(got, expected, tolerance: float = 1e-5) -> None:
    """Within the tolerance, relative to the largest finite value (or to one), and infinite in the same places."""

    def check(got, expected):
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        assert not np.isnan(got).any()
        np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
        finite = np.isfinite(expected)
        size = max(1.0, np.abs(expected[finite]).max(initial=0.0))
        np.testing.assert_allclose(got[finite], expected[finite], rtol=0, atol=tolerance * size)

    jax.tree.map(check, got, expected)


@pytest.mark.matrix("K")
@pytest.mark.parametrize("implementation", slowly(OTHERS))
@pytest.mark.parametrize(
    ("K", "V"), [pytest.param(*x, marks=[pytest.mark.slow] * (x not in WIDTHS[1:2])) for x in WIDTHS]
)
def test_every_implementation_takes_the_widths_of_every_published_variant(K, V, implementation):
    case = Case(rule=rules.causal, H=2, G=1, K=K, V=V)
    inputs = draw(case, 0, "interleaved")
    expected, got = (compiled(case, which)(*inputs) for which in ("reference", implementation))
    check_close(got, expected)


def case_of(name: str) -> Case:
    return (CASES | SLOW_CASES)[name]


@pytest.mark.matrix("name")
@pytest.mark.parametrize("name", MARKED)
@settings(max_examples=5)
@given(seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_reference_against_a_loop(name, seed, pack):
    arrays, coordinates, cotangents = draw(case_of(name), seed, pack)
    outputs, _ = compiled(case_of(name), "reference")(arrays, coordinates, cotangents)
    check_close(outputs, by_loop(case_of(name), arrays, coordinates))


@pytest.mark.matrix("name")
@pytest.mark.parametrize(("name", "implementation"), each(CASES | SLOW_CASES, OTHERS))
@settings(max_examples=8)
@given(seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_every_implementation_equals_the_reference_forward_and_backward(name, implementation, seed, pack):
    inputs = draw(case_of(name), seed, pack)
    expected, got = (compiled(case_of(name), which)(*inputs) for which in ("reference", implementation))
    check_close(got, expected)


@pytest.mark.matrix("implementation")
@pytest.mark.slow
@pytest.mark.parametrize("implementation", OTHERS)
@settings(max_examples=6)
@given(rule=drawn_rules, seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_every_implementation_equals_the_reference_for_any_rule(implementation, rule, seed, pack):
    case = Case(T=70, S=70, H=2, G=1, K=4, V=3, rule=rule.made)
    inputs = draw(case, seed, pack)
    check_close(compiled(case, implementation)(*inputs), compiled(case, "reference")(*inputs))


@pytest.mark.matrix("implementation")
@pytest.mark.parametrize("implementation", slowly(OTHERS))
@settings(max_examples=5)
@given(seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_bfloat16_is_near_the_exact_result_of_the_same_inputs(implementation, seed, pack):
    case = Case(dtype="bfloat16", rule=rules.own_branch)
    arrays, coordinates, cotangents = draw(case, seed, pack)
    outputs, gradients = compiled(case, implementation)(arrays, coordinates, cotangents)
    assert outputs[0].dtype == jnp.bfloat16 and outputs[1].dtype == jnp.float32
    assert {g.dtype for g in gradients} == {jnp.dtype("bfloat16")}
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, cotangents))
    expected = compiled(dataclasses.replace(case, dtype="float32"), "reference")(exact[0], coordinates, exact[1])
    check_close((outputs, gradients), expected, tolerance=0.01)


@pytest.mark.matrix("name")
@pytest.mark.parametrize(("name", "implementation"), each(CASES, HERE))
def test_queries_that_see_nothing_give_zeros_and_no_gradient(name, implementation):
    case = case_of(name)
    arrays, (queries, keys), cotangents = draw(case, 0)
    blind = np.arange(case.T) % 3 == 0
    queries = dataclasses.replace(queries, segment=np.where(blind, 7, queries.segment))  # nobody else's segment
    keys = dataclasses.replace(keys, segment=np.where(keys.segment == 2, -1, keys.segment))
    (o, lse), (dq, dk, dv) = jax.device_get(compiled(case, implementation)(arrays, (queries, keys), cotangents))
    seen = rules.visible(case.rule, queries, keys)
    sees_none, seen_by_none = ~seen.any(2), ~seen.any(1)
    assert sees_none.any() and seen_by_none.any() and seen.any()
    assert not o[sees_none].any() and not dq[sees_none].any()
    assert (lse[sees_none] == -np.inf).all() and np.isfinite(lse[~sees_none]).all()
    assert not dk[seen_by_none].any() and not dv[seen_by_none].any()
    assert dq[~sees_none].any() and all(np.isfinite(x).all() for x in (o, dq, dk, dv))


@pytest.mark.parametrize("implementation", HERE)
def test_nothing_but_padding_gives_zeros(implementation):
    case = CASES["all_branches"]
    arrays, _, cotangents = draw(case, 1)
    padding = Coordinates.padding(BATCH, case.T)
    (o, lse), gradients = compiled(case, implementation)(arrays, (padding, padding), cotangents)
    assert not np.any(o) and np.all(lse == -np.inf)
    assert not any(np.any(g) for g in gradients)


@pytest.mark.parametrize("implementation", OTHERS)
def test_large_scores_do_not_overflow(implementation):
    case = CASES["all_branches"]
    (q, k, v), coordinates, cotangents = draw(case, 2)
    inputs = (20 * q, 20 * k, v), coordinates, cotangents
    expected, got = (compiled(case, which)(*inputs) for which in ("reference", implementation))
    assert np.asarray(expected[0][1]).max() > 500  # exp of it overflows
    check_close(got[0], expected[0], tolerance=1e-3)
    assert all(np.isfinite(x).all() for x in got[1])


@pytest.mark.matrix("name")
@pytest.mark.parametrize(("name", "implementation"), each(CASES, OTHERS))
def test_two_calls_are_identical_to_the_bit(name, implementation):
    inputs = draw(case_of(name), 3, "interleaved")
    first, second = (jax.device_get(compiled(case_of(name), implementation)(*inputs)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("implementation", HERE)
@settings(max_examples=3)
@given(seed=seeds)
def test_the_order_of_queries_and_keys_is_free(implementation, seed):
    case = CASES["all_branches"]
    (q, k, v), (queries, keys), (do, dlse) = draw(case, seed, "interleaved")
    rng = np.random.default_rng(seed)
    t, s = rng.permutation(case.T), rng.permutation(case.S)
    moved = (
        (q[:, t], k[:, s], v[:, s]),
        (queries.map(lambda x: x[:, t]), keys.map(lambda x: x[:, s])),
        (do[:, t], dlse[:, t]),
    )
    run = compiled(case, implementation)
    (o, lse), (dq, dk, dv) = run((q, k, v), (queries, keys), (do, dlse))
    check_close(run(*moved), ((o[:, t], lse[:, t]), (dq[:, t], dk[:, s], dv[:, s])))


@pytest.mark.matrix("implementation")
@pytest.mark.slow
@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("coordinates_too", [False, True])
def test_vmap_equals_a_loop(coordinates_too, implementation):
    case = Case(rule=rules.own_branch, H=2, G=1)
    examples = [draw(case, seed, "interleaved") for seed in range(6)]
    if not coordinates_too:
        examples = [(arrays, examples[0][1], cotangents) for arrays, _, cotangents in examples]
    run = compiled(case, implementation)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *(run(*example) for example in examples))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *examples)
    if not coordinates_too:
        stacked = (stacked[0], examples[0][1], stacked[2])
    axes = (0, 0 if coordinates_too else None, 0)
    check_close(jax.jit(jax.vmap(run, axes))(*stacked), expected)
    nested = lambda arrays, coordinates, cotangents: jax.vmap(run, axes)(arrays, coordinates, cotangents)  # noqa: E731
    pairs = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), (stacked[0], stacked[2]))
    at = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), stacked[1]) if coordinates_too else stacked[1]
    twice = jax.jit(jax.vmap(nested, axes))(pairs[0], at, pairs[1])
    check_close(jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), twice), expected)


@pytest.mark.matrix("implementation")
@pytest.mark.parametrize("implementation", slowly(OTHERS))
def test_tiles_made_before_change_nothing(implementation):
    case, which = CASES["all_branches"], dict(implementation=implementation)
    arrays, coordinates, _ = draw(case, 4, "interleaved")
    attend = jax.jit(lambda tiles: kernels.attend(*arrays, *coordinates, case.rule, tiles=tiles, **which))
    np.testing.assert_array_equal(attend(kernels.plan_tiles(*coordinates, case.rule, **which)), attend(None))


def test_defaults_are_the_scale_of_the_key_width_no_cap_and_no_lse():
    case = CASES["all_branches"]
    arrays, coordinates, _ = draw(case, 5)
    o = kernels.attend(*arrays, *coordinates, case.rule)
    said = kernels.attend(*arrays, *coordinates, case.rule, scale=8**-0.5, softcap=None, implementation="auto")
    np.testing.assert_array_equal(o, said)
    check_close(o, by_loop(case, arrays, coordinates)[0])


@pytest.mark.slow
def test_rows_whose_lists_are_long_go_a_few_at_a_time(monkeypatch):
    case = Case(rule=rules.own_branch)
    inputs = draw(case, 6, "interleaved")
    expected = compiled(case, "reference")(*inputs)
    whole = pallas_tpu.rows_at_once(BATCH, case.T, case.S)
    monkeypatch.setattr(pallas_tpu, "STEPS", 20)
    assert (whole, pallas_tpu.rows_at_once(BATCH, case.T, case.S)) == (2, 1)
    check_close(jax.jit(compiled.__wrapped__(case, "pallas_tpu"))(*inputs), expected)
    monkeypatch.setattr(pallas_tpu, "STEPS", 2)
    with pytest.raises(UserError, match="pallas_tpu takes no rows of 70 queries over 70 keys; choose tiled"):
        compiled.__wrapped__(case, "pallas_tpu")(*inputs)


ROTATED = Case(rule=rules.own_branch, softcap=2.0)


@functools.cache
def rotating(implementation: str, inside: bool):
    """((q, k, v, frequencies), coordinates, cotangents) -> (o, lse), (dq, dk, dv, gradient of frequencies)"""

    def run(arrays, coordinates, cotangents):
        def attend(q, k, v, frequencies):
            k = rotate(k, rotation(coordinates[1], jax.lax.stop_gradient(frequencies)))
            before = q if inside else rotate(q, rotation(coordinates[0], frequencies))
            options = ROTATED.options | (dict(frequencies_3F=frequencies) if inside else {})
            return kernels.attend(before, k, v, *coordinates, ROTATED.rule, implementation=implementation, **options)

        outputs, pull = jax.vjp(attend, *arrays)
        return outputs, pull(cotangents)

    return jax.jit(run)


@pytest.mark.matrix("implementation")
@pytest.mark.slow
@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("pairs", [4, 3])  # all of a head, and its last six dimensions
@settings(max_examples=5)
@given(seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_queries_rotated_inside_are_queries_rotated_before(implementation, pairs, seed, pack):
    arrays, coordinates, cotangents = draw(ROTATED, seed, pack)
    # Angles of a few turns: of more, rounding in float32 is all that one would see.
    frequencies = jnp.asarray(np.random.default_rng(seed).normal(size=(3, pairs)) / 10, jnp.float32)
    inputs = (*arrays, frequencies), coordinates, cotangents
    check_close(*(rotating(implementation, inside)(*inputs) for inside in (True, False)))
