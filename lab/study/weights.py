"""Learned weights of layers in layers, as a run leaves them beside its result."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from lab.study.results import MIXING, as_csv

EMBEDDING = "embedding"
Weights = Mapping[str, np.ndarray]  # {name: [L, L], or [L, 1 + L] where the embedding comes first; nan: no weight}


def of_members(stream: nnx.Module, members: int) -> list[Weights]:
    """The weights of a trained stream, or of each member of a stack of them."""
    host = jax.device_get(stream)  # every host has them whole, and may ask for them alone
    each = [jax.tree.map(lambda w, i=i: w[i], host) for i in range(members)] if members > 1 else [host]
    return [one.mixing() for one in each]


def table(weights: Weights) -> bytes:
    """mixing.csv: a row for each weight that there is."""
    rows = []
    for name, array in weights.items():
        before = array.shape[1] - array.shape[0]
        for (layer, column), weight in np.ndenumerate(array):
            source = column - before if column >= before else EMBEDDING
            if not np.isnan(weight):
                rows.append({"name": name, "layer": layer, "of_layer": source, "weight": float(weight)})
    return as_csv(MIXING, rows)
