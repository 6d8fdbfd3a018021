"""Low-rank adapters (LoRA, arXiv 2106.09685): W + (alpha / rank) A B in the place of matrices that are frozen.

A and B lie beside their matrix, as attributes of the module that has it, and no module reads them: `merged` puts them
together before the model is called, so that whatever multiplies with a matrix multiplies with the sum. It costs memory
for a second copy of the adapted matrices and for its gradient, and next to no time: the product is one of a step, and
not of a token.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from lab.errors import UserError, shown
from lab.model import parameter
from lab.options import Option, leaves

OPTIONS = {
    "lora.rank": Option(0, "of what is trained and added to matrices that are not; 0: weights are trained", least=0),
    "lora.alpha": Option(16.0, "what is added is multiplied by alpha / rank", above=0),
    "lora.targets": Option((), "the matrices, by names on the paths to them, as ('q', 'v') or ('mixer',); empty: all",
                           kind=tuple[str, ...]),
}  # fmt: skip
A, B, SCALE = "_lora_a", "_lora_b", "lora_scale"  # behind the name of a matrix; of the whole model


def unread(model) -> set[str]:
    """The options that mean nothing in a model config."""
    return set() if model.lora.rank else {"lora.alpha", "lora.targets"}


def check(model) -> None:
    """Refuses options of adapters that are not there."""
    for name in sorted(unread(model)):
        value, default = leaves(model)[name], OPTIONS[name].default
        if value != default:
            raise UserError(
                f"model.{name} = {shown(value)} means nothing beside model.lora.rank = 0; choose {default!r}, or a rank"
            )


def adapted(model, rank: int, alpha: float, targets: tuple[str, ...], key: jax.Array):
    """A model of frozen weights, with adapters beside its matrices: at the start the same function.

    targets: names of which one lies on the path to each matrix that is meant; empty: all matrices. `key` draws A, that
    of one matrix whatever the others. Raises UserError for a name on no path to a matrix.
    """
    matrices = {path: v for path, v in parameter.by_parts(model).items() if is_matrix(v)}
    paths = parameter.chosen("a name in model.lora.targets", targets, matrices) if targets else list(matrices)
    made = parameter.freeze(model)
    for path in paths:
        own = jax.random.fold_in(key, zlib.crc32(".".join(path).encode()))
        owner, a, b = _owner(made, path), *parameter.low_rank(own, matrices[path], rank)
        setattr(owner, path[-1] + A, a)
        setattr(owner, path[-1] + B, b)
    setattr(made, SCALE, parameter.FixedTable(jnp.float32(alpha / rank)))
    return made


def is_matrix(variable) -> bool:
    """Whether a variable is declared as a parameter with inputs and outputs."""
    return isinstance(variable, nnx.Param) and bool(variable.get_metadata()["inputs"])


def adapters(model) -> list[tuple[str, ...]]:
    """The paths to the matrices that have adapters."""
    paths = [path for path in parameter.by_parts(model) if path[-1].endswith(A)]
    return [(*path[:-1], path[-1].removesuffix(A)) for path in paths]


def merged(model):
    """The model whose matrices are W + (alpha / rank) A B, without adapters; the model itself where it has none.

    Differentiable in A and B.
    """
    paths = adapters(model)
    if not paths:
        return model
    made = jax.tree.map(lambda x: x, model)  # modules of its own, of the same arrays
    scale = getattr(made, SCALE)[...]
    for path in paths:
        owner, name = _owner(made, path), path[-1]
        weight, a, b = (getattr(owner, name + behind) for behind in ("", A, B))
        setattr(owner, name, weight.replace(weight[...] + scale * product(a, b)))
        delattr(owner, name + A)
        delattr(owner, name + B)
    delattr(made, SCALE)
    return made


def product(a: nnx.Variable, b: nnx.Variable) -> jax.Array:
    """A B, of the shape of the weight: over the rank, for each of the stacked layers, float32."""
    a, b, stacked = a[...], b[...], b[...].ndim - len(b.get_metadata()["axes"])
    layers = tuple(range(stacked))
    numbers = (((a.ndim - 1,), (stacked,)), (layers, layers))
    return jax.lax.dot_general(a, b, numbers, precision=jax.lax.Precision.HIGHEST)


def _owner(model, path: tuple[str, ...]):
    """The module that has the parameter at the end of a path."""
    step = lambda module, part: module[int(part)] if part.isdecimal() else getattr(module, part)  # noqa: E731
    return functools.reduce(step, path[:-1], model)
