"""Muon's part for the matrices, from optax: orthogonalised momentum, scaled by the shape of each matrix."""

import functools
import math

import jax
import optax
from optax import contrib

from lab.errors import UserError, choose
from lab.model import parameter
from lab.options import Option

JORDAN = (3.4445, -4.7750, 2.0315)
FINE = (2.0, -1.5, 0.5)  # leaves singular values of one where they are

# Newton-Schulz: aX + b(XX')X + c(XX')^2 X for each (a, b, c), from X of Frobenius norm one.
STEPS = {
    "5": dict(ns_coeffs=JORDAN, ns_steps=5),
    "8+2": dict(ns_coeffs=(JORDAN,) * 8 + (FINE,) * 2, ns_steps=10),
}

# What the orthogonal factor of a matrix from d_in to d_out is multiplied by.
SCALINGS = {
    "moonlight": lambda d_in, d_out: 0.2 * math.sqrt(max(d_in, d_out)),  # arXiv 2502.16982: entries as large as AdamW's
    "keller-jordan": lambda d_in, d_out: math.sqrt(max(1, d_out / d_in)),
    "mup": lambda d_in, d_out: math.sqrt(d_out / d_in),
}


OPTIONS = {
    "momentum": Option(0.95, "of the gradients of matrices", least=0, below=1),
    "scaling": Option("moonlight", "of updates by the shape of a matrix", choices=tuple(SCALINGS)),
    "steps": Option("5", "of Newton-Schulz", choices=tuple(STEPS)),
    "per_head": Option("none", "weights whose heads are matrices of their own; all: W_O too",
                       choices=tuple(parameter.PER_HEAD)),
    "on": Option((), "names of the matrices that it takes, as q, o, gate; empty: all", kind=tuple[str, ...]),
    "adam_rate": Option(1.0, "AdamW's learning rate on the rest, in units of learning_rate", least=0),
    "adam_decay": Option(0.01, "AdamW's weight decay on the rest", least=0),
}  # fmt: skip


def orthogonalised(momentum, scaling: str, steps: str, per_head: str, on: tuple[str, ...]):
    """The update of every matrix before decay and rate: Nesterov momentum without bias, orthogonalised and scaled."""
    dimensions = functools.partial(parameter.muon_dimensions, per_head=per_head, on=on)
    return optax.chain(
        contrib.scale_by_muon(**STEPS[steps], beta=momentum, weight_dimension_numbers=dimensions),
        scale_by_shape(SCALINGS[scaling], dimensions),
    )


def scale_by_shape(factor, dimensions):
    """Every update times `factor` of its matrices' sides. optax has two of the three factors, and exports neither."""

    def scaled(update, sides: contrib.MuonDimensionNumbers):
        d_in, d_out = (math.prod(update.shape[axis] for axis in side) for side in sides)
        return factor(d_in, d_out) * update

    return optax.stateless(lambda updates, _: jax.tree.map(scaled, updates, dimensions(updates)))


def groups(trainable, on: tuple[str, ...]):
    """For every parameter whether "muon" or "adamw" takes it."""
    is_dimensions = lambda x: x is None or isinstance(x, contrib.MuonDimensionNumbers)  # noqa: E731
    group = lambda x: "adamw" if x is None else "muon"  # noqa: E731
    return jax.tree.map(group, parameter.muon_dimensions(trainable, on=on), is_leaf=is_dimensions)


def check_names(on: tuple[str, ...], trainable) -> None:
    """Refuses names that no parameter of the model has, and those of parameters that are no matrix."""
    matrices = parameter.names(trainable, matrices=True)
    for name in on:
        if name not in matrices and name in parameter.names(trainable):
            raise UserError(f"train.muon.on = {name!r} has no matrix; choose one of: {', '.join(matrices)}")
        choose("train.muon.on", name, matrices)
