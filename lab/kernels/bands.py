"""Attention whose pairs rotate by bands: each band of pairs has positions and frequencies of its own.

The bands' rules hide each other's pairs, so attention over all of them is `attend` for each, merged by log-sum-exp
(lab.kernels.split). One band is RoPE (arXiv 2104.09864), or a change of its frequencies and positions; ReRoPE
(kexue.fm/archives/9708) and Self-Extend (arXiv 2401.01325) are two, dual chunk attention (arXiv 2402.17463) three.

F rotary pairs, of the last 2F dimensions of a head; other letters as in lab.kernels.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lab import kernels
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels import rules, split
from lab.kernels.expressions import Term, term
from lab.kernels.rotary import rotate, rotation
from lab.kernels.rules import Rule


@jax.tree_util.register_pytree_node_class
class Growth:
    """What a query is multiplied by at its position: max(1, start + rate ln n), n a term of its coordinates.

    Log-n scaling beyond a length L: n = time + 1, start 0, rate 1 / ln L (kexue.fm/archives/8823). The temperature of
    Llama 4: n = (time + 1) // floor_scale + 1, start 1, rate attn_scale. A pytree of the two numbers.
    """

    def __init__(self, n: Term, start: float | jax.Array, rate: float | jax.Array):
        _check_side(n, "q", "the growth of a query")
        self.n, self.start, self.rate = n, start, rate

    def __call__(self, q: Coordinates) -> jax.Array:
        """float32, shaped like the coordinates; 1 where n is below 1."""
        n = jnp.maximum(jnp.asarray(self.n.values(q, q), jnp.float32), 1)
        return jnp.broadcast_to(jnp.maximum(self.start + self.rate * jnp.log(n), 1), q.shape)

    def tree_flatten(self):
        return (self.start, self.rate), self.n.tree

    @classmethod
    def tree_unflatten(cls, tree: tuple, children: tuple) -> "Growth":
        made = object.__new__(cls)
        made.n, (made.start, made.rate) = Term(tree), children
        return made


@jax.tree_util.register_pytree_node_class
class Band:
    """The pairs that `rule` shows, and how they rotate. A pytree of its numbers.

    frequencies_3F: radians per unit of index, branch and *mapped* time; None: nothing rotates. q_time, k_time: the time
    of a query and of a key that rotate, terms of their own coordinates, over the whole number `over` (what is whole
    then turns as it would without). amplitude: of the rotated dimensions of both sides (YaRN's attention factor, arXiv
    2309.00071); None: 1. growth: of the whole query; None: 1.
    """

    def __init__(
        self,
        rule: Rule,
        frequencies_3F: jax.Array | None,
        q_time: Term | int = rules.q.time,
        k_time: Term | int = rules.k.time,
        amplitude: float | jax.Array | None = None,
        growth: Growth | None = None,
        over: int = 1,
    ):
        self.over = over
        self.rule, self.q_time, self.k_time = rule, term(q_time), term(k_time)
        self.frequencies_3F, self.amplitude, self.growth = frequencies_3F, amplitude, growth
        _check_side(self.q_time, "q", "the time of a query")
        _check_side(self.k_time, "k", "the time of a key")

    def mapped(self, coordinates: Coordinates, time: Term) -> Coordinates:
        """Those whose time is `time`, which is `q_time` or `k_time`, over `over`."""
        mapped = time.values(coordinates, coordinates)
        if not np.ndim(mapped):  # one time for all
            mapped = np.full(coordinates.shape, mapped, np.int32)
        if self.over != 1:
            mapped = jnp.asarray(mapped, jnp.float32) / self.over
        return dataclasses.replace(coordinates, time=mapped)

    def turns(self, coordinates: Coordinates, time: Term) -> tuple[jax.Array, jax.Array]:
        """cos and sin of the angles times the amplitude, float32 [B, T, 1, F]."""
        turns = rotation(self.mapped(coordinates, time), self.frequencies_3F)
        return turns if self.amplitude is None else tuple(self.amplitude * x for x in turns)

    def turned(self, x_BTHK, coordinates: Coordinates, time: Term):
        """Queries or keys [B, T, H, K], rotated."""
        return x_BTHK if self.frequencies_3F is None else rotate(x_BTHK, self.turns(coordinates, time))

    def grown(self, q_BTHK, coordinates: Coordinates):
        """Queries, times what they grow by."""
        if self.growth is None:
            return q_BTHK
        return (q_BTHK * self.growth(coordinates)[..., None, None]).astype(q_BTHK.dtype)

    def turns_plainly(self) -> bool:
        """Whether queries rotate by their own coordinates alone, so that `attend` can do it."""
        return self.amplitude is None and self.over == 1 and self.q_time.tree == rules.q.time.tree

    def tree_flatten(self):
        said = self.rule, self.q_time.tree, self.k_time.tree, self.over
        return (self.frequencies_3F, self.amplitude, self.growth), said

    @classmethod
    def tree_unflatten(cls, said: tuple, children: tuple) -> "Band":
        made = object.__new__(cls)
        made.rule, made.q_time, made.k_time, made.over = said[0], Term(said[1]), Term(said[2]), said[3]
        made.frequencies_3F, made.amplitude, made.growth = children
        return made


def _check_side(said: Term, side: str, what: str) -> None:
    if not said.sides() <= {side}:
        raise ValueError(f"{what} reads coordinates of {' and '.join(sorted(said.sides()))}; choose those of {side}")


def attend_bands(
    q_BTHK,
    k_BSGK,
    v_BSGV,
    q_coordinates: Coordinates,
    k_coordinates: Coordinates,
    bands: Sequence[Band],
    *,
    tiles: Sequence[Any] | None = None,
    return_lse: bool = False,
    **options,
):
    """`kernels.attend` of queries and keys that have not rotated, by bands of disjoint rules (`check_bands`).

    tiles: what `plan_tiles` gave for the rule of each band. options: those of `attend`, but for frequencies_3F. A
    single band is one call, which rotates queries in the kernel where it can; more are one call each. Differentiable in
    q, k, v and in the numbers of bands. In bfloat16 each band's output is rounded before the merge.
    """
    outputs = []
    for band, lists in zip(bands, tiles or [None] * len(bands), strict=True):
        q = band.grown(q_BTHK, q_coordinates)
        late = band.turns_plainly()
        outputs.append(
            kernels.attend(
                q if late else band.turned(q, q_coordinates, band.q_time),
                band.turned(k_BSGK, k_coordinates, band.k_time),
                v_BSGV,
                q_coordinates,
                k_coordinates,
                band.rule,
                tiles=lists,
                return_lse=True,
                frequencies_3F=band.frequencies_3F if late else None,
                **options,
            )
        )
    if len(outputs) == 1:
        o_BTHV, lse_BTH = outputs[0]
    else:
        o_BTHV, lse_BTH = split.merge(outputs)
    return (o_BTHV, lse_BTH) if return_lse else o_BTHV


def check_bands(bands: Sequence[Band], q: Coordinates, k: Coordinates, rule: Rule) -> None:
    """Raises UserError unless each pair that `rule` shows lies in exactly one band, and no other pair in any.

    NumPy coordinates [B, T] and [B, S] of sample rows: the whole matrix is looked at.
    """
    seen_BTS = rules.visible(rule, q, k)
    bands_PBTS = np.stack([rules.visible(band.rule, q, k) for band in bands])
    wrong = np.argwhere(bands_PBTS.sum(0) != seen_BTS)
    if not len(wrong):
        return
    b, t, s = wrong[0]
    holds = [str(i) for i in np.flatnonzero(bands_PBTS[:, b, t, s])]
    where = f"bands {' and '.join(holds)}" if len(holds) > 1 else f"band {holds[0]}" if holds else "no band"
    hidden = "" if seen_BTS[b, t, s] else ", and the rule hides it"
    raise UserError(
        f"query {_named(q, b, t)} and key {_named(k, b, s)} of row {b} are a pair of {where}{hidden}; choose rules of "
        "bands that put each visible pair in exactly one"
    )


def _named(at: Coordinates, b: int, t: int) -> str:
    return f"(branch {at.branch[b, t]}, time {at.time[b, t]}, index {at.index[b, t]})"
