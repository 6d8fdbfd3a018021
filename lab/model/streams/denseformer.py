"""DenseFormer (arXiv 2402.02622): after each layer, a learned average over depth."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lab.model import parameter
from lab.model.streams.stream import Stream
from lab.model.streams.weights import triangle, weighted_sum


class AveragedDepth(NamedTuple):
    """What the next layer reads, and the embedding and every layer's output before it."""

    x: jax.Array
    y: tuple[jax.Array, ...]


class DenseFormer(Stream):
    """x_(m+1) = sum_(j<=m+1) alpha_mj y_j: y_0 the embedding, y_(j+1) = layer_j(x_j). At the start alpha picks y_(m+1).

    Without dilation and with an average after every layer (equation 1).
    """

    grows = True

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.alpha = nnx.List([parameter.mixing_start(jnp.eye(m + 2)[-1]) for m in range(model.layers)])

    def start(self, x_BTD, cache):
        return AveragedDepth(x_BTD, (x_BTD,))

    def layer(self, state: AveragedDepth, block, view, cache, *, m):
        y_BTD, cache = block(state.x, view, cache)
        y = *state.y, y_BTD
        return AveragedDepth(weighted_sum(self.alpha[m][...], y), y), cache

    def finish(self, state: AveragedDepth):
        return state.x, ()

    def mixing(self):
        """The embedding is column 0."""
        return {"alpha": triangle([alpha[...] for alpha in self.alpha])}
