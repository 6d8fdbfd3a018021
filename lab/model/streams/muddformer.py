"""MUDDFormer (arXiv 2502.12170): averages over depth that tokens weigh, apart for queries, keys, values, residual."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lab.model import parameter
from lab.model.norm import rms_normed
from lab.model.streams.denseformer import AveragedDepth
from lab.model.streams.stream import Stream
from lab.model.streams.weights import triangle

WAYS = ("query", "key", "value", "residual")


class Inputs(NamedTuple):
    """What a layer reads in each way."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    residual: jax.Array


class DynamicWeights(nnx.Module):
    """A = GELU(n(y) W1) W2 + a, a number for each way and each of the outputs so far (equations 3 to 5).

    n has no scale; W1 from N(0, 1/D), W2 zero at the start, a picks the last output.
    """

    def __init__(self, model, ways: int, outputs: int, key: jax.Array):
        size, self.eps = ways * outputs, model.norm.eps
        self.w1 = parameter.mixing_matrix(key, (model.dim, size), spread=model.dim**-0.5)
        self.w2 = parameter.mixing((size, size))
        self.a = parameter.mixing_start(jnp.tile(jnp.eye(outputs)[-1], (ways, 1)))

    def __call__(self, y_BTD):
        """[B, T, ways, outputs], float32 or wider."""
        inferred = jax.nn.gelu(rms_normed(y_BTD, self.eps) @ self.w1[...], approximate=False) @ self.w2[...]
        return inferred.reshape(*inferred.shape[:-1], *self.a.shape) + self.a[...]


class MUDDFormer(Stream):
    """y_(m+1) = layer_m(X^Q, X^K, X^V, X^R) with X^R as the residual; X^w = sum_(j<=m+1) A^w_mj y_j for the next layer.

    Layer 0 reads the embedding in all ways, and the head one average. The three inputs of attention share its norms.
    """

    grows = True
    needs = 2
    mixers = ("attention", "differential")
    reads = ("norm.eps",)

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        keys = jax.random.split(key, model.layers)
        ways = [len(WAYS)] * (model.layers - 1) + [1]
        self.weights = nnx.List([DynamicWeights(model, ways[m], m + 2, keys[m]) for m in range(model.layers)])

    def start(self, x_BTD, cache):
        return AveragedDepth(Inputs(*[x_BTD] * len(WAYS)), (x_BTD,))

    def layer(self, state: AveragedDepth, block, view, cache, *, m):
        a_BTD, cache = attention(state.x, block, view, cache)
        h_BTD = state.x.residual + a_BTD
        y_BTD = h_BTD + block.feed(h_BTD)
        y = *state.y, y_BTD
        averaged = jnp.einsum("btwj,jbtd->wbtd", self.weights[m](y_BTD), jnp.stack(y)).astype(y_BTD.dtype)
        return AveragedDepth(Inputs(*averaged) if len(averaged) > 1 else averaged[0], y), cache

    def finish(self, state: AveragedDepth):
        return state.x, ()

    def work_per_token(self, blocks: list, visible: list[float]) -> float:
        return sum(each.w1.size + each.w2.size for each in self.weights)

    def mixing(self):
        """The weights that no token changes, of each way; the embedding is column 0, the last row the head's."""
        rows = [[each.a[min(w, each.a.shape[0] - 1)] for each in self.weights] for w in range(len(WAYS))]
        return {f"a ({way})": triangle(row) for way, row in zip(WAYS, rows, strict=True)}


def attention(x: Inputs, block, view, cache):
    """Attention of separate inputs, each normed, and the new cache. Gates and the like read the input of queries."""
    mixer, normed = block.mixer, Inputs(*(block.mixer_placement.before(x_BTD) for x_BTD in x))
    q_BTHK = mixer.queries(normed.query)
    new = mixer.keys(normed.key, view.rotation), mixer.values(normed.value, view.rotation)
    kept, cache = mixer.store(new, view, cache)
    o_BTHV, lse_BTH = mixer.attend(q_BTHK, kept, view, decoding=cache is not None)
    return block.mixed(mixer.output(o_BTHV, lse_BTH, normed.query, view.rotation)), cache
