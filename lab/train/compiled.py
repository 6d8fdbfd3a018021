"""Steps compiled ahead of time for a mesh, and called directly: another shape is an error, never a silent compile."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lab import model as lab_model
from lab import watch
from lab.model import mesh as lab_mesh
from lab.model import parameter
from lab.train import instruments, origin, step
from lab.train import optimizer as lab_optimizer
from lab.train.partition import Partition, parted
from lab.train.step import Program, State

_train = jax.jit(step.train_step, donate_argnums=0, static_argnames="program")
_train_many = jax.jit(step.train_steps, donate_argnums=0, static_argnames="program")
_evaluate = jax.jit(step.evaluation_step)
_measure = jax.jit(instruments.measure, static_argnames=("program", "names"))
_measure_many = jax.jit(instruments.measure_members, static_argnames=("program", "names"))
_executables = {}
# XLA would start a kernel twice whose output is kept for the backward pass: once to write it among those of all layers,
# and once more for the layer above.
OPTIONS = {"gpu": {"xla_gpu_enable_dynamic_slice_fusion": False}}


def initial_state(config, program: Program, mesh: Mesh) -> State:
    """A fresh state, every array laid over the mesh as its declaration says; its weights are those of
    config.checkpoint, if there is one.

    Weights and tables are made apart: cells that differ in tables share the program that draws their weights.
    """
    if config.checkpoint:
        return _begun(config, program, mesh)

    def parts(key):
        state = step.initial_state(lab_model.build(config.model, key, config.run), program)
        structure, trainable, rest = parameter.split(state.model)
        return structure, (trainable, state.optimizer), rest

    def made(part: int):
        def initial(key):
            return parts(key)[part]

        return jax.jit(initial, out_shardings=parameter.shardings(jax.eval_shape(initial, key), mesh))(key)

    key = jax.random.key(config.model_seed)
    with jax.set_mesh(mesh):
        trainable, optimizer = made(1)
        return State(nnx.merge(jax.eval_shape(parts, key)[0], trainable, made(2)), optimizer)


def _begun(config, program: Program, mesh: Mesh) -> State:
    """A fresh state that goes on from the weights of a checkpoint: adapters are drawn, the rest is read."""
    model = origin.read(origin.find(config.checkpoint), described(config, mesh), mesh)

    def state(model, key):
        return step.initial_state(parted(model, Partition.of(config), key), program)

    key = jax.random.key(config.model_seed)
    with jax.set_mesh(mesh):
        laid_out = parameter.shardings(jax.eval_shape(state, model, key), mesh)
        return jax.jit(state, out_shardings=laid_out, donate_argnums=0)(model, key)


def described(config, mesh: Mesh):
    """The model of a config over the mesh, with its tables, and weights of which shapes, types and shardings are known:
    what those of a checkpoint, or of a model that differs in tables and rules, are laid into."""

    def parts(key):
        return parameter.split(lab_model.build(config.model, key, config.run))

    key = jax.random.key(config.model_seed)
    with jax.set_mesh(mesh):
        structure, weights, tables = jax.eval_shape(parts, key)
        laid = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            weights, parameter.shardings(weights, mesh),
        )  # fmt: skip
        made = jax.jit(lambda key: parts(key)[2], out_shardings=parameter.shardings(tables, mesh))(key)
        return nnx.merge(structure, laid, made)


def laid(model, mesh: Mesh):
    """A model over the mesh as its declaration says. What a step puts out may lie otherwise, and another program, of
    other bits, would be compiled for it than for the same weights once they are read back."""
    return jax.device_put(model, parameter.shardings(model, mesh))


def with_weights_of(model, other):
    """A model with the weights of another one, whose weights have the same shapes."""
    structure, _, rest = parameter.split(model)
    return nnx.merge(structure, parameter.split(other)[1], rest)


def stacked(states: list[State], mesh: Mesh) -> State:
    """States along a new leading axis, which every device holds whole."""

    def stack(*states):
        return jax.tree.map(lambda *x: jnp.stack(x), *states)

    with jax.set_mesh(mesh):
        return jax.jit(stack, out_shardings=parameter.shardings(jax.eval_shape(stack, *states), mesh))(*states)


def unstacked(tree, index: int):
    """One member of a stacked state or model."""
    return jax.tree.map(lambda x: x[index], tree)


def abstract(tree):
    """Shapes, types and shardings without values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


def emptied(state: State) -> State:
    """A state, or stacked ones, whose weights and moments are deleted: what those of a checkpoint are laid into, so
    that no device holds both."""
    structure, trainable, rest = parameter.split(state.model)
    described = State(nnx.merge(structure, abstract(trainable), rest), abstract(state.optimizer))
    for array in jax.tree.leaves((trainable, state.optimizer)):
        array.delete()  # a model is freed late, since it refers to itself
    return described


def evaluated(state: State, numbers, program: Program, mesh: Mesh, members: bool) -> State:
    """A state after its last step, or stacked ones, with the weights at which their models are evaluated: for most
    optimizers as it is."""
    if lab_optimizer.OPTIMIZERS[program.optimizer].evaluated is None:
        return state
    one = functools.partial(step.evaluated, program=program)
    function, laid_out = jax.vmap(one) if members else one, parameter.shardings(state, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(function, out_shardings=laid_out)(state, numbers)


def executable(function, mesh: Mesh, *arguments, **static):
    """That of a jitted function for arguments of such shapes, over the mesh; compiled once."""
    leaves, structure = jax.tree.flatten(abstract(arguments))
    key = (function, mesh, structure, tuple((x.shape, x.dtype, x.sharding) for x in leaves), tuple(static.items()))
    if key not in _executables:
        with watch.phase("compiles"), jax.set_mesh(mesh):
            options = OPTIONS.get(mesh.devices.flat[0].platform)
            _executables[key] = function.lower(*arguments, **static).compile(compiler_options=options)
    return _executables[key]


def train_step(state: State, numbers, batch, program: Program, mesh: Mesh):
    """compiled(state, numbers, batch) -> (state, metrics)"""
    return executable(_train, mesh, state, numbers, batch, program=program)


def train_steps(states: State, numbers, batches, program: Program, mesh: Mesh):
    """The same for stacked members."""
    return executable(_train_many, mesh, states, numbers, batches, program=program)


def measure(state: State, numbers, batch, program: Program, names: tuple[str, ...], mesh: Mesh, members: int = 1):
    """compiled(state, numbers, batch) -> what lab.train.instruments measures of that step; of stacked members too."""
    function = _measure_many if members > 1 else _measure
    return executable(function, mesh, state, numbers, batch, program=program, names=names)


def evaluation_step(model, batch, mesh: Mesh):
    """compiled(model, batch) -> (summed nats, tokens answered right, labelled tokens)"""
    return executable(_evaluate, mesh, model, batch)


def described_cache(model, rows: int, length: int, mesh: Mesh):
    """Shapes, types and shardings of a cache of so many rows and slots: its rows lie as those of a batch do."""
    with jax.set_mesh(mesh):
        made = [jax.eval_shape(lambda n=n: model.init_cache(n, length)) for n in (rows, 2 * rows)]
    return jax.tree.map(functools.partial(_over_rows, mesh), *made)


def empty_cache(model, rows: int, length: int, mesh: Mesh):
    """Such a cache without a token."""
    described, (leaves, structure) = described_cache(model, rows, length, mesh), jax.tree.flatten(abstract(model))
    shardings = jax.tree.map(lambda x: x.sharding, described)
    key = ("empty_cache", structure, tuple((x.shape, x.dtype, x.sharding) for x in leaves), rows, length, mesh)
    if key not in _executables:
        with watch.phase("compiles"), jax.set_mesh(mesh):
            made = jax.jit(lambda model: model.init_cache(rows, length), out_shardings=shardings)
            _executables[key] = made.lower(model).compile()
    return _executables[key](model)


def _over_rows(mesh: Mesh, one, other) -> jax.ShapeDtypeStruct:
    """Of an array, whose axis of rows is the one in which it differs from that of more rows."""
    axis = next(i for i, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if len({*sizes}) > 1)
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, lab_mesh.BATCH))
    return jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding)


def score_chunk(model, cache, tokens, labels, start, mesh: Mesh):
    """compiled(model, cache, tokens, labels, start) -> (step.Scored, cache): the cache lies as it did."""
    leaves, structure = jax.tree.flatten(cache)
    score = _scoring(structure, tuple(x.sharding for x in leaves))
    return executable(score, mesh, model, cache, tokens, labels, start)


@functools.lru_cache
def _scoring(structure, shardings: tuple):
    """The jitted function: one for each way in which a cache lies."""
    out_shardings = None, jax.tree.unflatten(structure, shardings)
    return jax.jit(step.score_chunk, donate_argnums=1, out_shardings=out_shardings)
