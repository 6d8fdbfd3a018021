"""Learned weights of layers in layers, as a run leaves them beside its result."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import nnx

from lab.study.results import EMBEDDING, MIXING, as_csv

Weights = Mapping[str, np.ndarray]  # {name: [L, L], or [L, 1 + L] where the embedding comes first; nan: no weight}


def of_members(stream: nnx.Module, members: int) -> list[Weights]:
    """The weights of a trained stream, or of each member of a stack of them."""
    host = jax.device_get(stream)  # every host has them whole, and may ask for them alone
    each = [jax.tree.map(lambda w, i=i: w[i], host) for i in range(members)] if members > 1 else [host]
    return [one.mixing() for one in each]


def table(weights: Weights) -> bytes:
    """mixing.csv: a row for each weight that there is."""
    return as_csv(MIXING, [dict(zip(MIXING, row, strict=True)) for row in _listed(weights)])


def scalars(weights: Weights) -> dict[str, float]:
    """The same as curves of TensorBoard, a panel for each name and layer."""
    return {f"mixing {name}/layer {layer} of {source}": weight for name, layer, source, weight in _listed(weights)}


def _listed(weights: Weights) -> Iterator[tuple[str, int, int | str, float]]:
    """(name, layer, of which layer's output, weight) for each weight that there is."""
    for name, array in weights.items():
        before = array.shape[1] - array.shape[0]
        for (layer, column), weight in np.ndenumerate(array):
            if not np.isnan(weight):
                yield name, layer, column - before if column >= before else EMBEDDING, float(weight)
