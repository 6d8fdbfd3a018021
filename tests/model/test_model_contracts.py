"""What every variant of the model owes, whatever it computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import variants

from lab import kernels
from lab import model as lab_model
from lab.data import Batch
from lab.errors import UserError
from lab.kernels import residuals, rules
from lab.model.spec import biased, layer_specs

TOLERANCE = 1e-4  # float32 in another order; hyper-connections amplify it to half of this


def unrolled_streams() -> list:
    """(variant, scan) of every stream that VARIANTS do not have: what they compute does not depend on the scan."""
    return [pytest.param(name, False, marks=pytest.mark.slow) for name in variants.ON_STREAMS]


@functools.cache
def logits_and_gradient(variant: str, **overrides):
    """Of one model and one batch: logits [B, T, C], and the gradient of a random function of them."""
    config = variants.config(variant, **overrides)
    batch, model = tiny.batch(), tiny.model(config)

    def objective(model, batch: Batch):
        logits = model(batch.tokens, batch.coordinates)
        pull = jax.random.normal(jax.random.key(0), logits.shape) * (batch.coordinates.segment >= 0)[..., None]
        return jnp.mean(pull * logits), logits

    gradient, logits = jax.jit(jax.grad(objective, has_aux=True))(model, batch)
    return jax.device_get((logits, jax.tree.leaves(gradient)))


def check_same(one, other) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE * max(1.0, np.abs(b).max())), one, other)


@pytest.mark.matrix("variant")
@pytest.mark.parametrize("variant", variants.scanned([*variants.marked(), *variants.marked(variants.ON_STREAMS, ())]))
def test_scanned_equals_unrolled(variant):
    # Two whole periods of the pattern, and a remainder where it has more than one entry.
    entries = len(variants.config(variant).model.pattern)
    layers = dict(model__layers=2 * entries + (entries > 1))
    check_same(logits_and_gradient(variant, run__scan=True, **layers), logits_and_gradient(variant, **layers))


def rematerialised() -> list:
    """(variant, scan, policy): every variant under the one that keeps least, a few under every one."""
    full = [pytest.param(*each.values, "full", marks=each.marks) for each in variants.both_ways(variants.marked())]
    policies = [policy for policy in variants.REMAT if policy not in ("none", "full")]
    return full + [pytest.param(*each.values, False, p, marks=each.marks) for p in policies for each in few()]


def few() -> list:
    return variants.marked(variants.SCANNED, fast=("default",))


@pytest.mark.slow
@pytest.mark.matrix("variant")
@pytest.mark.parametrize(("variant", "scan", "policy"), rematerialised())
def test_rematerialised_equals_kept(variant, scan, policy):
    check_same(logits_and_gradient(variant, run__remat=policy, run__scan=scan), logits_and_gradient(variant))


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_rematerialisation_keeps_less(policy):
    """Otherwise the test above compares a program with itself."""
    batch = tiny.batch(rows=1, length=640)

    def kept(remat: str) -> int:
        config = variants.config("default", run__remat=remat, model__feedforward__width=512)
        model = lab_model.abstract(config.model, config.run)
        pull = jax.eval_shape(lambda model: jax.vjp(lambda m: m(batch.tokens, batch.coordinates), model)[1], model)
        return sum(x.size for x in jax.tree.leaves(pull))

    assert kept(policy) < 0.8 * kept("none")


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("implementation", [name for name in variants.IMPLEMENTATIONS if name != "reference"])
def test_attention_is_made_once_where_its_outputs_are_kept(implementation, scan):
    """Counted in the gradient of a layer: what attention makes bears its name."""

    def made(policy: str) -> int:
        run = dict(run__implementation=implementation, run__remat=policy, run__scan=scan)
        config = variants.config("default", model__layers=1, **run)
        model, batch = lab_model.abstract(config.model, config.run), tiny.batch(rows=1, length=32)
        loss = lambda model: model(batch.tokens, batch.coordinates).sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss, allow_int=True))(model)).count(f"name[name={residuals.NAME}]")

    assert made("none") == made("dots") == 2 < made("full")


@pytest.mark.matrix("variant")
@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(n, marks=[] if n == "tiled" else pytest.mark.slow)
        for n in variants.IMPLEMENTATIONS
        if n != "reference"
    ],
)
@pytest.mark.parametrize("variant", [*variants.marked(fast=("default",)), *variants.marked(variants.ON_RULES, ())])
def test_implementations_equal_the_reference(variant, implementation):
    if biased(variants.config(variant).model) and not kernels.IMPLEMENTATIONS[implementation].biases:
        with pytest.raises(UserError, match=f"'{implementation}' adds no bias"):
            logits_and_gradient(variant, run__implementation=implementation)
        return
    got, expected = (logits_and_gradient(variant, run__implementation=i) for i in (implementation, "reference"))
    check_same(got, expected)


def reachable(config, coordinates) -> np.ndarray:
    """bool [B, T, S]: may logits at t depend on the token at s? The rules of all layers, composed, and the stream."""
    reach = np.broadcast_to(np.eye(coordinates.shape[1], dtype=bool), (*coordinates.shape, coordinates.shape[1]))
    specs = layer_specs(config)
    for layer in range(config.layers):
        seen = np.asarray(rules.visible(rules.parse(specs[layer % len(specs)].rule), coordinates, coordinates))
        reach = reach | (seen @ reach)
    return reach


@pytest.mark.matrix("variant")
@pytest.mark.parametrize(
    ("variant", "scan"),
    [
        *variants.both_ways([*variants.marked(fast=("local : global",)), *variants.marked(variants.ON_RULES, ())]),
        *unrolled_streams(),
    ],
)
def test_nothing_hidden_is_felt(variant, scan):
    config = variants.config(variant, run__scan=scan)
    model, batch = tiny.model(config), tiny.batch(rows=2, length=24)
    coordinates = batch.coordinates
    assert coordinates.segment.max() > 0 and coordinates.branch.max() > 1 and coordinates.branch.min() == 0

    @jax.jit
    def felt(model):
        x_BTD, views = model.embed(batch.tokens, coordinates), model.views(coordinates, coordinates)
        _, pull = jax.vjp(lambda x_BTD: model.logits(model.run_layers(x_BTD, views)[0]), x_BTD)
        shape = (*batch.tokens.shape, tiny.VOCABULARY)
        one_token = lambda t: jnp.zeros(shape).at[:, t].set(jax.random.normal(jax.random.key(1), shape[::2]))  # noqa: E731
        gradients = jax.lax.map(lambda t: pull(one_token(t))[0], jnp.arange(shape[1]))
        return jnp.abs(gradients).max(-1).swapaxes(0, 1)  # [B, T, S]

    reach = reachable(config.model, coordinates)
    felt_BTS = np.asarray(felt(model))
    assert not felt_BTS[~reach].any()
    real = (coordinates.segment >= 0)[..., None]  # a stream that drops a residual forgets what sees nothing
    assert (felt_BTS[reach & real] > 0).all()  # and all that may be felt is


@functools.cache
def extend():
    return jax.jit(lambda model, batch, cache: model.extend(batch.tokens, batch.coordinates, cache))


def decoded(model, batch: Batch, chunks: list[int]) -> np.ndarray:
    """Logits [B, T, C] of tokens given to the cache a chunk at a time; some of its slots stay empty."""
    rows, length = batch.tokens.shape
    branches = int(batch.coordinates.branch.max())
    cache, logits, begin = jax.jit(lambda model: model.init_cache(rows, length + 3, branches))(model), [], 0
    for size in chunks:
        part = jax.tree.map(lambda x, begin=begin, size=size: x[:, begin : begin + size], batch)
        new, cache = extend()(model, part, cache)
        logits.append(new)
        begin += size
    assert begin == length
    np.testing.assert_array_equal(cache.used, (batch.coordinates.segment >= 0).sum(1))
    return np.concatenate(logits, axis=1)


@pytest.mark.matrix("variant")
@pytest.mark.parametrize(
    ("variant", "scan"),
    [
        *variants.both_ways([*variants.marked(), *variants.marked(variants.ON_RULES, ())]),
        *unrolled_streams(),
    ],
)
def test_decoding_with_a_cache_equals_the_full_pass(variant, scan):
    model, batch = tiny.model(variants.config(variant, run__scan=scan)), tiny.batch(rows=2, length=24)
    full = jax.jit(type(model).__call__)(model, batch.tokens, batch.coordinates)
    real = batch.coordinates.segment >= 0
    for same, chunks in ((model.apart(), [1] * 24), (model, [9, 1, 1, 1, 9, 1, 1, 1])):
        np.testing.assert_allclose(decoded(same, batch, chunks)[real], full[real], atol=TOLERANCE * 3)


@pytest.mark.slow
def test_a_cache_in_bfloat16_decodes_near_the_full_pass():
    model, batch = tiny.model(variants.config("default", model__compute="bfloat16")), tiny.batch(rows=2, length=24)
    assert {x.dtype for x in jax.tree.leaves(model.init_cache(1, 2).layers)} == {jnp.dtype("bfloat16")}
    full = jax.jit(type(model).__call__)(model, batch.tokens, batch.coordinates)
    difference = np.abs(decoded(model, batch, [9, 1, 5, 9]) - full)[batch.coordinates.segment >= 0]
    assert difference.max() < 0.1 * np.abs(full).max()
