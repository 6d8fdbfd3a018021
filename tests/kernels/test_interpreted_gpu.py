"""Numbers of the kernels for GPUs, in the interpreter of jax, which checks that copies and barriers are in order.

That of jax before 0.12 has no products (wgmma) of transposed or of register operands, and no layouts: plain ones are in
their place here. tests/kernels/test_interpreted_hopper.py has the kernels as they are, where jax can interpret them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import packs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # plgpu has it from jax 0.11 on
from test_attend import Case, check_close, draw, seeds
from test_attend import compiled as compiled_here

from lab import kernels
from lab.kernels import hopper, pallas_gpu, rules
from lab.kernels.rotary import rotate, rotation

FAST = Case(T=17, S=17, rule=rules.own_branch & rules.window(9), softcap=1.5, scale=0.7, H=2, G=1)
CASES = {
    "capped": FAST,
    "groups, capped": dataclasses.replace(FAST, T=20, S=20, H=4, G=2),
    "all_branches": Case(T=50, S=50, rule=rules.all_branches, H=2, G=1),
    "few queries": Case(T=7, S=50, rule=rules.causal, H=2, G=2, K=6, V=16),
    "few keys": Case(T=50, S=5, rule=rules.all_branches, H=2, G=1),
}


def dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    with pytest.MonkeyPatch.context() as patch:
        kernel = functools.partial(hopper.plgpu.kernel, interpret=InterpretGPUParams(detect_races=True))
        patch.setattr(hopper.plgpu, "kernel", kernel)
        patch.setattr(hopper.plgpu, "layout_cast", lambda x, layout: x)
        patch.setattr(pallas_gpu, "tile_sizes", lambda T, S: (16, 8))
        patch.setattr(hopper, "matrix", lambda x_s: x_s[...])
        patch.setattr(
            hopper, "dot", lambda a_s, b_s: sum(dot(x_s[...], y_s[...].T) for x_s, y_s in zip(a_s, b_s, strict=True))
        )
        patch.setattr(hopper, "add_dot", lambda sums, a, b_s: sums + dot(a, b_s[...]))
        yield


@functools.cache
def compiled(case: Case):
    """(arrays, coordinates, cotangents) -> (o, lse), (dq, dk, dv)"""
    scale = case.K**-0.5 if case.scale is None else case.scale

    def run(arrays, coordinates, cotangents):
        def attend(*arrays):
            return pallas_gpu.attend(*arrays, *coordinates, case.rule, scale, case.softcap)

        outputs, pull = jax.vjp(attend, *arrays)
        return outputs, pull(cotangents)

    return jax.jit(run)


@pytest.mark.matrix("name")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if c == FAST else [pytest.mark.slow, pytest.mark.whole]) for n, c in CASES.items()],
)
@settings(max_examples=2)
@given(seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_they_equal_the_reference_forward_and_backward(name, seed, pack):
    inputs = draw(CASES[name], seed, pack)
    check_close(compiled(CASES[name])(*inputs), compiled_here(CASES[name], "reference")(*inputs))


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(("K", "pairs", "parts"), [(64, 32, (32, 32)), (128, 16, (96, 16, 16))])
@settings(max_examples=2)
@given(seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_queries_rotated_inside_are_queries_rotated_before(K, pairs, parts, seed, pack):
    case = dataclasses.replace(FAST, K=K)
    (q, k, v), (queries, keys), cotangents = draw(case, seed, pack)
    frequencies = jnp.asarray(np.random.default_rng(seed).normal(size=(3, pairs)) / 10, jnp.float32)
    assert pallas_gpu._parts(K, frequencies) == parts

    def outputs_and_gradients(rotated_inside: bool):
        def attend(q, k, v, frequencies):
            if rotated_inside:
                options = dict(frequencies_3F=frequencies)
                return pallas_gpu.attend(q, k, v, queries, keys, case.rule, case.scale, case.softcap, **options)
            q = rotate(q, rotation(queries, frequencies))
            return kernels.attend(q, k, v, queries, keys, case.rule, implementation="reference", **case.options)

        outputs, pull = jax.vjp(attend, q, k, v, frequencies)
        return outputs, pull(cotangents)

    check_close(*(jax.jit(outputs_and_gradients, static_argnums=0)(inside) for inside in (True, False)))


def test_queries_that_see_nothing_give_zeros_and_no_gradient():
    arrays, (queries, keys), cotangents = draw(FAST, 0)
    blind = np.arange(FAST.T) % 3 == 0
    queries = dataclasses.replace(queries, segment=np.where(blind, 7, queries.segment))  # nobody else's segment
    (o, lse), (dq, dk, dv) = jax.device_get(compiled(FAST)(arrays, (queries, keys), cotangents))
    sees_none = ~rules.visible(FAST.rule, queries, keys).any(2)
    assert sees_none.any() and not sees_none.all()
    assert not o[sees_none].any() and not dq[sees_none].any() and (lse[sees_none] == -np.inf).all()
    assert all(np.isfinite(x).all() for x in (o, lse[~sees_none], dq, dk, dv))


@pytest.mark.slow
def test_the_interpreter_notices_tiles_that_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(pallas_gpu.plgpu, "barrier_wait", lambda barrier: None)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)barrier|race"):
        jax.block_until_ready(compiled(dataclasses.replace(FAST, scale=0.6))(*draw(FAST, 1)))
    gpu_callbacks.reset_gpu_interpret_mode_state()
