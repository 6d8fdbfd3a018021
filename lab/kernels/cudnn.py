"""Attention by cuDNN, which is given who sees whom as a dense mask: NVIDIA GPUs, bfloat16 or float16.

Every pair is computed, whether it is seen or not, and a mask takes 3 bytes a pair (a boolean, and the bias of 16 bits
that jax makes of it): for rows that are not too long. Masks of more than MOST bytes are made row by row of the batch,
again for each layer.

Three things are put right here: a query that sees nothing gets zeros (cuDNN gives it the mean of all values); the log
normaliser is float32, as in the function below the public one, whose is 16 bits; and asking for the gradient of the
log normaliser is an error, where jax drops it silently. cuDNN's own backward pass adds in no fixed order, unless
XLA_FLAGS has --xla_gpu_exclude_nondeterministic_ops: a run is not repeatable to the last bit.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jax import lax

from lab.errors import UserError
from lab.kernels.folding import whole
from lab.kernels.residuals import without_gradient
from lab.kernels.rules import visible
from lab.kernels.tiles import pad_to_tiles

try:
    from jax._src.cudnn import fused_attention_stablehlo as fused
except ImportError:  # private: it may move
    fused = None

TILE = 64  # rows are padded to it: cuDNN wants even lengths at least
MOST = 4 * 2**30  # bytes of the bias of a mask that is kept for all rows at once
WIDEST = {8: 128, 9: 256, 10: 128, 12: 256}  # heads, by generation of the card
UNEQUAL = ((192, 128),)  # widths of keys and of values that may differ
NEEDED = {"query", "key", "value", "mask", "scale", "return_residual"}
FAULTY = range(91300, 91500)  # illegal accesses under CUDA graphs for more than 1024 keys


def _obstacle() -> str | None:
    if fused is None or not {*inspect.signature(fused.dot_product_attention).parameters} >= NEEDED:
        return f"needs cuDNN attention as jax 0.11.1 to 0.12 have it, and this is jax {jax.__version__}"
    if hasattr(fused, "should_export_dbias"):  # before 0.11.1 the mask's gradient is computed too: B T S numbers
        return f"needs jax 0.11.1 or newer, and this is jax {jax.__version__}"
    if (version := _version()) in FAULTY:
        said = f"{version // 10_000}.{version // 100 % 100}.{version % 100}"
        return f"needs a cuDNN other than 9.13 and 9.14, which access memory that is not theirs, and this is {said}"
    return None


def _version() -> int | None:
    """Of cuDNN, as 91002; None where there is none."""
    from jax._src.lib import cuda_versions

    try:
        return cuda_versions.cudnn_get_version() if cuda_versions else None
    except RuntimeError:
        return None


OBSTACLE = _obstacle()


def refusal(K: int, V: int, dtype) -> str | None:
    """Why keys of width K with values of width V are not taken in this precision, or here; None if they are."""
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, and this is {jnp.dtype(dtype).name}"
    generation = int(capability.split(".")[0])
    if generation < min(WIDEST):
        return f"needs compute capability {min(WIDEST)}.0, and this GPU has {capability}"
    if K != V and (K, V) not in UNEQUAL:
        return f"needs keys and values of one width, or of 192 and 128, and these are {K} and {V}"
    widest = WIDEST.get(generation, 128)
    if K % 8 or max(K, V) > widest:
        return f"needs widths of a multiple of 8 up to {widest}, and this is {K}"
    return None


def tile_sizes(T: int, S: int) -> tuple[int, int]:
    """Tokens of a query tile and of a key tile: all, since nothing is left out, so no order of tokens is better."""
    return T, S


def plan(rule, q_coordinates, k_coordinates):
    """The mask [B, 1, T, S] that layers of a rule share; None where it would be too large."""
    (B, T), S = q_coordinates.shape, k_coordinates.shape[1]
    return None if 2 * B * T * S > MOST else _mask(rule, q_coordinates, k_coordinates)


def attend(q_BTHK, k_BSGK, v_BSGV, q_coordinates, k_coordinates, rule, scale, softcap, tiles=None):
    """Returns (o_BTHV, lse_BTH) as lab.kernels.reference.attend does; lse has no gradient."""
    if softcap:
        raise UserError(f"attention implementation 'cudnn' caps no scores (softcap = {softcap}); choose auto or tiled")
    call = functools.partial(_attend, scale=float(scale))
    mask = plan(rule, q_coordinates, k_coordinates) if tiles is None else tiles
    if mask is not None:
        return call(q_BTHK, k_BSGK, v_BSGV, mask)

    def row(of_row):
        q, k, v, q_at, k_at = jax.tree.map(lambda x: x[None], of_row)
        return jax.tree.map(lambda x: x[0], call(q, k, v, _mask(rule, q_at, k_at)))

    return lax.map(row, (q_BTHK, k_BSGK, v_BSGV, q_coordinates, k_coordinates))


def _mask(rule, q_coordinates, k_coordinates):
    """bool [B, 1, T, S], padded to whole tiles."""
    return visible(rule, pad_to_tiles(q_coordinates, TILE), pad_to_tiles(k_coordinates, TILE))[:, None]


def _attend(q_BTHK, k_BSGK, v_BSGV, mask_B1TS, scale):
    T = q_BTHK.shape[1]
    q, k, v = (whole(x, TILE) for x in (q_BTHK, k_BSGK, v_BSGV))
    o_BTHV, lse_BHT = _call(q, k, v, mask_B1TS, scale)
    saw_BT1 = mask_B1TS.any((1, 3))[..., None]
    o_BTHV = jnp.where(saw_BT1[..., None], o_BTHV, 0)
    lse_BTH = jnp.where(saw_BT1, without_gradient(lse_BHT.swapaxes(1, 2), "cudnn"), -jnp.inf)
    return o_BTHV[:, :T], lse_BTH[:, :T]


def _call(q_BTHK, k_BSGK, v_BSGV, mask_B1TS, scale: float):
    """cuDNN itself: (o [B, T, H, V], lse [B, H, T] in float32)."""
    return fused.dot_product_attention(q_BTHK, k_BSGK, v_BSGV, mask=mask_B1TS, scale=scale, return_residual=True)
