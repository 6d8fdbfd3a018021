"""Parameters of ours and tensors of theirs, side by side.

Theirs is one tensor for each layer, a weight [out, in]; ours is stacked over the repeats of an entry of the layer
pattern, [repeats, in..., out...], and says how many of its axes are inputs. A piece is some rows of a tensor.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from lab.errors import UserError
from lab.exchange.families import Family
from lab.model import parameter

PIECE = 2**23  # bytes of float32: what is held of a tensor at a time


class Parameter(NamedTuple):
    """One of ours. name: in a checkpoint. own: its shape in a layer. inputs: how many of these axes are. tensors: of
    theirs, one for each repeat; stacked: whether it has an axis of them."""

    name: str
    own: tuple[int, ...]
    inputs: int
    tensors: tuple[str, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.tensors), *self.own) if self.stacked else self.own

    @property
    def axis(self) -> int:
        """Of `own`, the one that rows of theirs go along."""
        return self.inputs

    @property
    def unit(self) -> int:
        """Rows of theirs for each step along that axis."""
        return math.prod(self.own[self.inputs + 1 :]) if self.inputs else 1

    @property
    def theirs(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        n = self.inputs
        return (math.prod(self.own[n:]), math.prod(self.own[:n])) if n else self.own

    @property
    def chunk(self) -> tuple[int, ...]:
        """Of `shape`: a piece of at most PIECE bytes, if a row is not more."""
        steps = max(1, PIECE // (4 * max(1, math.prod(self.own) // self.own[self.axis])))
        own = tuple(min(steps, n) if i == self.axis else n for i, n in enumerate(self.own))
        return (1, *own) if self.stacked else own

    def rows(self, steps: slice) -> slice:
        """Of theirs, for steps along the axis."""
        return slice(steps.start * self.unit, steps.stop * self.unit)

    def from_rows(self, block: np.ndarray) -> np.ndarray:
        """Rows of theirs as a part of `own`."""
        if not self.inputs:
            return block
        n = self.inputs
        return block.T.reshape(*self.own[:n], -1, *self.own[n + 1 :])

    def to_rows(self, part: np.ndarray) -> np.ndarray:
        """The other way."""
        return part.reshape(math.prod(self.own[: self.inputs]), -1).T if self.inputs else part


def parameters(model, family: Family) -> list[Parameter]:
    """Those of a model, abstract or not, in the order of its checkpoint. Raises UserError for one that no tensor of the
    family is."""
    trainable = parameter.split(model)[1]
    entries = len(model.blocks)
    found = []
    for path, variable in jax.tree_util.tree_leaves_with_path(trainable, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        stacked = name.startswith("blocks.")
        entry, _, own = name.removeprefix("blocks.").partition(".") if stacked else ("", "", name)
        theirs = (family.layer if stacked else family.whole).get(own)
        if theirs is None:
            raise UserError(f"the model has {name}, which no tensor of model_type = {family.model_type!r} is")
        layers = range(int(entry), model.layers, entries) if stacked else ()
        tensors = tuple(f"model.layers.{m}.{theirs}" for m in layers) or (theirs,)
        shape = variable.get_raw_value().shape[stacked:]
        inputs = variable.get_metadata()["inputs"]
        found.append(Parameter(f"{name}.value", tuple(shape), inputs, tensors, stacked))
    return found


def by_tensor(found: list[Parameter]) -> Iterator[tuple[str, Parameter]]:
    """(name of a tensor, the parameter that it is in), those of a layer beside each other."""
    pairs = [(tensor, one) for one in found for tensor in one.tensors]

    def place(pair):
        name = pair[0]
        layer = name.split(".")[2] if name.startswith("model.layers.") else None
        return (1, int(layer), name) if layer else (0 if "embed" in name else 2, 0, name)

    return iter(sorted(pairs, key=place))
