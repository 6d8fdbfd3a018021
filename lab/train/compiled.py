"""Steps compiled ahead of time for a mesh, and called directly: another shape is an error, never a silent compile."""

import jax
from jax.sharding import Mesh

from lab import model as lab_model
from lab.model import parameter
from lab.train import step
from lab.train.step import Program, State

_train = jax.jit(step.train_step, donate_argnums=0, static_argnames="program")
_evaluate = jax.jit(step.evaluation_step)
_executables = {}


def initial_state(model_config, program: Program, mesh: Mesh, seed: int) -> State:
    """A fresh state, every array laid over the mesh as its declaration says."""

    def initial(key):
        return step.initial_state(lab_model.build(model_config, key), program)

    key = jax.random.key(seed)
    with jax.set_mesh(mesh):
        return jax.jit(initial, out_shardings=parameter.shardings(jax.eval_shape(initial, key), mesh))(key)


def abstract(tree):
    """Shapes, types and shardings without values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


def _compile(function, mesh: Mesh, *arguments, **static):
    leaves, structure = jax.tree.flatten(abstract(arguments))
    key = (function, mesh, structure, tuple((x.shape, x.dtype, x.sharding) for x in leaves), tuple(static.items()))
    if key not in _executables:
        with jax.set_mesh(mesh):
            _executables[key] = function.lower(*arguments, **static).compile()
    return _executables[key]


def train_step(state: State, numbers, batch, program: Program, mesh: Mesh):
    """compiled(state, numbers, batch) -> (state, metrics)"""
    return _compile(_train, mesh, state, numbers, batch, program=program)


def evaluation_step(model, batch, mesh: Mesh):
    """compiled(model, batch) -> (summed nats, tokens answered right, labelled tokens)"""
    return _compile(_evaluate, mesh, model, batch)
