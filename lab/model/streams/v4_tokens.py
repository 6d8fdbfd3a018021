"""Version 4, methods 1A to 1E, C and D: scores weighed token by token, by position or as inferred from the input.

1A to 1E weigh the scores of each layer that method 1 sums; C, D and the temperature weigh those of the layer itself,
with nothing summed. A position is the index of a token in its segment.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels import reference
from lab.kernels.rules import forked
from lab.model import norm, parameter, slots
from lab.model.attending import View
from lab.model.streams.stream import Stream
from lab.model.streams.v4 import SummedScores, scaled
from lab.options import Option

LENGTH = {"length": Option(0, "tokens of a row at most: a weight for each position", least=1)}
INPUT = {"input": Option("raw", "what of a layer's input the weights are inferred from", choices=("raw", "normed"))}


class Positional(SummedScores):
    """What 1A, 1B and 1C share: log weights for positions, zero at the start, and so a longest row."""

    options = LENGTH
    axes = 1  # a weight for a token; 2: for a query and a key

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.length = model.stream.length
        self.w = nnx.List([parameter.mixing((m + 1, *(self.length,) * self.axes)) for m in range(model.layers)])

    def place(self, x_BTD, coordinates: Coordinates):
        return within(self.length, x_BTD, coordinates, self.name)

    def c(self, m):
        return [self.scale] * (m + 1)


class EveryPair(Positional):
    """1A: c = e^(W_mi[t,u]) / sqrt d. Dense by nature: memory grows as T^2, in W as in the scores."""

    axes = 2

    def attend(self, m, past, v_BSGV, on_queries, on_keys, view: View, mixer):
        t_BT1, u_B1S = view.queries.index[..., None], view.keys.index[:, None]
        scores_BGRTS, dropout = 0.0, None if view.masks is None else view.masks.of_attention(mixer.heads)
        for (q_BTHK, k_BSGK), c, W in zip(past, on_queries, self.w[m][...], strict=True):
            weight_BTS = jnp.exp(W[t_BT1, u_B1S])
            scores_BGRTS += reference.scores(q_BTHK, k_BSGK, c) * weight_BTS[:, None, None]
        rule = mixer.rule if view.limits is None else forked(mixer.rule)
        o_BTHV, lse_BTH = reference.attend_scores(
            scores_BGRTS, v_BSGV, view.queries, view.keys, rule, mixer.softcap, dropout=dropout, limits=view.limits
        )
        return o_BTHV.astype(v_BSGV.dtype), lse_BTH


class KeyPositions(Positional):
    """1B: c = e^(w_mi[u]) / sqrt d for the key at u."""

    def on_keys(self, m, x_BTD, normed_BTD, view: View, cache):
        return list(jnp.exp(self.w[m][:, view.keys.index])), cache


class QueryPositions(Positional):
    """1C: c = e^(w_mi[t]) / sqrt d for the query at t."""

    def on_queries(self, m, x_BTD, normed_BTD, view: View):
        return list(jnp.exp(self.w[m][:, view.queries.index]) * self.scale)


class InferredWeights(nnx.Module):
    """A = GELU(RMSNorm(X) W1) W2 + bias, M numbers for each token; W1 D x M and W2 M x M from N(0, 0.02^2)."""

    def __init__(self, model, M: int, key: jax.Array):
        one, two = jax.random.split(key)
        self.norm = norm.make(model, model.dim)
        self.w1 = parameter.mixing_matrix(one, (model.dim, M))
        self.w2 = parameter.mixing_matrix(two, (M, M))
        self.bias = parameter.mixing((M,))

    def __call__(self, X_BTD):
        """[B, T, M], float32 or wider."""
        wide = X_BTD.astype(jnp.promote_types(X_BTD.dtype, jnp.float32))
        return jax.nn.gelu(self.norm(wide) @ self.w1[...], approximate=False) @ self.w2[...] + self.bias[...]


class Inferred(SummedScores):
    """What 1D and 1E share: weights inferred from the input of the layer, as it is or normed."""

    options = INPUT

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.normed = model.stream.input == "normed"
        keys = jax.random.split(key, model.layers)
        self.infer = nnx.List([InferredWeights(model, m + 1, keys[m]) for m in range(model.layers)])

    def c(self, m):
        return [self.scale] * (m + 1)

    def weights(self, m: int, x_BTD, normed_BTD):
        """A_m [B, T, M]."""
        return self.infer[m](normed_BTD if self.normed else x_BTD)

    def work_per_token(self, blocks: list, visible: list[float]) -> float:
        return super().work_per_token(blocks, visible) + sum(each.w1.size + each.w2.size for each in self.infer)


class InferredQueries(Inferred):
    """1D: c = e^(A_m[b,t,i]) / sqrt d for the query at t."""

    def on_queries(self, m, x_BTD, normed_BTD, view: View):
        A_BTM = self.weights(m, x_BTD, normed_BTD)
        return [jnp.exp(A_BTM[..., i]) * self.scale for i in range(m + 1)]


class InferredKeys(Inferred):
    """1E: c = e^(A_m[b,u,i]) / sqrt d for the key at u."""

    def init_cache(self, batch: int, length: int, dtype) -> tuple:
        """A_m of every token."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return tuple(jnp.zeros((batch, length, m + 1), wide) for m in range(self.layers))

    def cached(self, mixers: list):
        return tuple((1, m + 1) for m in range(len(mixers)))

    def on_keys(self, m, x_BTD, normed_BTD, view: View, cache):
        A_BSM = self.weights(m, x_BTD, normed_BTD)
        if cache is not None:
            A_BSM = view.put(cache[m], A_BSM)
            cache = *cache[:m], A_BSM, *cache[m + 1 :]
        return [jnp.exp(A_BSM[..., i]) for i in range(m + 1)], cache


class WeighedQueries(Stream):
    """What C, D and the temperature share: ordinary attention, with e^w on the queries; w is of the layer."""

    mixers = (*SummedScores.mixers, "forgetting")

    def layer(self, x_BTD, block, view: View, cache, *, m):
        mixer, normed_BTD = block.mixer, block.mixer_placement.before(x_BTD)
        q_BTHK, kept, cache = mixer.project(normed_BTD, view, cache)
        q_BTHK = mixer.turned("q", q_BTHK, view.rotation)
        w_BT = self.log_weights(block.stream, x_BTD, normed_BTD, view)
        q_BTHK = scaled(q_BTHK, jnp.exp(w_BT))
        o_BTHV, lse_BTH = mixer.attend(q_BTHK, kept, view.of_rotated(), decoding=cache is not None)
        h_BTD = x_BTD + block.mixed(mixer.output(o_BTHV, lse_BTH, normed_BTD, view.rotation))
        return h_BTD + block.feed(h_BTD), cache

    def log_weights(self, of_layer, x_BTD, normed_BTD, view: View):
        """[B, T], or one number."""
        raise NotImplementedError


class LogWeights(nnx.Module):
    """Numbers of a layer that start at zero."""

    def __init__(self, size: int):
        self.w = parameter.mixing((size,))


class Temperature(WeighedQueries):
    """e^w for all tokens of a layer: a control for methods 4 to 7, which learn a temperature among other things."""

    @staticmethod
    def of_layer(model, key, m):
        return LogWeights(1)

    def log_weights(self, of_layer, x_BTD, normed_BTD, view: View):
        return of_layer.w[0]


class OwnPositions(WeighedQueries):
    """C: e^(w_m[t]) / sqrt d for the query at t."""

    options = LENGTH

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.length = model.stream.length

    @staticmethod
    def of_layer(model, key, m):
        return LogWeights(model.stream.length)

    def place(self, x_BTD, coordinates: Coordinates):
        return within(self.length, x_BTD, coordinates, self.name)

    def log_weights(self, of_layer, x_BTD, normed_BTD, view: View):
        return of_layer.w[view.queries.index]


class OwnInferred(WeighedQueries):
    """D: e^(A_m[b,t]) / sqrt d for the query at t."""

    options = INPUT

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.normed = model.stream.input == "normed"

    @staticmethod
    def of_layer(model, key, m):
        return InferredWeights(model, 1, key)

    def log_weights(self, of_layer, x_BTD, normed_BTD, view: View):
        return of_layer(normed_BTD if self.normed else x_BTD)[..., 0]


METHODS = {
    "v4m1A": EveryPair,
    "v4m1B": KeyPositions,
    "v4m1C": QueryPositions,
    "v4m1D": InferredQueries,
    "v4m1E": InferredKeys,
    "v4mC": OwnPositions,
    "v4mD": OwnInferred,
    "temperature": Temperature,
}


def within(length: int, x_BTD, coordinates: Coordinates, name: str):
    """The embedding of tokens at positions with a weight. Raises UserError for others where they are known; where they
    are traced, such a token is nan, and with it what it is multiplied with: it would be given the last weight."""
    segment_BT, index_BT = slots.known(coordinates.segment), slots.known(coordinates.index)
    if segment_BT is None or index_BT is None:
        lost_BT = (coordinates.segment >= 0) & (coordinates.index >= length)
        return jnp.where(lost_BT[..., None], jnp.nan, x_BTD)
    last = index_BT[segment_BT >= 0].max(initial=0)
    if last >= length:
        raise UserError(
            f"a token is at position {last} of its segment, beyond model.stream.length = {length}: model.stream.name = "
            f"{name!r} has weights for so many; choose shorter texts"
        )
    return x_BTD
