"""LIMe (arXiv 2502.09245): each key-value head reads a mixture of the inputs of all layers so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lab.model import parameter
from lab.model.streams.stream import Stream
from lab.model.streams.weights import triangle


class LayerInputs(NamedTuple):
    """The inputs of the layers so far, the one to come last."""

    inputs: tuple[jax.Array, ...]


class LayerIntegratedMemory(Stream):
    """Keys and values of group g in layer m >= 1 are made of sum_(i<=m) softmax(r_mg)_i n1_m(x_i): the static router.

    Uniform at the start. Queries read the layer's own input, and the residual is plain.
    """

    grows = True
    needs = 2
    mixers = ("attention", "differential")

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.router = nnx.List([parameter.mixing((model.mixer.kv_heads, m + 1)) for m in range(1, model.layers)])

    def start(self, x_BTD, cache):
        return LayerInputs((x_BTD,))

    def layer(self, state: LayerInputs, block, view, cache, *, m):
        mixer, x_BTD = block.mixer, state.inputs[-1]
        normed = [block.mixer_placement.before(y) for y in state.inputs]
        memory = normed[0] if m == 0 else mixture(self.weights(m), normed)
        kept, cache = mixer.store(mixer.keep(memory, view.rotation), view, cache)
        q_BTHK = mixer.queries(normed[-1])
        o_BTHV, lse_BTH = mixer.attend(q_BTHK, kept, view, decoding=cache is not None)
        a_BTD = mixer.output(o_BTHV, lse_BTH, normed[-1], view.rotation)
        h_BTD = x_BTD + block.mixed(a_BTD)
        return LayerInputs((*state.inputs, h_BTD + block.feed(h_BTD))), cache

    def finish(self, state: LayerInputs):
        return state.inputs[-1], ()

    def weights(self, m: int):
        """[G, m + 1]; layer 0 has itself alone."""
        return jax.nn.softmax(self.router[m - 1][...], axis=-1) if m else jnp.ones((self.router[0].shape[0], 1))

    def mixing(self) -> dict[str, np.ndarray]:
        rows = [self.weights(m) for m in range(len(self.router) + 1)]
        return {f"head {g}": triangle([row[g] for row in rows]) for g in range(len(rows[0]))}


def mixture(weights_GL, inputs: list):
    """sum_i weights_gi inputs_i [B, T, G, D]."""
    return jnp.einsum("gl,lbtd->btgd", weights_GL, jnp.stack(inputs)).astype(inputs[0].dtype)
