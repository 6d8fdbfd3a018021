"""Attention by tokamax's kernels for Ampere, Hopper and Blackwell GPUs, where that library is installed: an extra
(`pip install tokamax`: Python 3.12, jax 0.11.1 or newer).

Who sees whom is given as a matrix, and as one interval of keys for each query, outside of which nothing is computed: a
rule that shows two stretches of keys, such as own_branch (the prompt and a branch), computes what lies between them.
As with cuDNN, a query that sees nothing is put right here, and the log normaliser has no gradient.
"""

import functools
import importlib.util

import jax.numpy as jnp

from lab.kernels.folding import whole
from lab.kernels.residuals import without_gradient
from lab.kernels.rules import visible
from lab.kernels.tiles import pad_to_tiles

TILE = 128  # rows are padded to it: its copies want a mask whose rows begin at multiples of 16 bytes
OBSTACLE = None if importlib.util.find_spec("tokamax") else "needs tokamax; `pip install tokamax` (Python 3.12)"
DTYPES = (jnp.bfloat16, jnp.float16)


def refusal(K: int, V: int, dtype) -> str | None:
    """Why keys of width K with values of width V are not taken in this precision; None if they are."""
    if dtype not in DTYPES:
        return f"computes in bfloat16 or float16, and this is {jnp.dtype(dtype).name}"
    if K != V:
        return f"needs keys and values of one width, and these are {K} and {V}"
    return None


def tile_sizes(T: int, S: int) -> tuple[int, int]:
    """Tokens of a query tile and of a key tile."""
    return TILE, TILE


def plan(rule, q_coordinates, k_coordinates):
    """(mask [B, 1, T, S], begin [B, 1, T], end [B, 1, T]) that layers of a rule share: each query sees keys of
    begin .. end - 1 at most."""
    mask_B1TS = visible(rule, pad_to_tiles(q_coordinates, TILE), pad_to_tiles(k_coordinates, TILE))[:, None]
    sees, S = mask_B1TS.any(-1), mask_B1TS.shape[-1]
    begin = mask_B1TS.argmax(-1)
    end = jnp.where(sees, S - mask_B1TS[..., ::-1].argmax(-1), 0)
    return mask_B1TS, begin.astype(jnp.int32), end.astype(jnp.int32)


def attend(q_BTHK, k_BSGK, v_BSGV, q_coordinates, k_coordinates, rule, scale, softcap, tiles=None):
    """Returns (o_BTHV, lse_BTH) as lab.kernels.reference.attend does; lse has no gradient."""
    seen = plan(rule, q_coordinates, k_coordinates) if tiles is None else tiles
    T = q_BTHK.shape[1]
    q, k, v = (whole(x, TILE) for x in (q_BTHK, k_BSGK, v_BSGV))
    o_BTHV, (top_BHT, sum_BHT) = _call(q, k, v, *seen, float(scale), softcap or None)
    saw_BT1 = seen[0].any((1, 3))[..., None]
    lse_BHT = top_BHT + jnp.log(sum_BHT)
    lse_BTH = jnp.where(saw_BT1, without_gradient(lse_BHT.swapaxes(1, 2), "tokamax"), -jnp.inf)
    return jnp.where(saw_BT1[..., None], o_BTHV, 0)[:, :T], lse_BTH[:, :T]


def _call(q_BTHK, k_BSGK, v_BSGV, mask_B1TS, begin_B1T, end_B1T, scale: float, softcap: float | None):
    """tokamax itself: o, and the top score and the sum of exponentials [B, H, T] of each query."""
    from tokamax._src.ops.attention import base

    mask = base.Mask(mask_B1TS, k_start=begin_B1T, k_end=end_B1T)
    options = dict(logits_scale=scale, logits_soft_cap=softcap, mask=mask, return_residuals=True)
    return _kernel()(q_BTHK, k_BSGK, v_BSGV, **options)


@functools.cache
def _kernel():
    from tokamax._src.ops.attention import pallas_mosaic_gpu

    return pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()
