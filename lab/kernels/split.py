"""Attention with the keys of each row split into parts that attend by themselves, merged by their log normalisers.

A step of decoding has few queries and many keys: the parts give a wide machine enough to do at once.
"""

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
    B, T, H, _ = q_BTHK.shape
    each = -(-k_BSGK.shape[1] // parts)
    cut = lambda x: whole(x, each).reshape(B * parts, each, *x.shape[2:])  # noqa: E731
    keys = pad_to_tiles(k_coordinates, each).map(lambda x: x.reshape(B * parts, each))
    again = lambda x: jnp.repeat(jnp.asarray(x), parts, axis=0)  # noqa: E731
    o, lse = attend_whole(again(q_BTHK), cut(k_BSGK), cut(v_BSGV), q_coordinates.map(again), keys, *rest)
    return merge(o.reshape(B, parts, T, H, -1), lse.reshape(B, parts, T, H))


def merge(o_BPTHV, lse_BPTH):
    """(o_BTHV, lse_BTH) over all keys, of what P parts of them gave. A query that saw nothing gets 0 and -inf."""
    top_B1TH = jnp.max(lse_BPTH, axis=1, keepdims=True)
    saw_BTH = top_B1TH[:, 0] > -jnp.inf
    weight_BPTH = jnp.exp(lse_BPTH - jnp.where(jnp.isfinite(top_B1TH), top_B1TH, 0))
    total_BTH = jnp.where(saw_BTH, weight_BPTH.sum(1), 1)
    o_BTHV = (o_BPTHV * weight_BPTH[..., None]).sum(1) / total_BTH[..., None]
    return o_BTHV.astype(o_BPTHV.dtype), jnp.where(saw_BTH, top_B1TH[:, 0] + jnp.log(total_BTH), -jnp.inf)
