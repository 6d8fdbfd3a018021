"""Version 3: earlier layers replayed on the current input, with the attention probabilities that they had.

a~_(m,i) = P_i (n1_i(x_m) W_V^i) W_O^i and f~_(m,i) = MLP_i(n2_i(x_m + a~_(m,i))) for i < m. P_i is not kept: the
queries and keys of layer i are, and attend again. Dropout drops what it dropped in layer i.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lab.model import mesh, parameter
from lab.model.attending import View, attend_over_mesh
from lab.model.streams.stream import Stream
from lab.model.streams.weights import SoftmaxWeights, weighted_sum


class ReplayMethod(NamedTuple):
    site: str  # whose outputs are combined: attention | feedforward
    combine: Callable  # of those outputs, the current layer's last, and of softmax weights if it learns them
    learns: bool = False


def mean(outputs: list, weights):
    return sum(outputs) / len(outputs)


def total(outputs: list, weights):
    return sum(outputs)


def weighted(outputs: list, weights: SoftmaxWeights):
    return weighted_sum(weights(len(outputs) - 1), outputs)


METHODS = {
    "v3m1": ReplayMethod("feedforward", total),
    "v3m2": ReplayMethod("attention", total),
    "v3m3.1": ReplayMethod("feedforward", mean),
    "v3m3.2": ReplayMethod("feedforward", weighted, learns=True),
    "v3m4.1": ReplayMethod("attention", mean),
    "v3m4.2": ReplayMethod("attention", weighted, learns=True),
}


class PastLayer(NamedTuple):
    """What of an earlier layer its replays need: its weights, what it saw, its queries and keys."""

    block: object
    view: View
    q_BTHK: jax.Array
    k_BSGK: jax.Array


class ReplayState(NamedTuple):
    """The stream before a layer, the layers before it, and, decoding, the values of every replay."""

    x: jax.Array
    past: tuple[PastLayer, ...]
    cache: tuple | None


class Replay(Stream):
    """METHODS. Mixers whose values are no part of their keys or of a shared latent."""

    grows = True
    needs = 2
    mixers = ("attention", "differential")
    adds = False  # several layers attend in one call

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.layers, self.values = model.layers, (model.mixer.kv_heads, model.mixer.v_head_dim or model.mixer.head_dim)
        self.weights = SoftmaxWeights(model.layers) if METHODS[self.name].learns else None

    def init_cache(self, batch: int, length: int, dtype) -> tuple:
        """The values of layer i on the input of layer m, for each m and i < m."""
        return tuple((jnp.zeros((batch, length, *self.values), dtype),) * m for m in range(self.layers))

    def start(self, x_BTD, cache):
        return ReplayState(x_BTD, (), cache)

    def layer(self, state: ReplayState, block, view: View, cache, *, m):
        x_BTD, past, kept = state
        method = METHODS[self.name]
        again, kept = replayed_attention(x_BTD, past, kept, view)
        a_BTD, now, cache = attention(x_BTD, block, view, cache)
        if method.site == "attention":
            h_BTD = x_BTD + method.combine([*again, a_BTD], self.weights)
            x_BTD = h_BTD + block.feed(h_BTD)
        else:
            h_BTD = x_BTD + a_BTD
            f = [layer.block.feed(x_BTD + a) for layer, a in zip(past, again, strict=True)]
            x_BTD = h_BTD + method.combine([*f, block.feed(h_BTD)], self.weights)
        return ReplayState(x_BTD, (*past, now), kept), cache

    def finish(self, state: ReplayState):
        return state.x, state.cache or ()

    def cached(self, mixers: list):
        return (self.values,) * (len(mixers) * (len(mixers) - 1) // 2)

    def work_per_token(self, blocks: list, visible: list[float]) -> float:
        """PastLayer i is replayed in the L - 1 - i layers after it: all of it but its queries and keys."""
        work = 0.0
        for i, (block, keys) in enumerate(zip(blocks, visible, strict=True)):
            mixer = block.mixer
            again = (
                parameter.in_matrices(mixer)
                - parameter.in_matrices((mixer.q, mixer.q_down, mixer.k))
                + keys * mixer.work_per_key
            )
            if METHODS[self.name].site == "feedforward":
                again += parameter.in_matrices(block.feedforward)
            work += again * (len(blocks) - 1 - i)
        return work

    def mixing(self):
        return self.weights.mixing() if self.weights else {}


def attention(x_BTD, block, view: View, cache) -> tuple[jax.Array, PastLayer, tuple | None]:
    """a_m, what replays of this layer will need, and its new cache."""
    mixer, normed_BTD = block.mixer, block.mixer_placement.before(x_BTD)
    q_BTHK, kept, cache = mixer.project(normed_BTD, view, cache)
    q_BTHK, turned = mixer.turned("q", q_BTHK, view.rotation), view.of_rotated()  # since replays attend with it again
    o_BTHV, lse_BTH = mixer.attend(q_BTHK, kept, turned, decoding=cache is not None)
    a_BTD = block.mixed(mixer.output(o_BTHV, lse_BTH, normed_BTD, view.rotation))
    return a_BTD, PastLayer(block, turned, q_BTHK, mixer.read(kept)[0]), cache


def over_tensor(x_BSGK):
    """Groups of one layer; where devices are more, repeated, so that each holds those of its heads."""
    tensor, G = mesh.current().get("tensor", 1), x_BSGK.shape[2]
    return jnp.repeat(x_BSGK, tensor // G, axis=2) if G % tensor and tensor % G == 0 else x_BSGK


def replayed_attention(
    x_BTD, past: tuple[PastLayer, ...], cache: tuple | None, view: View
) -> tuple[list, tuple | None]:
    """a~_(m,i) for every earlier layer i, and the new cache. Layers of one rule and cap are heads of one call."""
    normed = [layer.block.mixer_placement.before(x_BTD) for layer in past]
    values = [layer.block.mixer.values(n, layer.view.rotation) for layer, n in zip(past, normed, strict=True)]
    if cache is not None:
        m = len(past)
        values = [view.put(old, new) for old, new in zip(cache[m], values, strict=True)]
        cache = *cache[:m], tuple(values), *cache[m + 1 :]
    outputs, alike = {}, [(layer.block.mixer.rule, layer.block.mixer.softcap) for layer in past]
    for kind in dict.fromkeys(alike):
        places = [i for i, other in enumerate(alike) if other == kind]
        one = past[places[0]]
        q_BTXK = jnp.concatenate([past[i].q_BTHK for i in places], axis=2)
        k_BSXK = jnp.concatenate([over_tensor(past[i].k_BSGK) for i in places], axis=2)
        v_BSXV = jnp.concatenate([over_tensor(values[i]) for i in places], axis=2)
        view = one.view.of_layers([past[i].view for i in places])
        attended = attend_over_mesh(q_BTXK, k_BSXK, v_BSXV, view, one.block.mixer)
        for i, *found in zip(places, *(jnp.split(x, len(places), axis=2) for x in attended), strict=True):
            a_BTD = past[i].block.mixer.output(*found, normed[i], past[i].view.rotation)
            outputs[i] = past[i].block.mixed(a_BTD)
    return [outputs[i] for i in range(len(past))], cache
