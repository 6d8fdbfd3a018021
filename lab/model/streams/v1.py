"""Version 1: a sum of earlier outputs in place of the residual. At layer 0 that sum is empty and nothing stands in.

A, F: what attention and feed-forward sublayers gave in layers before m; h, x': the stream after either site of layer m.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lab.model.streams.stream import Stream
from lab.options import Option


class SumMethod(NamedTuple):
    sums: str  # those that it needs, of A and F
    h: Callable  # of the sums, what layer 0 would divide by 0 mended, and a_m
    x: Callable  # of the sums, h_m and f_m


METHODS = {
    "v1m1": SumMethod("A", lambda s, a: s.A + a, lambda s, h, f: h + f),
    "v1m2": SumMethod("A", lambda s, a: s.A / s.m + a, lambda s, h, f: h + f),
    "v1m3": SumMethod("F", lambda s, a: s.x + a, lambda s, h, f: s.F + f),
    "v1m4": SumMethod("F", lambda s, a: s.x + a, lambda s, h, f: s.F / s.m + f),
    "v1m5": SumMethod("A", lambda s, a: s.A + a, lambda s, h, f: s.A + f),
    "v1m6": SumMethod("F", lambda s, a: s.F + a, lambda s, h, f: s.F + f),
    "v1m7": SumMethod("AF", lambda s, a: s.A + a, lambda s, h, f: s.F + f),
}


class Sums(NamedTuple):
    """The stream before a layer, and what it reads of the layers before that one."""

    x: jax.Array
    A: jax.Array | None
    F: jax.Array | None
    m: jax.Array | int = 1


class RunningSums(Stream):
    """METHODS, with raw outputs accumulated, or the stream after each site (h_i for a_i, x_(i+1) for f_i)."""

    needs = 2
    options = {
        "accumulate": Option(
            "raw", "what is summed: outputs of sublayers, or the stream after them", choices=("raw", "post")
        )
    }

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.post = model.stream.accumulate == "post"

    def start(self, x_BTD, cache):
        empty = {name: jnp.zeros_like(x_BTD) for name in METHODS[self.name].sums}
        return Sums(x_BTD, empty.get("A"), empty.get("F"))

    def layer(self, state: Sums, block, view, cache, *, m):
        method, s = METHODS[self.name], state._replace(m=jnp.maximum(m, 1))
        a_BTD, cache = block.mix(s.x, view, cache)
        h_BTD = method.h(s, a_BTD)
        f_BTD = block.feed(h_BTD)
        x_BTD = method.x(s, h_BTD, f_BTD)
        more_A, more_F = (h_BTD, x_BTD) if self.post else (a_BTD, f_BTD)
        add = lambda total, more: None if total is None else total + more  # noqa: E731
        return Sums(x_BTD, add(s.A, more_A), add(s.F, more_F)), cache

    def finish(self, state: Sums):
        return state.x, ()
