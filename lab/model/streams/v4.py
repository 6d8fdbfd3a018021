"""Version 4, methods 1 to 7: scores summed over layers, Z_m = sum_(i<=m) c_(m,i) q_i k_i^T, with the current values.

sum_i c_i q_i k_i^T = [c_i q_i]_i [k_i]_i^T: heads as wide as those of layers 0..m together attend once, at scale 1.
d is the width of a head, M = m + 1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lab.model import parameter
from lab.model.attending import View, attend_over_mesh
from lab.model.streams.stream import Stream
from lab.model.streams.weights import rows, triangle


class ScoreState(NamedTuple):
    """The stream before a layer, queries and keys of the layers before it, and, decoding, what the stream caches."""

    x: jax.Array
    past: tuple[tuple[jax.Array, jax.Array], ...]
    cache: tuple | None


class SummedScores(Stream):
    """What the methods share; each says c_(m,i)."""

    grows = True
    needs = 2
    mixers = ("attention", "differential", "mla", "s1", "s2", "s3", "gta")  # their scores are q k^T and no more
    adds = False

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.layers, self.d = model.layers, model.mixer.head_dim
        self.scale = model.mixer.softmax_scale or self.d**-0.5

    def init_cache(self, batch: int, length: int, dtype) -> tuple:
        return ((),) * self.layers

    def start(self, x_BTD, cache):
        return ScoreState(x_BTD, (), cache)

    def layer(self, state: ScoreState, block, view: View, cache, *, m):
        x_BTD, past, kept = state
        mixer, normed_BTD = block.mixer, block.mixer_placement.before(x_BTD)
        q_BTHK, seen, cache = mixer.project(normed_BTD, view, cache)
        q_BTHK = mixer.turned("q", q_BTHK, view.rotation)
        k_BSGK, v_BSGV = mixer.read(seen)
        past = *past, (q_BTHK, k_BSGK)
        on_keys, kept = self.on_keys(m, x_BTD, normed_BTD, view, kept)
        on_queries = self.on_queries(m, x_BTD, normed_BTD, view)
        o_BTHV, lse_BTH = self.attend(m, past, v_BSGV, on_queries, on_keys, view, mixer)
        a_BTD = mixer.output(o_BTHV, lse_BTH, normed_BTD, view.rotation)
        h_BTD = x_BTD + block.mixed(a_BTD)
        return ScoreState(h_BTD + block.feed(h_BTD), past, kept), cache

    def c(self, m: int):
        """[M] numbers c_(m,i)."""
        raise NotImplementedError

    def on_queries(self, m: int, x_BTD, normed_BTD, view: View) -> list:
        """What scales the queries of each layer: numbers, or [B, T] for each token."""
        return list(self.c(m))

    def on_keys(self, m: int, x_BTD, normed_BTD, view: View, cache: tuple | None) -> tuple[list, tuple | None]:
        """The same for keys, and the new cache."""
        return [1.0] * (m + 1), cache

    def attend(self, m: int, past, v_BSGV, on_queries: list, on_keys: list, view: View, mixer):
        """softmax(Z_m) v [B, T, H, V], and its log normaliser."""
        q_BTHX = jnp.concatenate([scaled(q, c) for (q, _), c in zip(past, on_queries, strict=True)], axis=-1)
        k_BSGX = jnp.concatenate([scaled(k, c) for (_, k), c in zip(past, on_keys, strict=True)], axis=-1)
        return attend_over_mesh(q_BTHX, k_BSGX, v_BSGV, view.of_rotated(), mixer, scale=1.0)

    def finish(self, state: ScoreState):
        return state.x, state.cache or ()

    def work_per_token(self, blocks: list, visible: list[float]) -> float:
        """The scores of m more layers in layer m."""
        return sum(m * keys * b.mixer.heads * self.d for m, (b, keys) in enumerate(zip(blocks, visible, strict=True)))


class Sum(SummedScores):
    """Method 1: c = d^-1/2 (RealFormer, arXiv 2012.11747)."""

    def c(self, m):
        return [self.scale] * (m + 1)


class SumOverRootM(SummedScores):
    """Method 2: c = (d M)^-1/2."""

    def c(self, m):
        return [self.scale * (m + 1) ** -0.5] * (m + 1)


class Mean(SummedScores):
    """Method 3: c = 1 / (M sqrt d)."""

    def c(self, m):
        return [self.scale / (m + 1)] * (m + 1)


class Learned(SummedScores):
    """What methods 4 to 7 share: weights to report, in units of the scale of ordinary attention."""

    def mixing(self):
        return {"c sqrt(d)": triangle([jnp.asarray(self.c(m)) / self.scale for m in range(self.layers)])}


class LearnedPowers(Learned):
    """Method 4: c = d^-a_m M^-b_m."""

    replaces = ("mixer.softmax_scale",)

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.a, self.b = (parameter.mixing((model.layers,), value) for value in (0.5, 1.0))

    def c(self, m):
        M = m + 1
        return jnp.broadcast_to(self.d ** -self.a[m] * M ** -self.b[m], (M,))


class LearnedDivisors(Learned):
    """Method 5: c = 1 / (a_mi sqrt d), a = exp(log_a) > 0."""

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.log_a = rows(model.layers, 0.0)

    def c(self, m):
        return jnp.exp(-self.log_a[m][...]) * self.scale


class LearnedDivisorsAndPowers(Learned):
    """Method 6: c = 1 / (a_mi d^b_mi), a = exp(log_a) > 0."""

    replaces = ("mixer.softmax_scale",)

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.log_a, self.b = rows(model.layers, 0.0), rows(model.layers, 0.5)

    def c(self, m):
        return jnp.exp(-self.log_a[m][...]) * self.d ** -self.b[m][...]


class LearnedTemperatures(Learned):
    """Method 7: c = 1 / a_mi, a = exp(log_a) > 0, sqrt d at the start."""

    replaces = ("mixer.softmax_scale",)

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.log_a = rows(model.layers, 0.5 * math.log(self.d))

    def c(self, m):
        return jnp.exp(-self.log_a[m][...])


METHODS = {
    "v4m1": Sum,
    "v4m2": SumOverRootM,
    "v4m3": Mean,
    "v4m4": LearnedPowers,
    "v4m5": LearnedDivisors,
    "v4m6": LearnedDivisorsAndPowers,
    "v4m7": LearnedTemperatures,
}


def scaled(x_BTHK, c):
    """Heads times a number, or a number for each token [B, T]."""
    c = c[..., None, None] if jnp.ndim(c) == 2 else c
    return (x_BTHK * c).astype(x_BTHK.dtype)
