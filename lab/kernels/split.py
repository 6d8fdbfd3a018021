"""Attention with the keys of each row split into parts that attend by themselves, merged by their log normalisers.

A step of decoding has few queries and many keys: the parts give a wide machine enough to do at once.
"""

import functools

import jax
import jax.numpy as jnp

from lab.coordinates import Coordinates
from lab.kernels.folding import whole
from lab.kernels.tiles import SHARED, pad_to_tiles

PROGRAMS = 264  # two for each multiprocessor of an H100
ROWS, KEYS = 64, 512  # queries of a program, and the fewest keys that are worth one
TILE = 64  # keys: other parts are padded, which copies them


def parts(rows: int, T: int, S: int) -> int:
    """Into how many parts to split the S keys of each row, for T queries of so many rows and heads.

    Of parts, too, there are enough keys for a step of decoding.
    """
    most = max(1, min(PROGRAMS * ROWS // (rows * T), S // max(KEYS, SHARED * T)))
    return next((count for count in range(most, 0, -1) if S % (count * TILE) == 0), most)


def attend(
    attend_whole, parts: int, q_BTHK, k_BSGK, v_BSGV, q_coordinates: Coordinates, k_coordinates: Coordinates, *rest
):
    """(o_BTHV, lse_BTH) as `attend_whole`, the attend of an implementation, gives it; rest: rule, scale, softcap."""
    B = len(q_BTHK)
    each = -(-k_BSGK.shape[1] // parts)
    cut = lambda x: whole(x, each).reshape(B * parts, each, *x.shape[2:])  # noqa: E731
    keys = pad_to_tiles(k_coordinates, each).map(lambda x: x.reshape(B * parts, each))
    again = lambda x: jnp.repeat(jnp.asarray(x), parts, axis=0)  # noqa: E731
    o, lse = attend_whole(again(q_BTHK), cut(k_BSGK), cut(v_BSGV), q_coordinates.map(again), keys, *rest)
    of_parts = (jnp.unstack(x.reshape(B, parts, *x.shape[1:]), axis=1) for x in (o, lse))
    return merge([*zip(*of_parts, strict=True)])


def merge(parts):
    """(o_BTHV, lse_BTH) over all keys, of what each part of them gave. A query that saw nothing gets 0 and -inf.

    Summed part by part: XLA takes a hundred times as long on a CPU to sum a leading axis of an array of more than two.
    """
    outputs, lses = zip(*parts, strict=True)
    top_BTH = jax.lax.stop_gradient(functools.reduce(jnp.maximum, lses))  # its gradients would cancel
    saw_BTH = top_BTH > -jnp.inf
    weights = [jnp.exp(lse_BTH - jnp.where(jnp.isfinite(top_BTH), top_BTH, 0)) for lse_BTH in lses]
    total_BTH = jnp.where(saw_BTH, sum(weights), 1)
    o_BTHV = sum(o * weight[..., None] for o, weight in zip(outputs, weights, strict=True)) / total_BTH[..., None]
    return o_BTHV.astype(outputs[0].dtype), jnp.where(saw_BTH, top_BTH + jnp.log(total_BTH), -jnp.inf)
