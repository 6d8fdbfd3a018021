"""ResFormer (arXiv 2410.17897): the values of every layer are mixed with those of layer 0."""

from typing import NamedTuple

import jax
from flax import nnx

from lab.model import parameter
from lab.model.streams.stream import Stream


class FirstValues(NamedTuple):
    """The stream before a layer, and the values of layer 0 for all keys."""

    x: jax.Array
    first: jax.Array | None


class ValueResidual(Stream):
    """V'_m = l_m0 V_0 + l_m1 V_m for m >= 1, learned, both 0.5 at the start (equation 5)."""

    grows = True  # from nothing to the values of layer 0
    needs = 2
    mixers = ("attention", "differential")

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.weights = nnx.List([parameter.mixing((2,), 0.5) for _ in range(model.layers - 1)])

    def start(self, x_BTD, cache):
        return FirstValues(x_BTD, None)

    def layer(self, state: FirstValues, block, view, cache, *, m):
        x_BTD, first_BSGV = state
        mixer, normed_BTD = block.mixer, block.mixer_placement.before(x_BTD)
        q_BTHK, (k_BSGK, v_BSGV), cache = mixer.project(normed_BTD, view, cache)
        if m == 0:
            first_BSGV = v_BSGV
        else:
            from_first, own = self.weights[m - 1][...]
            v_BSGV = (from_first * first_BSGV + own * v_BSGV).astype(v_BSGV.dtype)
        o_BTHV, lse_BTH = mixer.attend(q_BTHK, (k_BSGK, v_BSGV), view, decoding=cache is not None)
        a_BTD = mixer.output(o_BTHV, lse_BTH, normed_BTD, view.rotation)
        h_BTD = x_BTD + block.mixed(a_BTD)
        return FirstValues(h_BTD + block.feed(h_BTD), first_BSGV), cache

    def finish(self, state: FirstValues):
        return state.x, ()
