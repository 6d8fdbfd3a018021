"""A parameter is declared once, with what else derives from: its axes, which of them are inputs, whether it decays."""

import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from lab.errors import choose

# Logical axis -> mesh axis. A dimension that the mesh axis does not divide stays whole.
MESH_AXES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor", "vocabulary": "tensor"}

HEADS = ("heads", "kv_heads")  # axes along which each head has a matrix of its own

# Whether Muon takes the heads of an axis one by one, by whether that axis is an input, as in the output projection.
PER_HEAD = {"none": lambda of_input: False, "qkv": lambda of_input: not of_input, "all": lambda of_input: True}


class FixedTable(nnx.Variable):
    """A value the model reads but does not train: rebuilt from the config, never checkpointed."""


class Frozen(nnx.Variable):
    """A weight that a run does not train: it is the one that training began from, and lies in that checkpoint alone."""


def matrix(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], inputs: int = 1, gain: float = 1.0):
    """A weight from its first `inputs` axes to the others, drawn from N(0, gain^2 / fan_in), float32."""
    weight = gain * math.prod(shape[:inputs]) ** -0.5 * jax.random.normal(key, shape)
    return nnx.Param(weight, axes=axes, inputs=inputs, decay=True)


def embedding(key: jax.Array, shape: tuple[int, int], gain: float = 1.0) -> nnx.Param:
    """Vectors of tokens (or the output head, its transpose) [C, D], drawn from N(0, gain^2 / D), float32."""
    weight = gain * shape[1] ** -0.5 * jax.random.normal(key, shape)
    return nnx.Param(weight, axes=("vocabulary", "embed"), inputs=0, decay=True)


def table(key: jax.Array, shape: tuple[int, int], axes: tuple[str, str], spread: float, decay: bool) -> nnx.Param:
    """What is looked up by a position or a distance, drawn from N(0, spread^2), float32: no token is multiplied with
    it, and so it is none of the matrices whose work is counted."""
    return nnx.Param(spread * jax.random.normal(key, shape), axes=axes, inputs=0, decay=decay, looked_up=True)


def scale(size: int, value: float = 1.0) -> nnx.Param:
    """A multiplier per channel that starts at `value`, does not decay, and is whole on every device."""
    return nnx.Param(jnp.full(size, value, jnp.float32), axes=("channel",), inputs=0, decay=False)


def bias(size: int, axis: str = "channel", value: float = 0.0) -> nnx.Param:
    """Something added for each channel or head, or for all channels of heads, flat, so that they lie as their heads
    do; it starts at `value` and does not decay."""
    return nnx.Param(jnp.full(size, value), axes=(axis,), inputs=0, decay=False)


def mixing(shape: tuple[int, ...], value: float = 0.0) -> nnx.Param:
    """What weighs layers, or the scores of tokens: it starts at `value`, does not decay, is whole on every device."""
    return nnx.Param(jnp.full(shape, value), axes=("mixing",) * len(shape), inputs=0, decay=False)


def mixing_start(start: jax.Array) -> nnx.Param:
    """The same where not all of it starts alike."""
    return nnx.Param(start, axes=("mixing",) * start.ndim, inputs=0, decay=False)


def mixing_matrix(key: jax.Array, shape: tuple[int, int], spread: float = 0.02) -> nnx.Param:
    """A small weight from which such numbers are inferred, drawn from N(0, spread^2); it does not decay either."""
    return nnx.Param(spread * jax.random.normal(key, shape), axes=("mixing",) * 2, inputs=0, decay=False)


def low_rank(key: jax.Array, weight: nnx.Variable, rank: int) -> tuple[nnx.Param, nnx.Param]:
    """A [inputs, rank] and B [rank, outputs] for a weight (arXiv 2106.09685, section 4.1), float32: A drawn from
    N(0, 1 / fan_in), B zero. They lie over the mesh, are stacked and decay as the weight does."""
    declared, shape = weight.get_metadata(), weight.get_raw_value().shape
    axes, inputs, stacked = declared["axes"], declared["inputs"], len(shape) - len(declared["axes"])
    into, out = shape[stacked : stacked + inputs], shape[stacked + inputs :]
    drawn = math.prod(into) ** -0.5 * jax.random.normal(key, (*shape[:stacked], *into, rank))
    zero, decay = jnp.zeros((*shape[:stacked], rank, *out), jnp.float32), declared["decay"]
    return (
        nnx.Param(drawn, axes=(*axes[:inputs], "rank"), inputs=inputs, decay=decay),
        nnx.Param(zero, axes=("rank", *axes[inputs:]), inputs=1, decay=decay),
    )


def split(model) -> tuple:
    """(structure, trainable, rest) of a model; nnx.merge puts them together again."""
    return nnx.split(model, nnx.Param, ...)


def tables(model) -> nnx.State:
    """Of a model, what is neither trained nor frozen."""
    return nnx.split(model, nnx.Param, Frozen, ...)[3]


def frozen(model) -> nnx.State:
    """Of a model, the weights that are not trained."""
    return nnx.split(model, nnx.Param, Frozen, ...)[2]


def freeze(model, chosen: Callable[[tuple[str, ...], nnx.Param], bool] = lambda path, weight: True):
    """A model whose weights are Frozen where `chosen(path, weight)`: by default all."""

    def frozen(path, leaf):
        taken = isinstance(leaf, nnx.Param) and chosen(parts(path), leaf)
        return Frozen(leaf.get_raw_value(), **leaf.get_metadata()) if taken else leaf

    return jax.tree_util.tree_map_with_path(frozen, model, is_leaf=_is_variable)


def thaw(model):
    """A model whose Frozen weights are parameters again."""

    def thawed(leaf):
        return nnx.Param(leaf.get_raw_value(), **leaf.get_metadata()) if isinstance(leaf, Frozen) else leaf

    return jax.tree.map(thawed, model, is_leaf=_is_variable)


def _is_variable(x) -> bool:
    """Optax leaves a variable without a value where it keeps no state of a parameter."""
    return isinstance(x, nnx.Variable) and bool(jax.tree.leaves(x))


def _declared(tree, function):
    """`function(variable)` for every variable of a model or of a part of one, in the structure of its leaves."""

    def replaced(leaf):
        return leaf.replace(function(leaf)) if _is_variable(leaf) else function(leaf)

    return jax.tree.map(replaced, tree, is_leaf=_is_variable)


def decay_mask(trainable, everything: bool = False):
    """True where weight decay applies: by declaration, or everywhere."""
    return _declared(trainable, lambda v: everything or v.get_metadata()["decay"])


def declare_factors(tree, matrices: tuple[float, float], all_of_it: float = 1.0) -> None:
    """Declares of the parameters of a part of a model what their learning rate and their decay are multiplied by: those
    of matrices by a pair, and the rates of all by one number besides."""
    for variable in jax.tree.leaves(tree, is_leaf=_is_variable):
        declared = variable.get_metadata()
        if "inputs" in declared:
            rate, decay = matrices if declared["inputs"] else (1.0, 1.0)
            variable.set_metadata(factors=(rate * all_of_it, decay))


def factors(trainable) -> tuple[dict[str, tuple[float, float]], object]:
    """({label: (factor of the rate, of the decay)}, the label of every parameter); one label where nothing is said."""
    pair = lambda v: v.get_metadata().get("factors", (1.0, 1.0))  # noqa: E731
    variables = jax.tree.leaves(trainable, is_leaf=_is_variable)
    return {str(pair(v)): pair(v) for v in variables}, _declared(trainable, lambda v: str(pair(v)))


def _name(path) -> str:
    """What a parameter is called: the last part of its path."""
    return jax.tree_util.keystr(path[-1:], simple=True)


def parts(path) -> tuple[str, ...]:
    """A path by the names on it: those of modules, places in a list, and last what the parameter is called."""
    return tuple(jax.tree_util.keystr((part,), simple=True) for part in path)


def by_parts(model) -> dict[tuple[str, ...], nnx.Variable]:
    """Every variable of a model by `parts` of the path to it."""
    return {parts(path): v for path, v in jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_variable)}


def chosen(what: str, names: Sequence[str], among: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The paths on which one of the names lies, in their order. Raises UserError, calling a name `what`, for one that
    lies on none."""
    among = list(among)
    known = sorted({part for path in among for part in path if not part.isdecimal()})
    for name in names:
        choose(what, name, known)
    return [path for path in among if {*names} & {*path}]


def names(trainable, matrices: bool = False) -> list[str]:
    """What the parameters of a model are called: all of them, or only those with a matrix."""
    found = jax.tree_util.tree_leaves_with_path(trainable, is_leaf=_is_variable)
    return sorted({_name(path) for path, v in found if v.get_metadata()["inputs"] or not matrices})


def muon_dimensions(trainable, per_head: str = "none", on: tuple[str, ...] = ()):
    """The axes of each matrix that Muon orthogonalises, negative; None where it leaves a parameter to AdamW.

    per_head: a name of PER_HEAD. on: names of the parameters that Muon takes; empty: all with a matrix.
    """

    def dimensions(path, variable):
        declared = variable.get_metadata()
        taken = declared["inputs"] and (not on or _name(path) in on)
        return variable.replace(_matrix_axes(declared, PER_HEAD[per_head]) if taken else None)

    return jax.tree_util.tree_map_with_path(dimensions, trainable, is_leaf=_is_variable)


def _matrix_axes(declared: dict, per_head) -> MuonDimensionNumbers:
    """Input and output axes. Those in neither are a batch: heads, if they are apart, and stacked layers always."""
    axes, inputs = declared["axes"], declared["inputs"]
    whole = range(inputs), range(inputs, len(axes))
    split = [[i for i in side if axes[i] not in HEADS or not per_head(side is whole[0])] for side in whole]
    sides = split if all(split) else whole  # a weight with one number for each head has no matrix for each
    return MuonDimensionNumbers(*(tuple(i - len(axes) for i in side) for side in sides))


def partition_spec(variable: nnx.Variable, mesh_shape: dict[str, int]) -> PartitionSpec:
    """How a variable is laid over the mesh. Stacked layers have one more leading axis than was declared: kept whole."""
    axes = variable.get_metadata().get("axes", ())
    shape = variable.get_raw_value().shape
    names = [None] * (len(shape) - len(axes)) + [MESH_AXES.get(axis) for axis in axes]
    return PartitionSpec(
        *(n if n and s % mesh_shape.get(n, 1) == 0 else None for n, s in zip(names, shape, strict=True))
    )


def shardings(tree, mesh: Mesh):
    """A NamedSharding for every variable, from its declaration; replicated where there is none."""

    def sharding(leaf):
        spec = partition_spec(leaf, dict(mesh.shape)) if isinstance(leaf, nnx.Variable) else PartitionSpec()
        return NamedSharding(mesh, spec)

    return _declared(tree, sharding)


def shapes(tree) -> dict[str, tuple[int, ...]]:
    """Of every leaf of a model or of a part of one, by the path to it."""
    return {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def count(tree) -> int:
    """How many numbers the trainable part of a model (abstract or not) holds."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(split(tree)[1]))


def in_matrices(tree) -> int:
    """How many of them are in matrices, in a part that is not stacked: multiplications of a token with its weights."""
    found = jax.tree.leaves(split(tree)[1], is_leaf=_is_variable)
    return sum(int(np.prod(x.shape)) for x in found if len(x.shape) > 1 and not x.get_metadata().get("looked_up"))
