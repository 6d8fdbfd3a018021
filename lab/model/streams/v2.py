"""Version 2: the residual stays, and a sublayer adds the mean of all outputs so far, or a learned mean (method 3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lab.model.streams.stream import Stream
from lab.model.streams.weights import SoftmaxWeights, weighted_sum


class RunningSum(NamedTuple):
    """The stream before a layer, and the sum of what one kind of sublayer gave before it."""

    x: jax.Array
    total: jax.Array


class MeanOfOutputs(Stream):
    """What the two methods share: a running sum."""

    needs = 2

    def start(self, x_BTD, cache):
        return RunningSum(x_BTD, jnp.zeros_like(x_BTD))

    def finish(self, state: RunningSum):
        return state.x, ()


class MeanOfFeedforward(MeanOfOutputs):
    """Method 1: x_(m+1) = h_m + (F + f_m) / (m + 1)."""

    def layer(self, state: RunningSum, block, view, cache, *, m):
        x_BTD, F_BTD = state
        a_BTD, cache = block.mix(x_BTD, view, cache)
        h_BTD = x_BTD + a_BTD
        F_BTD = F_BTD + block.feed(h_BTD)
        return RunningSum(h_BTD + F_BTD / (m + 1), F_BTD), cache


class MeanOfAttention(MeanOfOutputs):
    """Method 2: h_m = x_m + (A + a_m) / (m + 1)."""

    def layer(self, state: RunningSum, block, view, cache, *, m):
        x_BTD, A_BTD = state
        a_BTD, cache = block.mix(x_BTD, view, cache)
        A_BTD = A_BTD + a_BTD
        h_BTD = x_BTD + A_BTD / (m + 1)
        return RunningSum(h_BTD + block.feed(h_BTD), A_BTD), cache


class Outputs(NamedTuple):
    """The stream before a layer, and what each feed-forward sublayer gave before it."""

    x: jax.Array
    f: tuple[jax.Array, ...]


class WeightedFeedforward(Stream):
    """Method 3: x_(m+1) = h_m + sum_(i<=m) softmax(w_m)_i f_i."""

    grows = True
    needs = 2

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.weights = SoftmaxWeights(model.layers)

    def start(self, x_BTD, cache):
        return Outputs(x_BTD, ())

    def layer(self, state: Outputs, block, view, cache, *, m):
        x_BTD, f = state
        a_BTD, cache = block.mix(x_BTD, view, cache)
        h_BTD = x_BTD + a_BTD
        f = *f, block.feed(h_BTD)
        return Outputs(h_BTD + weighted_sum(self.weights(m), f), f), cache

    def finish(self, state: Outputs):
        return state.x, ()

    def mixing(self):
        return self.weights.mixing()


METHODS = {"v2m1": MeanOfFeedforward, "v2m2": MeanOfAttention, "v2m3": WeightedFeedforward}
