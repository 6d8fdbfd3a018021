"""Relative keys and values (arXiv 1803.02155, equations 3 and 4): vectors of distances, added to keys and to values.

What a pair adds to its score depends on the query, so it is no `Bias`: attention of its own, in plain JAX, which
computes every pair, whatever the rule hides, over some queries at a time. Letters as in lab.kernels.reference, and X
distances -c..c.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lab.coordinates import Coordinates
from lab.kernels import reference
from lab.kernels.dropout import Dropped
from lab.kernels.rules import Rule, forked
from lab.model import parameter
from lab.model.scores import Added
from lab.options import Option

CHUNK = 64  # queries whose pairs are held at once


class Tables(NamedTuple):
    """A vector for each distance k.time - q.time = -c..c, that of keys and that of values; all heads share them."""

    keys_XK: jax.Array
    values_XV: jax.Array


class Relative(Added):
    """Tables of a layer, with c = position.clip. Drawn from N(0, 1/width); they decay, as embeddings do."""

    options: ClassVar[dict[str, Option]] = {
        "clip": Option(16, "time steps beyond which distances are as one", least=1, most=2**10)
    }
    makes = Tables

    def __init__(self, model, heads: int, widths: tuple[int, int], key: jax.Array):
        X = 2 * model.position.clip + 1
        self.keys, self.values = (
            parameter.table(one, (X, width), ("distance", "head_dim"), spread=width**-0.5, decay=True)
            for one, width in zip(jax.random.split(key), widths, strict=True)
        )
        self.work_per_head = X * sum(widths)

    def __call__(self) -> Tables:
        return Tables(self.keys[...], self.values[...])


def attend(
    q_BTHK,
    k_BSGK,
    v_BSGV,
    q_coordinates: Coordinates,
    k_coordinates: Coordinates,
    rule: Rule,
    scale,
    softcap,
    tables: Tables,
    dropout: Dropped | None = None,
    limits=None,
):
    """(o_BTHV, lse_BTH): softmax(scale q (k + a), soft-capped, over visible keys) (v + b), and its log sum, for the
    vectors a and b of each pair's distance; a query that sees no key gets zeros. Dropout is of the softmax."""
    rule = rule if limits is None else forked(rule)
    T = q_BTHK.shape[1]
    size = min(CHUNK, T)

    @jax.checkpoint  # so that the backward pass holds one chunk, too
    def of_chunk(chunk):
        q_BtHK, queries, word_Bt = chunk
        here = None if dropout is None else dropout._replace(query_BT=word_Bt)
        return _attend(q_BtHK, k_BSGK, v_BSGV, queries, k_coordinates, rule, scale, softcap, tables, here, limits)

    def chunks(x):
        padded = jnp.pad(x, ((0, 0), (0, -T % size)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    def whole(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :T]

    word_BT = None if dropout is None else dropout.query_BT
    return jax.tree.map(whole, jax.lax.map(of_chunk, jax.tree.map(chunks, (q_BTHK, q_coordinates, word_BT))))


def _attend(
    q_BTHK, k_BSGK, v_BSGV, q_coordinates, k_coordinates, rule, scale, softcap, tables: Tables, dropout, limits
):
    (B, T, H, K), G = q_BTHK.shape, k_BSGK.shape[2]
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    keys_XK, values_XV = (x.astype(wide) for x in tables)
    clip = len(keys_XK) // 2
    distance_BTS = k_coordinates.time[:, None, :] - q_coordinates.time[:, :, None]
    # Looked up by products, as are their gradients: no scatter.
    one_hot_BTSX = jax.nn.one_hot(jnp.clip(distance_BTS, -clip, clip) + clip, 2 * clip + 1, dtype=wide)
    of_distance_BTGRX = jnp.einsum("btgrk,xk->btgrx", q_BTHK.reshape(B, T, G, H // G, K).astype(wide), keys_XK)
    looked_up_BGRTS = jnp.einsum("btgrx,btsx->bgrts", of_distance_BTGRX, one_hot_BTSX, precision="highest")
    s_BGRTS = reference.scores(q_BTHK, k_BSGK, scale) + scale * looked_up_BGRTS
    p_BGRTS, lse_BGRT = reference.probabilities(
        s_BGRTS, q_coordinates, k_coordinates, rule, softcap, None, dropout, limits
    )
    at_distance_BTGRX = jnp.einsum("bgrts,btsx->btgrx", p_BGRTS, one_hot_BTSX, precision="highest")
    o_BTGRV = jnp.einsum("bgrts,bsgv->btgrv", p_BGRTS, v_BSGV.astype(wide))
    o_BTGRV += jnp.einsum("btgrx,xv->btgrv", at_distance_BTGRX, values_XV)
    return o_BTGRV.reshape(B, T, H, -1).astype(q_BTHK.dtype), jnp.moveaxis(lse_BGRT, 3, 1).reshape(B, T, H)
