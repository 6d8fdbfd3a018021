import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lab.model import parameter
from lab.train import optimizer, step


def gradient(z_loss: float = 0.0, microbatches: int = 1):
    return jax.jit(functools.partial(step.accumulated_gradient, z_loss=z_loss, microbatches=microbatches))


def dlogits(logits, batch, z_loss: float):
    """d loss / d logits by hand, float64: softmax - onehot, and 2 z log Z softmax, means over labelled tokens."""
    logits, labelled = np.asarray(logits, np.float64), batch.labels >= 0
    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    softmax = np.exp(logits - log_z)
    onehot = np.eye(tiny.VOCABULARY)[np.maximum(batch.labels, 0)]
    d = softmax - onehot + 2 * z_loss * log_z * softmax
    return np.where(labelled[..., None], d, 0) / labelled.sum(), -np.log((softmax * onehot).sum(-1))[labelled].mean()


@pytest.mark.parametrize("z_loss", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_loss_and_gradient_against_the_derivative_by_hand(z_loss):
    model, batch = tiny.model(tiny.config()), tiny.batch(rows=3)
    logits, pull = jax.vjp(jax.jit(lambda m: m(batch.tokens, batch.coordinates)), model)
    d, mean = dlogits(logits, batch, z_loss)
    expected = parameter.split(pull(jnp.asarray(d, jnp.float32))[0])[1]
    loss, got = gradient(z_loss)(model, batch)
    assert float(loss) == pytest.approx(mean, rel=1e-5)  # without the z-loss
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_microbatches_weigh_tokens_not_parts(microbatches):
    model, batch = tiny.model(tiny.config()), tiny.batch(rows=8)
    labels = (batch.labels >= 0).sum(1)
    parts = [labels[i::microbatches].sum() for i in range(microbatches)]
    assert max(parts) > 1.2 * min(parts)  # else a mean of means would do
    expected, got = (gradient(0.1, n)(model, batch) for n in (1, microbatches))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_a_part_without_labels_counts_nothing():
    model, batch = tiny.model(tiny.config()), tiny.batch(rows=8)
    batch.labels[1::2] = -1
    expected, got = (gradient(0.1, n)(model, batch) for n in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_a_batch_without_labels_gives_zero_and_no_nan():
    model, batch = tiny.model(tiny.config()), tiny.batch(rows=8)
    batch.labels[:] = -1
    loss, grads = gradient(0.1, 2)(model, batch)
    assert loss == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))


def test_padding_changes_nothing():
    """Neither its token nor its neighbours: only its room."""
    model, batch = tiny.model(tiny.config()), tiny.batch(rows=2)
    padding = batch.coordinates.segment < 0
    assert padding.any()
    other = tiny.batch(rows=2)
    other.tokens[padding] = 1
    other.coordinates.time[padding] = 40
    other.coordinates.index[padding] = 3
    expected, got = (gradient()(model, b) for b in (batch, other))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_the_reported_norm_is_that_of_the_whole_gradient_before_clipping():
    config = tiny.config(train__clip=1e-3)
    program, batch = step.Program("adamw", "declared", 1), tiny.batch()
    state = step.initial_state(tiny.model(config), program)
    _, grads = gradient()(state.model, batch)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.device_get(jax.tree.leaves(grads))))
    numbers = optimizer.numbers_by_step(config.train)(0)
    _, metrics = jax.jit(step.train_step, static_argnames="program")(state, numbers, batch, program)
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-5)


@pytest.mark.slow
def test_evaluation_sums_what_training_means():
    model, batch = tiny.model(tiny.config()), tiny.batch(rows=3)
    nats, right, tokens = jax.jit(step.evaluation_step)(model, batch)
    assert right == (np.argmax(model(batch.tokens, batch.coordinates), axis=-1) == batch.labels).sum()
    assert tokens == (batch.labels >= 0).sum()
    assert float(nats / tokens) == pytest.approx(float(gradient()(model, batch)[0]), rel=1e-6)
