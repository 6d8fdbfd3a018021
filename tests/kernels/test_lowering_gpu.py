"""What can be shown of the kernels for GPUs where there is none: they lower, and refuse what they do not take."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from test_lowering import A100

from lab import kernels
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels import pallas_gpu, pallas_triton, rules

T, H, G = 200, 4, 2  # more than a tile, and no multiple of one
STEPPED = (rules.q.time // 4 - rules.k.time // 4 < 3) & (rules.k.branch % 2 == 0)  # every kind of operator
FORWARD, GRADIENTS = ["forward_kernel"], ["forward_kernel", "dq_kernel", "dkv_kernel"]
APART = [*GRADIENTS[:2], "dk_kernel", "dv_kernel"]  # what wide heads have instead


def shapes(K: int, V: int, dtype=jnp.bfloat16):
    """(q, k, v), coordinates, cotangents of (o, lse)"""
    of = jax.ShapeDtypeStruct
    arrays = of((1, T, H, K), dtype), of((1, T, G, K), dtype), of((1, T, G, V), dtype)
    return arrays, Coordinates(*(of((1, T), jnp.int32),) * 4), (of((1, T, H, V), dtype), of((1, T, H), jnp.float32))


def forward(rule=rules.own_branch, softcap=None):
    def run(arrays, at, _):
        return pallas_gpu.attend(*arrays, at, at, rule, 0.1, softcap)

    return run


def gradients(rule=rules.own_branch, softcap=None):
    def run(arrays, at, cotangents):
        return jax.vjp(lambda *arrays: forward(rule, softcap)(arrays, at, None), *arrays)[1](cotangents)

    return run


def lowered(run, shapes) -> list[str]:
    """The kernels in the program that CUDA would be given, by name and in order."""
    text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call" in line and "mosaic_gpu" in line]
    return [name for line in calls for name in dict.fromkeys((*GRADIENTS, *APART)) if name in line]


def test_narrow_heads_lower_padded():
    assert pallas_gpu.refusal(32, 16, jnp.bfloat16) is None
    assert lowered(gradients(), shapes(32, 16)) == GRADIENTS


def pairs(widths):
    return [
        pytest.param(K, V, marks=[] if K == V == 64 else pytest.mark.slow) for K, V in itertools.product(widths, widths)
    ]


@pytest.mark.matrix("K")
@pytest.mark.parametrize(("K", "V"), pairs(pallas_gpu.WIDTHS))
def test_forward_and_backward_lower_for_every_width(K, V):
    assert pallas_gpu.refusal(K, V, jnp.bfloat16) is None
    assert lowered(forward(), shapes(K, V)) == FORWARD
    assert lowered(gradients(), shapes(K, V)) == (GRADIENTS if K + V <= pallas_gpu.TOGETHER else APART)


def test_programs_with_the_longest_lists_begin_first():
    """Each tile of each row once."""
    at = Coordinates(jnp.zeros((2, T), jnp.int32), *(jnp.tile(jnp.arange(T, dtype=jnp.int32), (2, 1)),) * 3)
    queues = pallas_gpu.plan(rules.causal, at, at)
    for tiles, order in zip(queues.lists, (queues.of_queries, queues.of_keys), strict=True):
        assert sorted(order.tolist()) == list(range(tiles.total.size))
        assert (jnp.diff(tiles.total.reshape(-1)[order]) <= 0).all() and len({*tiles.total.tolist()[0]}) > 1


@pytest.mark.parametrize(
    ("K", "V", "pairs"),
    [(64, 64, 32), pytest.param(64, 128, 16, marks=pytest.mark.slow)],
)
def test_rotation_inside_lowers(K, V, pairs):
    def run(arrays, at, cotangents, frequencies_3F):
        def attend(*arrays_and_frequencies):
            *arrays, frequencies_3F = arrays_and_frequencies
            return pallas_gpu.attend(*arrays, at, at, rules.own_branch, 0.1, None, None, frequencies_3F)

        return jax.vjp(attend, *arrays, frequencies_3F)[1](cotangents)

    given = *shapes(K, V), jax.ShapeDtypeStruct((3, pairs), jnp.float32)
    text = jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert not re.search(r"stablehlo.concatenate.*bf16", text)  # which would put rotated pairs together
    assert lowered(run, given) == GRADIENTS


@pytest.mark.parametrize("triton", [True, False])
def test_a_step_of_decoding_is_left_to_kernels_with_few_queries(triton, monkeypatch):
    monkeypatch.setattr(pallas_triton, "OBSTACLE", None if triton else "it has gone")

    def run(arrays, at, keys):
        q, k, v = (x[:, :16] if i == 0 else x for i, x in enumerate(arrays))
        return pallas_gpu.attend(q, k, v, at.map(lambda x: x[:, :16]), keys, rules.own_branch, 0.1, None)

    arrays, at, _ = shapes(64, 64)
    with jax.sharding.use_abstract_mesh(A100):
        text = jax.jit(run).trace(arrays, at, at).lower(lowering_platforms=("cuda",)).as_text()
    assert ("gpu.triton" in text) == triton and "mosaic_gpu" not in text


@pytest.mark.parametrize(("rule", "softcap"), [(STEPPED, None), (rules.all_branches, 30.0)])
def test_rules_of_every_operator_and_a_cap_lower(rule, softcap):
    assert lowered(gradients(rule, softcap), shapes(64, 64)) == GRADIENTS


def test_vmap_lowers_to_one_call_of_each_kernel():
    batched = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), shapes(64, 64))
    assert lowered(jax.vmap(gradients()), batched) == GRADIENTS


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize(
    ("K", "V", "dtype", "why"),
    [
        (64, 64, jnp.float32, "computes in bfloat16, and this is float32"),
        (64, 64, jnp.float16, "computes in bfloat16, and this is float16"),
        (576, 512, jnp.bfloat16, "needs widths up to 256, and these are 576 for keys and 512 for values"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(on_a_gpu, K, V, dtype, why):
    arrays, at, _ = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes(K, V, dtype))
    says = f"'pallas_gpu' (.*){why}; choose among: auto, reference, tiled"
    with pytest.raises(UserError, match=says):
        kernels.attend(*arrays, at, at, rules.causal, implementation="pallas_gpu")


def test_other_generations_of_gpus_are_refused(on_a_gpu, monkeypatch):
    class Device:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert "only Hopper GPUs do (compute capability 9.0), and this one has 8.0" in pallas_gpu.refusal(
        64, 64, jnp.bfloat16
    )


def test_the_registry_hands_over_what_it_takes(on_a_gpu):
    def run(arrays, at, _):
        return kernels.attend(*arrays, at, at, rules.causal, implementation="pallas_gpu", return_lse=True)

    assert lowered(run, shapes(64, 64)) == FORWARD
    assert kernels.resolve("auto") == "tiled"
