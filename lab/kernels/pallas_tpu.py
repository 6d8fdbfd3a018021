"""Attention over lists of non-empty tiles as Pallas kernels for TPUs (Mosaic): forward, dq, and dk with dv.

A grid has one step for each tile of a list, whose numbers are prefetched scalars: nothing is spent on empty tiles, and
tiles that hide nothing are not masked. Heads of a group are folded into rows. The backward pass computes each tile
again, by query tile for dq and by key tile for dk and dv, so that every sum has one order. A step of decoding reads
each tile of keys where it lies, once for all branches and the heads of several groups.

Letters as in lab.kernels.folding; s is transposed for dk and dv, [k, R]. FlashAttention-2 (arXiv 2307.08691).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels import tiles as tile_lists
from lab.kernels.folding import fold_queries, key_tiles, unfold_queries
from lab.kernels.mosaic_tpu import (
    KEYS,
    LANES,
    QUERIES,
    VMEM,
    across,
    along,
    blocks,
    call,
    columns,
    each_kind,
    rows,
    sums,
    turned,
    turns,
)
from lab.kernels.pallas_common import (
    MASKED,
    Static,
    capped,
    dot,
    fields,
    frequency_gradients,
    of_rows,
    probabilities,
    score_gradients,
)
from lab.kernels.residuals import kept
from lab.kernels.rules import Rule, pairs_visible
from lab.kernels.tiles import BothWays, in_line, is_step, pad_to_tiles, plan_both_ways

ROWS = 1024  # of a query tile, with its heads: what fits VMEM beside 512 keys and values of 128
STEP_VMEM = 48 * 2**20  # of a step of decoding
STEPS = 2**16  # of a grid: three numbers for each, within the 1 MiB of SMEM


def tile_sizes(T: int, S: int) -> tuple[int, int]:
    """Tokens of a query tile and of a key tile: multiples of 128 lanes, but fewer queries in a step of decoding."""
    q_tile = -(-T // 16) * 16 if is_step(T, S) else min(256 if T <= 2**16 else 512, -(-T // LANES) * LANES)
    return q_tile, min(512, -(-S // LANES) * LANES)


def rows_at_once(B: int, T: int, S: int) -> int:
    """How many of B rows one call takes: a divisor; 0 where the list of a single one does not fit SMEM."""
    q_tile, k_tile = tile_sizes(T, S)
    each = -(-T // q_tile) * -(-S // k_tile)
    return max((b for b in range(1, B + 1) if B % b == 0 and b * each <= STEPS), default=0)


def heads_per_tile(R: int, q_tile: int, width: int) -> int:
    """How many of the R heads that share keys a query tile holds: a divisor, within VMEM for heads of this width."""
    most = ROWS if width <= 256 else ROWS // 2
    return max(f for f in range(1, R + 1) if R % f == 0 and (f == 1 or f * q_tile <= most))


def heads_per_step(R: int, q_tile: int, k_tile: int, groups: int, K: int, V: int, itemsize: int) -> int:
    """The same for a step of decoding of so many groups, which reads keys once for each bundle of heads.

    Counted: blocks, two of each, with what the kernel keeps beside them; and what one group takes for a moment.
    """
    K, V = (-(-width // LANES) * LANES for width in (K, V))

    def fits(f: int) -> bool:
        kept = groups * f * q_tile * ((3 * K + 2 * V) * itemsize + 4 * V + 8 * LANES)
        keys = 3 * groups * k_tile * (K + V) * itemsize
        return kept + keys + 4 * f * q_tile * (3 * K + 2 * V + 3 * k_tile) <= 0.75 * STEP_VMEM

    return max(f for f in range(1, R + 1) if R % f == 0 and (f == 1 or (f * q_tile <= 2 * ROWS and fits(f))))


def groups_at_once(G: int) -> int:
    """How many of the G groups a program of a step of decoding has: blocks are of 8, or of all there are."""
    return 8 if G % 8 == 0 else G


def plan(rule: Rule, q_coordinates: Coordinates, k_coordinates: Coordinates) -> BothWays:
    """The tile lists `attend` needs: made once per batch and rule, shared by layers."""
    sizes = tile_sizes(q_coordinates.shape[1], k_coordinates.shape[1])
    return plan_both_ways(rule, q_coordinates, k_coordinates, *sizes)


def attend(
    q_BTHK,
    k_BSGK,
    v_BSGV,
    q_coordinates,
    k_coordinates,
    rule,
    scale,
    softcap,
    tiles: BothWays | None = None,
    frequencies_3F=None,
    *,
    interpret,
):
    """Returns (o_BTHV, lse_BTH) as lab.kernels.reference.attend does; with frequencies, queries come unrotated."""
    tiles = plan(rule, q_coordinates, k_coordinates) if tiles is None else tiles
    (B, T, H, K), (_, S, G, V) = q_BTHK.shape, v_BSGV.shape
    at_once = rows_at_once(B, T, S)
    if not at_once:
        raise UserError(f"pallas_tpu takes no rows of {T} queries over {S} keys; choose tiled")
    if at_once < B:
        row_groups = jax.tree.map(
            lambda x: jnp.asarray(x).reshape(B // at_once, at_once, *x.shape[1:]),
            (q_BTHK, k_BSGK, v_BSGV, q_coordinates, k_coordinates, tiles),
        )
        some = lambda x: attend(*x[:5], rule, scale, softcap, x[5], frequencies_3F, interpret=interpret)  # noqa: E731
        return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), jax.lax.map(some, row_groups))
    q_tile, k_tile = tile_sizes(T, S)
    if step := is_step(T, S):
        F = heads_per_step(H // G, q_tile, k_tile, groups_at_once(G), K, V, q_BTHK.dtype.itemsize)
    else:
        F = heads_per_tile(H // G, q_tile, max(K, V))
    C = H // F
    o_NCRV, lse_NCR = _attend(
        Static(rule, float(scale), float(softcap or 0.0), interpret),
        groups_at_once(G) if step and G > 1 else 0,  # those of one group lie as they should
        fold_queries(q_BTHK, q_tile, C),
        key_tiles(k_BSGK, k_tile),
        key_tiles(v_BSGV, k_tile),
        fields(pad_to_tiles(q_coordinates, q_tile), q_tile, H // C),
        fields(pad_to_tiles(k_coordinates, k_tile), k_tile, 1),
        frequencies_3F,
        tiles,
    )
    return unfold_queries(o_NCRV, B, T, H), unfold_queries(lse_NCR[..., None], B, T, H)[..., 0]


def _forward_kernel(own, other, flags, raw_q, k, v, q_at, k_at, turning, outputs, scratch, *, static, in_place):
    (o, lse), (q, o_sum, top, total) = outputs, scratch
    flag, groups = flags[pl.program_id(1)], range(len(q))

    @pl.when(flag & tile_lists.FIRST != 0)
    def _():
        for g in groups:
            q[g] = (static.scale * turned(raw_q[g].astype(jnp.float32), q_at, turning)).astype(q.dtype)
        o_sum[...] = jnp.zeros_like(o_sum)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    def add(masked: bool):
        k_GkK, v_GkV = (x[...].swapaxes(0, 1) if in_place else x[...] for x in (k, v))
        seen_Rk = pairs_visible(static.rule, columns(q_at), rows(k_at)) if masked else None
        for g in groups:
            s_Rk = capped(dot(q[g], k_GkK[g], (1, 1)), static)
            s_Rk = jnp.where(seen_Rk, s_Rk, MASKED) if masked else s_Rk
            old_R1 = top[g, :, :1]
            new_R1 = jnp.maximum(old_R1, s_Rk.max(1, keepdims=True))
            p_Rk, shrink_R1 = jnp.exp(s_Rk - new_R1), jnp.exp(old_R1 - new_R1)
            sum_R1 = total[g, :, :1] * shrink_R1 + p_Rk.sum(1, keepdims=True)
            top[g], total[g] = (jnp.broadcast_to(x, top.shape[1:]) for x in (new_R1, sum_R1))
            o_sum[g] = o_sum[g] * shrink_R1 + dot(p_Rk.astype(v.dtype), v_GkV[g], (1, 0))

    each_kind(flag, add)

    @pl.when(flag & tile_lists.LAST != 0)
    def _():
        for g in groups:
            # A row that saw nothing has kept its first maximum, or has summed exp(0) over hidden keys.
            saw_R1 = (top[g, :, :1] > MASKED) & (columns(q_at).segment >= 0)
            sum_R1 = jnp.where(saw_R1, total[g, :, :1], 1)
            o[g] = jnp.where(saw_R1, o_sum[g] / sum_R1, 0).astype(o.dtype)
            lse[g] = along(jnp.where(saw_R1, top[g, :, :1] + jnp.log(sum_R1), -jnp.inf))


def _dq_kernel(own, other, flags, raw_q, k, v, q_at, k_at, do, lse, delta, turning, outputs, scratch, *, static):
    (dq, q), (dq_sum, lse_R, delta_R) = outputs, scratch
    flag = flags[pl.program_id(1)]

    @pl.when(flag & tile_lists.FIRST != 0)
    def _():
        q[...] = (static.scale * turned(raw_q[...].astype(jnp.float32), q_at, turning)).astype(q.dtype)
        dq_sum[...] = jnp.zeros_like(dq_sum)
        lse_R[...] = jnp.broadcast_to(across(lse[...]), lse_R.shape)
        delta_R[...] = jnp.broadcast_to(across(delta[...]), delta_R.shape)

    def add(masked: bool):
        s_Rk = capped(dot(q[...], k[...], (1, 1)), static)
        seen = pairs_visible(static.rule, columns(q_at), rows(k_at)) if masked else None
        p_Rk = probabilities(s_Rk, lse_R[:, :1], seen)
        ds_Rk = score_gradients(static, s_Rk, p_Rk, dot(do[...], v[...], (1, 1)), delta_R[:, :1])
        dq_sum[...] += dot(ds_Rk.astype(k.dtype), k[...], (1, 0))

    each_kind(flag, add)

    @pl.when(flag & tile_lists.LAST != 0)
    def _():
        dq[...] = (static.scale * turned(dq_sum[...], q_at, turning, -1.0)).astype(dq.dtype)


def _dkv_kernel(own, other, flags, q, k, v, q_at, k_at, do, lse, delta, turning, outputs, scratch, *, static):
    (dk, dv), (dk_sum, dv_sum) = outputs, scratch
    flag, bundle = flags[pl.program_id(1)], pl.program_id(2)

    @pl.when((flag & tile_lists.FIRST != 0) & (bundle == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def add(masked: bool):
        s_kR = capped(dot(k[...], q[...], (1, 1)), static)
        seen = pairs_visible(static.rule, rows(q_at), columns(k_at)) if masked else None
        p_kR = probabilities(s_kR, lse[...], seen)
        dv_sum[...] += dot(p_kR.astype(do.dtype), do[...], (1, 0))
        ds_kR = score_gradients(static, s_kR, p_kR, dot(v[...], do[...], (1, 1)), delta[...])
        dk_sum[...] += dot(ds_kR.astype(q.dtype), q[...], (1, 0))

    each_kind(flag, add)

    @pl.when((flag & tile_lists.LAST != 0) & (bundle == pl.num_programs(2) - 1))
    def _():
        dk[...] = dk_sum[...].astype(dk.dtype)  # q is scaled here
        dv[...] = dv_sum[...].astype(dv.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(static: Static, in_place: int, q_NCRK, k_MkGK, v_MkGV, q_at, k_at, frequencies_3F, tiles):
    """in_place: of how many groups a program reads keys where they lie; 0: they are folded first."""
    return _forward(static, in_place, q_NCRK, k_MkGK, v_MkGV, q_at, k_at, frequencies_3F, tiles)[0]


def _forward(static: Static, in_place: int, q_NCRK, k_MkGK, v_MkGV, q_at, k_at, frequencies_3F, tiles: BothWays):
    N, C, R, K = q_NCRK.shape
    _, k, G, V = v_MkGV.shape
    groups, each, steps = in_place or 1, C // G, in_line(tiles.by_query)
    keys, values = (x if in_place else x.swapaxes(1, 2) for x in (k_MkGK, v_MkGV))

    # A place of the grid: (bundle of each of some groups, step).
    def of_heads(*shape):
        return pl.BlockSpec((None, groups, None, *shape), lambda c, s, own, *_: (own[s], c // each, c % each, 0, 0))

    def of_keys(*shape):
        if in_place:
            return pl.BlockSpec((None, k, groups, *shape), lambda c, s, own, other, *_: (other[s], 0, c // each, 0))
        return pl.BlockSpec((None, groups, k, *shape), lambda c, s, own, other, *_: (other[s], c // each, 0, 0))

    by_group = lambda x: x.reshape(N, G, each, *x.shape[2:])  # noqa: E731
    o_NGcRV, lse_NGc1R = call(
        "attention_forward",
        functools.partial(_forward_kernel, static=static, in_place=in_place),
        static,
        (C // groups, steps.count),
        steps,
        (
            (by_group(q_NCRK), of_heads(R, K)), (keys, of_keys(K)), (values, of_keys(V)),
            (q_at.swapaxes(1, 2), pl.BlockSpec((None, R, 4), lambda c, s, own, *_: (own[s], 0, 0))),
            (k_at, pl.BlockSpec((None, 4, k), lambda c, s, own, other, *_: (other[s], 0, 0))),
        ),
        turns(frequencies_3F, K),
        outputs=(
            (jax.ShapeDtypeStruct((N, G, each, R, V), q_NCRK.dtype), of_heads(R, V)),
            (jax.ShapeDtypeStruct((N, G, each, 1, R), jnp.float32), of_heads(1, R)),
        ),
        scratch=(
            pltpu.VMEM((groups, R, K), q_NCRK.dtype), sums(groups, R, V), sums(groups, R, LANES), sums(groups, R, LANES)
        ),
        vmem=STEP_VMEM if in_place else VMEM,
    )  # fmt: skip
    outputs = kept((o_NGcRV.reshape(N, C, R, V), lse_NGc1R.reshape(N, C, R)))
    return outputs, (q_NCRK, keys, values, q_at, k_at, frequencies_3F, tiles, *outputs)


def _backward(static: Static, in_place: int, residuals, cotangents):
    q_NCRK, *keys_and_values, q_at, k_at, frequencies_3F, tiles, o_NCRV, lse_NCR = residuals
    k_MGkK, v_MGkV = (x.swapaxes(1, 2) if in_place else x for x in keys_and_values)
    do_NCRV, dlse_NCR = cotangents
    _, C, R, K = q_NCRK.shape
    _, G, k, V = v_MGkV.shape
    lse_NCR, delta_NCR = of_rows(o_NCRV, lse_NCR, do_NCRV, dlse_NCR)

    def inputs(q_NCRK, of_queries, of_keys, q_at, k_at):
        return (
            (q_NCRK, of_queries(R, K)), (k_MGkK, of_keys(k, K)), (v_MGkV, of_keys(k, V)),
            (q_at, of_queries(*q_at.shape[1:], heads=False)), (k_at, of_keys(*k_at.shape[1:], heads=False)),
            (do_NCRV, of_queries(R, V)), (lse_NCR[:, :, None], of_queries(1, R)),
            (delta_NCR[:, :, None], of_queries(1, R)),
        )  # fmt: skip

    steps = in_line(tiles.by_query)
    of_queries, of_keys = blocks(bundle=lambda c, _: c, group=lambda c, _: c * G // C, own=QUERIES)
    dq_NCRK, turned_NCRK = call(
        "attention_dq",
        functools.partial(_dq_kernel, static=static),
        static,
        (C, steps.count),
        steps,
        inputs(q_NCRK, of_queries, of_keys, q_at.swapaxes(1, 2), k_at),
        turns(frequencies_3F, K),
        outputs=((q_NCRK, of_queries(R, K)),) * 2,
        scratch=(sums(R, K), sums(R, LANES), sums(R, LANES)),
    )
    each, steps = C // G, in_line(tiles.by_key)
    of_queries, of_keys = blocks(bundle=lambda g, _, c: g * each + c, group=lambda g, _, c: g, own=KEYS)
    dk_MGkK, dv_MGkV = call(
        "attention_dkv",
        functools.partial(_dkv_kernel, static=static),
        static,
        (G, steps.count, each),
        steps,
        inputs(turned_NCRK, of_queries, of_keys, q_at, k_at.swapaxes(1, 2)),
        None,
        outputs=((k_MGkK, of_keys(k, K)), (v_MGkV, of_keys(k, V))),
        scratch=(sums(k, K), sums(k, V)),
    )
    of_frequencies_3F = frequency_gradients(q_NCRK, dq_NCRK, q_at, frequencies_3F, heads=1)
    return dq_NCRK, dk_MGkK.swapaxes(1, 2), dv_MGkV.swapaxes(1, 2), None, None, of_frequencies_3F, None


_attend.defvjp(_forward, _backward)
