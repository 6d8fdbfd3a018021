"""What a config computes, however and wherever it runs: digests of its programs in one canonical form.

They are the same on every device, mesh and attention implementation, and compare under equal versions of jax, flax and
optax. Programs are traced, never compiled: it takes seconds, whatever the size of the model, and no memory.
"""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from lab import model as lab_model
from lab.coordinates import Coordinates
from lab.data import Batch
from lab.model import parameter
from lab.train import dropout, optimizer, partition, step
from lab.train.digest import digest
from lab.train.step import Program, State

_digests: dict = {}  # of steps, by what else is compiled once: cells that share an executable share it


def train_step(config: ConfigDict) -> str:
    """Of the training step: what becomes of the state, numbers and a batch of the config's shape; loss and gradient.

    Numbers and tables are inputs: cells that differ only in them share it. Call it outside any mesh.
    """
    config = canonical(config)
    program = Program.of(config)
    state = jax.eval_shape(lambda: _initial_state(config, jax.random.key(0)))
    numbers = {name: jax.ShapeDtypeStruct((), np.float32) for name in optimizer.ones(program.optimizer)}
    numbers |= {name: jax.ShapeDtypeStruct((), x.dtype) for name, x in dropout.numbers_by_step(config)(0).items()}
    inputs = state, numbers, abstract_batch(config)
    leaves, structure = jax.tree.flatten(inputs)
    key = structure, tuple((x.shape, str(x.dtype)) for x in leaves), program
    if key not in _digests:
        closed = jax.make_jaxpr(step.train_step, static_argnums=3)(*inputs, program)
        # Another number or coordinate, which this program does not read, must not push the others out of their places.
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(inputs[1:])]
        _digests[key] = digest(closed, [*range(len(jax.tree.leaves(state))), *names])
    return _digests[key]


def evaluation_step(config: ConfigDict, rows: int, length: int) -> str:
    """Of the evaluation step on a batch of that many rows of `length` tokens. Weights and tables are inputs."""
    config = canonical(config)
    inputs = lab_model.abstract(config.model, config.run), batch_of(rows, length)
    leaves, structure = jax.tree.flatten(inputs)
    key = structure, tuple((x.shape, str(x.dtype)) for x in leaves)
    if key not in _digests:
        closed = jax.make_jaxpr(step.evaluation_step)(*inputs)
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(inputs[1])]
        _digests[key] = digest(closed, [*range(len(jax.tree.leaves(inputs[0]))), *names])
    return _digests[key]


def score_chunk(config: ConfigDict, rows: int, chunk: int, slots: int) -> str:
    """Of the step that scores so many tokens of each row behind a cache. Weights, tables and the cache are inputs."""
    config = canonical(config)
    model, tokens = lab_model.abstract(config.model, config.run), jax.ShapeDtypeStruct((rows, chunk), np.int32)
    cache = jax.eval_shape(lambda: model.init_cache(rows, slots))
    inputs = model, cache, tokens, tokens, jax.ShapeDtypeStruct((), np.int32)
    leaves, structure = jax.tree.flatten(inputs)
    key = structure, tuple((x.shape, str(x.dtype)) for x in leaves)
    if key not in _digests:
        _digests[key] = digest(jax.make_jaxpr(step.score_chunk)(*inputs), [*range(len(leaves))])
    return _digests[key]


def initial_state(config: ConfigDict) -> str:
    """Of how weights are drawn from a key, and of the optimizer's state when training starts."""

    def drawn(key):
        state = _initial_state(canonical(config), key)
        return parameter.split(state.model)[1], state.optimizer

    return digest(jax.make_jaxpr(drawn)(jax.eval_shape(lambda: jax.random.key(0))))


def tables(config: ConfigDict) -> str:
    """Of the values that the model reads and does not train: to their program they are constants, known by bytes."""
    made = lambda: parameter.tables(_initial_state(canonical(config), jax.random.key(0)).model)  # noqa: E731
    return digest(jax.make_jaxpr(made)())


def canonical(config: ConfigDict) -> ConfigDict:
    """The config, with its fields of how a program runs, which leave what it computes as it is, set in the one way."""
    config = config.copy_and_resolve_references()
    config.run.update(scan=False, remat="none", implementation="reference", microbatches=1)
    return config


def abstract_batch(config: ConfigDict) -> Batch:
    """A training batch of all hosts, by shape only."""
    batch = batch_of(config.data.rows, config.data.texts_per_row * config.data.text_length)
    return dataclasses.replace(batch, rows=batch.tokens) if dropout.of_program(config.train) else batch


def batch_of(rows: int, length: int) -> Batch:
    numbers = jax.ShapeDtypeStruct((rows, length), np.int32)
    return Batch(numbers, numbers, Coordinates(*[numbers] * 4))


def _initial_state(config: ConfigDict, key: jax.Array) -> State:
    model = lab_model.build(config.model, key, config.run)
    return step.initial_state(partition.parted(model, partition.Partition.of(config), key), Program.of(config))
