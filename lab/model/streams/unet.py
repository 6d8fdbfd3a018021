"""U-net skips, as in the NanoGPT speedruns: the second half of the layers reads the outputs of the first, mirrored."""

from typing import NamedTuple

import jax

from lab.model import parameter
from lab.model.streams.stream import Stream


class Skips(NamedTuple):
    """The stream before a layer, and what layers of the first half gave."""

    x: jax.Array
    skips: tuple[jax.Array, ...]


class UNet(Stream):
    """Layer L - 1 - m reads x + s_m y_m for y_m the output of layer m, m < L // 2; s = 1 at the start."""

    grows = True
    needs = 2

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.layers, self.s = model.layers, parameter.mixing((model.layers // 2,), 1.0)

    def start(self, x_BTD, cache):
        return Skips(x_BTD, ())

    def layer(self, state: Skips, block, view, cache, *, m):
        x_BTD, skips = state
        first, mirrored = m < self.layers // 2, self.layers - 1 - m
        if not first and mirrored < len(skips):
            x_BTD = (x_BTD + self.s[mirrored] * skips[mirrored]).astype(x_BTD.dtype)
        x_BTD, cache = block(x_BTD, view, cache)
        return Skips(x_BTD, (*skips, x_BTD) if first else skips), cache

    def finish(self, state: Skips):
        return state.x, ()
