"""Kernels lower for the machines they are written for, none of which is here."""

import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from lab.coordinates import Coordinates
from lab.kernels import pallas_triton, rules
from lab.kernels.rules import Rule

KERNELS = ["_forward_kernel", "_dq_kernel", "_dkv_kernel"]
EVERY_OPERATION = (
    ((rules.q.time // 7 - rules.k.time % 5 * 2 + 1 < 3) | (rules.k.branch == 0))
    & rules.window(40)
    & (rules.minimum(rules.k.time.reached((3, 9)), rules.maximum(rules.q.index, 2)) <= 2)
)
A100 = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA A100", 1, "gpu"))
ROWS, T, S = 2, 70, 150


def gradients(rule: Rule, softcap: float | None = None):
    """A function that needs every kernel."""

    def run(q, k, v, queries, keys, cotangents):
        def attend(q, k, v):
            scale = q.shape[-1] ** -0.5
            return pallas_triton.attend(q, k, v, queries, keys, rule, scale, softcap, interpret=False)

        outputs, pull = jax.vjp(attend, q, k, v)
        return outputs, pull(cotangents)

    return run


def arguments(H: int, G: int, K: int, V: int, dtype: str, *stack: int):
    """Shapes of what a function of `gradients` takes, stacked."""
    shape = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((*stack, ROWS, *shape), dtype)  # noqa: E731
    queries, keys = (Coordinates(*[shape(length, dtype=jnp.int32)] * 4) for length in (T, S))
    cotangents = shape(T, H, V), shape(T, H, dtype=jnp.float32)
    return shape(T, H, K), shape(S, G, K), shape(S, G, V), queries, keys, cotangents


def triton_kernels(function, arguments) -> list[str]:
    """Names of the Triton kernels in the program for CUDA."""
    with jax.sharding.use_abstract_mesh(A100):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@__gpu\$xla.gpu.triton\(.*", text)
    return [re.search(r' name = "(\w+)"', call)[1] for call in calls]


@pytest.mark.parametrize(("K", "V", "dtype"), [
    (64, 64, "bfloat16"), (128, 128, "bfloat16"), (192, 128, "bfloat16"), (192, 192, "bfloat16"),
    (256, 256, "bfloat16"), (576, 512, "bfloat16"), (8, 6, "float32"), (192, 128, "float32"), (576, 512, "float32"),
])  # fmt: skip
def test_triton_kernels_lower_for_cuda(K, V, dtype):
    assert triton_kernels(gradients(rules.own_branch), arguments(6, 2, K, V, dtype)) == KERNELS


@pytest.mark.parametrize("stack", [(), (2,), (2, 3)], ids=str)
def test_triton_kernels_lower_with_every_operation_of_a_rule_a_cap_and_stacked(stack):
    run = gradients(EVERY_OPERATION, softcap=30.0)
    for _ in stack:
        run = jax.vmap(run)
    assert triton_kernels(run, arguments(4, 1, 64, 32, "bfloat16", *stack)) == KERNELS


@given(st.integers(1, 64))
def test_parts_of_a_width_are_powers_of_two_end_to_end(sixteens):
    width = 16 * sixteens
    parts = pallas_triton.parts(width)
    assert [index for part in parts for index in range(width)[part]] == list(range(width))
    assert {(part.stop - part.start).bit_count() for part in parts} == {1}
    assert len(parts) == width.bit_count()
