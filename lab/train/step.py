"""The training step and the evaluation step: what is compiled, once each for all cells that can share them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lab.coordinates import Coordinates
from lab.data import Batch
from lab.model import mesh, parameter
from lab.model.dropout import Dropout
from lab.train import dropout, optimizer, partition
from lab.train.optimizer import Numbers


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled in, beside the structure of the model and the shapes of a batch."""

    optimizer: str
    decay: str
    microbatches: int = 1
    options: tuple[tuple[str, object], ...] = ()  # of the optimizer
    dropout: tuple[str, ...] = ()  # the rates that are not 0

    @classmethod
    def of(cls, config) -> "Program":
        """That of a config's training and run settings."""
        train = config.train
        static = optimizer.static_options(train), dropout.of_program(train)
        return cls(train.optimizer, train.decay, config.run.microbatches, *static)


class State(NamedTuple):
    """What a step changes: the model and the state of the optimizer."""

    model: nnx.Module
    optimizer: optax.OptState


class Metrics(NamedTuple):
    """Of one step, float32 scalars. loss: nats per labelled token, without the z-loss."""

    loss: jax.Array
    grad_norm: jax.Array


class Scored(NamedTuple):
    """Of every token of a chunk, [B, T]. nats: cross entropy of its label, 0 without one; right: whether the label has
    the largest logit; top: that logit."""

    nats: jax.Array
    right: jax.Array
    top: jax.Array


def initial_state(model, program: Program) -> State:
    trainable = parameter.split(model)[1]
    return State(model, _transformation(program, optimizer.ones(program.optimizer), trainable).init(trainable))


def _transformation(program: Program, numbers: Numbers, trainable):
    return optimizer.transformation(program.optimizer, program.decay, numbers, trainable, program.options)


def summed_losses(model, batch: Batch, noise: Dropout | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Over the labelled tokens of a batch: summed cross entropy (nats), summed log^2 Z, and how many there are."""
    drops = None if noise is None else dataclasses.replace(noise, rows=batch.rows)
    return _summed(model(batch.tokens, batch.coordinates, drops), batch.labels)


def _summed(logits_BTC: jax.Array, labels_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    labelled = labels_BT >= 0
    log_z = jax.nn.logsumexp(logits_BTC, axis=-1)
    label_logit = jnp.take_along_axis(logits_BTC, jnp.maximum(labels_BT, 0)[..., None], axis=-1)[..., 0]
    total = lambda x: jnp.sum(jnp.where(labelled, x, 0))  # noqa: E731
    return total(log_z - label_logit), total(jnp.square(log_z)), jnp.sum(labelled)


def accumulated_gradient(model, batch: Batch, z_loss, microbatches: int, noise: Dropout | None = None):
    """(cross entropy, gradient), both means over the labelled tokens of the whole batch, however it is cut."""
    structure, trainable, rest = parameter.split(model)
    tokens = jnp.maximum(jnp.sum(batch.labels >= 0), 1)

    def objective(trainable, part: Batch):
        ce, z, _ = summed_losses(partition.whole(nnx.merge(structure, trainable, rest)), part, noise)
        return (ce + z_loss * z) / tokens, ce / tokens

    gradient = jax.grad(objective, has_aux=True)
    if microbatches == 1:
        grads, loss = gradient(trainable, batch)
        return loss, grads
    # Rows are dealt out in turn, so that every device has its share of each part.
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), batch)

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(trainable, part)[::-1]), None

    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable)
    return jax.lax.scan(add, zero, parts)[0]


def update(state: State, numbers: Numbers, batch: Batch, program: Program):
    """(cross entropy, gradient, what is added to the weights, the optimizer's next state) of one step."""
    noise = dropout.noise(numbers, program.dropout)
    loss, grads = accumulated_gradient(state.model, batch, numbers["z_loss"], program.microbatches, noise)
    trainable = parameter.split(state.model)[1]
    return loss, grads, *_transformation(program, numbers, trainable).update(grads, state.optimizer, trainable)


def train_step(state: State, numbers: Numbers, batch: Batch, program: Program) -> tuple[State, Metrics]:
    """One update. `program` is static, `state` is donated."""
    loss, grads, updates, optimizer_state = update(state, numbers, batch, program)
    structure, trainable, rest = parameter.split(state.model)
    model = nnx.merge(structure, optax.apply_updates(trainable, updates), rest)
    return State(model, optimizer_state), Metrics(loss, optax.tree.norm(grads))


def evaluated(state: State, numbers: Numbers, program: Program) -> State:
    """The state after the last step, with the weights at which its model is evaluated. `program` is static."""
    structure, trainable, rest = parameter.split(state.model)
    weights = optimizer.evaluated(program.optimizer, numbers, state.optimizer, trainable)
    return state._replace(model=nnx.merge(structure, weights, rest))


def train_steps(states: State, numbers: Numbers, batches: Batch, program: Program) -> tuple[State, Metrics]:
    """One update of each member of a stack."""
    return jax.vmap(lambda *member: train_step(*member, program))(states, numbers, batches)


def evaluation_step(model, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Over the labelled tokens: summed cross entropy (nats), how many have the largest logit, how many there are."""
    logits_BTC = model(batch.tokens, batch.coordinates)
    ce, _, tokens = _summed(logits_BTC, batch.labels)
    return ce, jnp.sum(jnp.argmax(logits_BTC, axis=-1) == batch.labels), tokens


def score_chunk(model, cache, tokens_BT: jax.Array, labels_BT: jax.Array, start: jax.Array):
    """(Scored, the cache that holds the chunk too) of the tokens at times start, start + 1, ... of one text in each
    row. A token of -1 is padding, a label of -1 is none. Logits are those of this chunk alone, and stay in here; what
    is returned of them every host has whole. `cache` is donated."""
    real_BT, time_BT = tokens_BT >= 0, jnp.zeros_like(tokens_BT) + start + jnp.arange(tokens_BT.shape[1])
    at = Coordinates(jnp.where(real_BT, 0, -1), real_BT.astype(jnp.int32), time_BT, time_BT)
    logits_BTC, cache = model.extend(jnp.maximum(tokens_BT, 0), at, cache)
    labelled_BT, labels_BT1 = labels_BT >= 0, jnp.maximum(labels_BT, 0)[..., None]
    label_BT = jnp.take_along_axis(logits_BTC, labels_BT1, axis=-1)[..., 0]
    nats_BT = jnp.where(labelled_BT, jax.nn.logsumexp(logits_BTC, axis=-1) - label_BT, 0)
    right_BT = labelled_BT & (jnp.argmax(logits_BTC, axis=-1) == labels_BT)
    return mesh.everywhere(Scored(nats_BT, right_BT, logits_BTC.max(axis=-1))), cache
