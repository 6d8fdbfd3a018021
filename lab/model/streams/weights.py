"""Learned weights of layers 0..m in layer m: a row for each layer, each longer than the one before."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lab.model import parameter


def rows(layers: int, value: float, first: int = 0) -> nnx.List:
    """m + 1 numbers for each layer m from `first` on."""
    return nnx.List([parameter.mixing((m + 1,), value) for m in range(first, layers)])


class SoftmaxWeights(nnx.Module):
    """softmax(w_m), w_m of length m + 1 and ones at the start, for m >= 1: L(L+1)/2 - 1 parameters."""

    def __init__(self, layers: int):
        self.w = rows(layers, 1.0, first=1)

    def __call__(self, m: int):
        """[m + 1]; layer 0 has itself alone."""
        return jax.nn.softmax(self.w[m - 1][...]) if m else jnp.ones(1)

    def mixing(self) -> dict[str, np.ndarray]:
        return {"softmax(w)": triangle([self(m) for m in range(len(self.w) + 1)])}


def weighted_sum(weights, outputs: list):
    """sum_i weights_i outputs_i, summed in the precision of the weights."""
    total = sum(weights[i] * y for i, y in enumerate(outputs))
    return total.astype(outputs[-1].dtype)


def triangle(rows: list) -> np.ndarray:
    """Rows, each longer than the one before, as one array; nan where they have ended."""
    array = np.full((len(rows), len(rows[-1])), np.nan)
    for m, row in enumerate(rows):
        array[m, : len(row)] = row
    return array
