"""What attention makes beside its result: never the matrix of scores, in a step of decoding no copy of the cache."""

import dataclasses

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest
from test_attend import Case, compiled, draw

from lab import kernels
from lab.coordinates import Coordinates
from lab.kernels import pallas_gpu, rules

KERNELS = ("pallas_call", "core_map", "mpmd_map")  # that of Mosaic for GPUs has had two names
ROW = Case(rule=rules.own_branch, H=2, G=1, K=64, V=64)


def temporaries(implementation: str, T: int) -> int:
    """Bytes of scratch memory of a forward and backward pass over one row."""
    case = dataclasses.replace(ROW, T=T, S=T, K=16, V=16)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), draw(case, 0))
    return compiled(case, implementation).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_tiled_grows_with_the_length_not_its_square():
    tiled, dense = ([temporaries(which, T) for T in (1024, 2048)] for which in ("tiled", "reference"))
    assert tiled[1] < 2.2 * tiled[0]
    assert dense[1] > 3.5 * dense[0] and dense[1] > 10 * tiled[1]


def made(jaxpr):
    """(primitive, numbers) of everything that a program makes outside of its kernels."""
    for equation in jaxpr.eqns:
        inner = inner_programs(equation)
        if inner and equation.primitive.name not in KERNELS:
            for each in inner:
                yield from made(each)
        else:
            yield from ((equation.primitive.name, x.aval.size) for x in equation.outvars)


def inner_programs(equation) -> list:
    is_program = lambda x: isinstance(x, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr))  # noqa: E731
    found = jax.tree.leaves([*equation.params.values()], is_leaf=is_program)
    return [getattr(x, "jaxpr", x) for x in found if is_program(x)]


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu", "pallas_triton", "reference"])
def test_what_kernels_are_given_and_give_grows_with_the_length(implementation):
    def numbers(T: int) -> int:
        of = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16)  # noqa: E731
        at = Coordinates(*[jax.ShapeDtypeStruct((1, T), jnp.int32)] * 4)

        def attend(q, k, v, at):
            if implementation == "pallas_gpu":  # which nothing interprets, but one can trace
                return pallas_gpu.attend(q, k, v, at, at, ROW.rule, 0.1, None)[0]
            return kernels.attend(q, k, v, at, at, ROW.rule, implementation=implementation)

        run = lambda q, k, v, at, do: jax.vjp(lambda *x: attend(*x, at), q, k, v)[1](do)  # noqa: E731
        q, k, v, o = of(T, ROW.H, ROW.K), of(T, ROW.G, ROW.K), of(T, ROW.G, ROW.V), of(T, ROW.H, ROW.V)
        return sum(size for _, size in made(jax.make_jaxpr(run)(q, k, v, at, o).jaxpr))

    growth = numbers(4096) / numbers(2048)
    assert growth > 3.9 if implementation == "reference" else 1.9 < growth < 2.2


@pytest.mark.parametrize("implementation", ["tiled", "pallas_tpu", "pallas_triton"])  # whose step pallas_gpu takes
@pytest.mark.parametrize(("T", "S"), [(16, 4096), (64, 4096), (64, 512 * 37)])
def test_a_step_makes_no_copy_of_the_keys(T, S, implementation):
    """What a step makes that is as large as the cache is the cache in another shape."""
    B, H, G, K = 2, 8, 4, 64
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    at = [Coordinates(*[jax.ShapeDtypeStruct((B, n), jnp.int32)] * 4) for n in (T, S)]
    step = lambda *arrays: kernels.attend(*arrays, rules.own_branch, implementation=implementation)  # noqa: E731
    program = jax.make_jaxpr(step)(of(B, T, H, K), of(B, S, G, K), of(B, S, G, K), *at)
    found = [*made(program.jaxpr)]
    assert {name for name, size in found if size >= B * S * G * K} == {"reshape"}
    assert ("pallas_call" in dict(found)) == (implementation != "tiled")
