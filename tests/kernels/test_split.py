"""A step of decoding: one query for each branch, over a prompt and the tokens of all branches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import packs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attend import OTHERS, Case, check_close, compiled, draw, slowly
from test_memory import inner_programs

from lab import kernels
from lab.coordinates import Coordinates
from lab.kernels import pallas_tpu, pallas_triton, reference, rules, split, tiled
from lab.kernels.tiles import is_step

STEP = Case(T=7, S=90, rule=rules.own_branch, H=4, G=2, K=8, V=6)


@functools.cache
def in_parts(parts: int | None):
    """(arrays, coordinates, cotangents) -> outputs, gradients of the reference, whole or in parts."""
    attend = functools.partial(split.attend, reference.attend, parts) if parts else reference.attend

    def run(arrays, coordinates, cotangents):
        outputs, pull = jax.vjp(lambda *arrays: attend(*arrays, *coordinates, STEP.rule, 0.4, 2.0), *arrays)
        return outputs, pull(cotangents)

    return jax.jit(run)


@pytest.mark.parametrize("parts", [1, 3, 8])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1), pack=st.sampled_from(sorted(packs.PACKS)))
def test_parts_merge_to_the_whole_forward_and_backward(parts, seed, pack):
    inputs = draw(STEP, seed, pack)
    check_close(in_parts(parts)(*inputs), in_parts(None)(*inputs))


def test_parts_that_see_nothing_weigh_nothing():
    o = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 3, 1, 4)), jnp.float32)
    lse = jnp.asarray([[[[0.0], [-jnp.inf], [-jnp.inf]]], [[[0.0], [800.0], [-jnp.inf]]]])
    merged, total = split.merge([*zip(o.at[:, :, 2].set(0), lse, strict=True)])
    check_close(merged[0, 0], o[:, 0, 0].mean(0))
    check_close(merged[0, 1], o[1, 0, 1])
    assert not merged[0, 2].any()
    check_close(total[0, :, 0], np.array([np.log(2), 800.0, -np.inf]))


def decoding(prefix: int, branches: int, own: int, slots: int) -> tuple[Coordinates, Coordinates]:
    """(queries, keys): the next token of each branch; a cache of the prompt, then the branches' tokens step by step."""
    time, branch = (x.reshape(-1) for x in np.indices((own, branches)))
    full = lambda x, fill: np.append(x, np.full(slots - len(x), fill))[None].astype(np.int32)  # noqa: E731
    times = np.concatenate([np.arange(prefix), prefix + time])
    keys = Coordinates(
        full(0 * times, -1), full(np.append(np.zeros(prefix), branch + 1), 0), full(times, 0),
        full(np.arange(len(times)), 0),
    )  # fmt: skip
    last = np.full((1, branches), prefix + own - 1, np.int32)
    queries = Coordinates(0 * last, np.arange(1, branches + 1, dtype=np.int32)[None], last, len(times) - 1 + 0 * last)
    return queries, keys


def reads(implementation: str, branches: int, slots: int, heads: int) -> int:
    """How many programs read the keys of a group of so many heads, each for some of its queries."""
    if implementation == "tiled":  # one loop over tiles of all queries
        return 1
    groups, of = 8, lambda *shape: jax.ShapeDtypeStruct((1, *shape, 128), jnp.bfloat16)
    at = [Coordinates(*[jax.ShapeDtypeStruct((1, tokens), jnp.int32)] * 4) for tokens in (branches, slots)]
    step = functools.partial(kernels.attend, rule=rules.own_branch, implementation=implementation)
    arrays = of(branches, groups * heads), of(slots, groups), of(slots, groups)
    (grid,) = grids(jax.make_jaxpr(step)(*arrays, *at).jaxpr)
    return grid[0] if implementation == "pallas_tpu" else grid[1] // groups  # its programs have all eight groups


def grids(jaxpr):
    """Of the kernels of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params["grid_mapping"].grid
        else:
            for inner in inner_programs(equation):
                yield from grids(inner)


STEPPERS = {"tiled": tiled, "pallas_tpu": pallas_tpu, "pallas_triton": pallas_triton}  # whose step pallas_gpu takes


@pytest.mark.matrix("implementation")
@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(
    ("implementation", "prefix", "branches", "own"),
    [
        *((name, *shape) for name in STEPPERS for shape in ((8192, 64, 256), (4096, 3, 500))),
        *((name, 8192, 200, 32) for name in ("tiled", "pallas_tpu")),  # a Triton block has 64 branches at most
    ],
)
def test_a_step_reads_the_shared_prefix_once(implementation, prefix, branches, own, heads):
    """Numbers of keys and values that the listed tiles hold, against those that some branch sees."""
    needed = prefix + branches * own
    queries, keys = decoding(prefix, branches, own, slots=needed + 4096)
    lists = kernels.plan_tiles(queries, keys, rules.own_branch, implementation)
    lists = getattr(lists, "by_query", lists)
    _, k_tile = STEPPERS[implementation].tile_sizes(branches, keys.shape[1])
    read = int(lists.total.sum()) * k_tile * reads(implementation, branches, keys.shape[1], heads)
    assert needed <= read <= 1.3 * needed


@pytest.mark.matrix("H")
@pytest.mark.parametrize("implementation", slowly(OTHERS))
@pytest.mark.parametrize(
    ("H", "G"),  # of which a program of pallas_tpu has 8, 2 and 1
    [(32, 16), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((4, 2), (3, 1)))],
)
def test_a_step_gives_what_the_reference_gives(H, G, implementation):
    case = Case(T=20, S=300, rule=rules.own_branch, H=H, G=G, K=8, V=6)
    arrays, _, cotangents = draw(case, 0)
    at = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), decoding(100, 20, 8, slots=300))
    found, expected = (compiled(case, which)(arrays, at, cotangents) for which in (implementation, "reference"))
    check_close(found, expected)


@pytest.mark.slow
def test_a_step_on_a_gpu_is_split(monkeypatch):
    case = Case(T=5, S=300, rule=rules.own_branch, H=4, G=2, K=8, V=6)
    arrays, _, _ = draw(case, 0)
    at = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), decoding(100, 5, 32, slots=300))
    monkeypatch.setattr(split, "KEYS", 64)
    seen = []
    monkeypatch.setattr(split, "attend", lambda *given, whole=split.attend: seen.append(given[1]) or whole(*given))
    tiles = kernels.plan_tiles(*at, case.rule, "pallas_triton")
    found = kernels.attend(
        *arrays, *at, case.rule, implementation="pallas_triton", tiles=tiles, frequencies_3F=jnp.ones((3, 2))
    )
    whole = kernels.attend(*arrays, *at, case.rule, implementation="reference", frequencies_3F=jnp.ones((3, 2)))
    assert seen == [4]
    check_close(found, whole)


def test_parts_give_every_multiprocessor_work_and_every_part_enough_keys():
    assert split.parts(rows=8, T=64, S=2**16) == 32  # 33 would do, but 32 have whole tiles
    assert split.parts(rows=8, T=64, S=2**16 + 1) == 33
    assert split.parts(rows=8, T=64, S=512 * 37) == 8
    assert split.parts(rows=8, T=1, S=4096) == 8
    assert split.parts(rows=2**14, T=64, S=2**16) == 1


@given(rows=st.integers(1, 300), T=st.integers(1, 256), S=st.integers(1, 2**17))
def test_a_part_of_a_step_is_a_step(rows, T, S):
    parts = split.parts(rows, T, S)
    assert parts >= 1 and (not is_step(T, S) or is_step(T, -(-S // parts)))
