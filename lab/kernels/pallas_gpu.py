"""Attention over lists of non-empty tiles as Pallas kernels for Hopper GPUs (Mosaic): forward, dq, and dk with dv.

A program has one query tile of a head (forward, dq) or one key tile of a group (dk with dv), and goes through the list
of that tile: first the tiles that hide nothing, then those that are masked. One warpgroup computes a tile while the
next is copied. The backward pass computes each tile again; no two programs add to one sum, so every sum has one order.
Tile sizes have not been tuned; at widths of 256 dk with dv outgrows the registers, and is slow.

b: row of the batch; h, g: head and group; i, j: query tile and key tile; q, k: tokens of a tile. What is named .._s
lies in shared memory. FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) on tile lists.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lab.coordinates import Coordinates
from lab.kernels.folding import whole
from lab.kernels.pallas_common import MASKED
from lab.kernels.rules import Rule, pairs_visible
from lab.kernels.tiles import BothWays, pad_to_tiles, plan_both_ways

TILE = 64  # tokens: the rows that a warpgroup multiplies at once
BUFFERS = 2  # one tile is computed while the next is copied
WIDTHS = (64, 128, 192, 256)  # swizzled rows are multiples of 64; no product is wider than 256
LOG2E = math.log2(math.e)
GRID = ("row", "head", "tile")


class Static(NamedTuple):
    """What the program is compiled for."""

    rule: Rule
    scale: float
    softcap: float
    q_tile: int
    k_tile: int


def tile_sizes(T: int, S: int) -> tuple[int, int]:
    """Tokens of a query tile and of a key tile."""
    return TILE, TILE


def refusal(K: int, V: int, dtype) -> str | None:
    """Why keys of width K with values of width V are not taken in this precision, or here; None if they are."""
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    if not capability.startswith("9."):
        return f"multiplies as only Hopper GPUs do (compute capability 9.0), and this one has {capability}"
    if dtype != jnp.bfloat16:
        return f"computes in bfloat16, and this is {jnp.dtype(dtype).name}"
    if not {K, V} <= {*WIDTHS}:
        return f"needs widths among {', '.join(map(str, WIDTHS))}, and these are {K} for keys and {V} for values"
    return None


def plan(rule: Rule, q_coordinates: Coordinates, k_coordinates: Coordinates) -> BothWays:
    """The tile lists `attend` needs: made once per batch and rule, shared by layers."""
    sizes = tile_sizes(q_coordinates.shape[1], k_coordinates.shape[1])
    return plan_both_ways(rule, q_coordinates, k_coordinates, *sizes)


def attend(q_BTHK, k_BSGK, v_BSGV, q_coordinates, k_coordinates, rule, scale, softcap, tiles: BothWays | None = None):
    """Returns (o_BTHV, lse_BTH) as lab.kernels.reference.attend does."""
    tiles = plan(rule, q_coordinates, k_coordinates) if tiles is None else tiles
    T = q_BTHK.shape[1]
    q_tile, k_tile = tile_sizes(T, k_BSGK.shape[1])
    o_BTHV, lse_BHT = _attend(
        Static(rule, float(scale), float(softcap or 0.0), q_tile, k_tile),
        whole(q_BTHK, q_tile),
        whole(k_BSGK, k_tile),
        whole(v_BSGV, k_tile),
        _fields(pad_to_tiles(q_coordinates, q_tile)),
        _fields(pad_to_tiles(k_coordinates, k_tile)),
        tiles,
    )
    return o_BTHV[:, :T], lse_BHT.swapaxes(1, 2)[:, :T]


def _fields(coordinates: Coordinates):
    """int32 [B, 4, T]"""
    return jnp.stack(jax.tree.leaves(coordinates), axis=1)


def _dot(a_s, b_s):
    """a @ b in float32."""

    def multiply(sums):
        plgpu.wgmma(sums, a_s, b_s)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((a_s.shape[0], b_s.shape[1]), jnp.float32))


def _add_dot(sums, a, b_s):
    """sums + a @ b, where a is a value."""
    return pl.run_state(lambda sums: plgpu.wgmma(sums, a, b_s))(plgpu.ACC.init(sums))


def _transposed(x_s):
    return x_s.transpose((1, 0))


def _by_row(x):
    """Laid out as a sum over columns is."""
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))


def _by_column(x):
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(0))


def _rows(x, shape):
    """A number for each row, as a matrix."""
    return lax.broadcast_in_dim(_by_row(x), shape, (0,))


def _columns(x, shape):
    """A number for each column, as a matrix."""
    return lax.broadcast_in_dim(_by_column(x), shape, (1,))


def _zeros(*shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _seen(rule: Rule, q_at_s, k_at_s, of_queries, of_keys, shape):
    """Who sees whom, as a matrix; coordinates [4, n] of queries and keys, and which of them are rows."""
    spread = lambda at_s, over: Coordinates(*(over(at_s[i], shape) for i in range(4)))  # noqa: E731
    return pairs_visible(rule, spread(q_at_s, of_queries), spread(k_at_s, of_keys))


def _tanh(x):
    """Through the exponential: the instruction for tanh is off by 2^-11."""
    return 1 - 2 / (jnp.exp2(2 * LOG2E * x) + 1)


def _scores(dot, static: Static):
    """Scaled and capped, in base 2."""
    if static.softcap:
        return LOG2E * static.softcap * _tanh(static.scale / static.softcap * dot)
    return LOG2E * static.scale * dot


def _before_cap(ds, s, static: Static):
    """The gradient of scores before they were capped."""
    return ds * (1 - jnp.square(s / (LOG2E * static.softcap))) if static.softcap else ds


def _copy(sources, targets_s, arrived) -> None:
    """Starts copies; each arrives at the barrier."""
    for source, target_s in zip(sources, targets_s, strict=True):
        plgpu.copy_gmem_to_smem(source, target_s, arrived)


def _write(*pairs) -> None:
    """Copies results (from, to) out of shared memory."""
    plgpu.commit_smem()
    for source_s, target in pairs:
        plgpu.copy_smem_to_gmem(source_s, target)
    plgpu.wait_smem_to_gmem(0)


def _over_list(full, total, sources, buffers, arrived, add, sums):
    """sums after add(masked, sums, *copies) for each of `total` steps, the first `full` of them without a mask.

    copies: of what sources(step) names. buffers: BUFFERS of each of them; arrived: a barrier for each buffer.
    """

    def start(step):
        turn = lax.rem(step, BUFFERS)
        _copy(sources(step), [x_s.at[turn] for x_s in buffers], arrived.at[turn])

    def take(step, sums, masked: bool):
        # The step before this one has read its buffer: it has waited for its products, and commits what else it read.
        plgpu.commit_smem()
        pl.when(step + 1 < total)(lambda: start(step + 1))
        turn = lax.rem(step, BUFFERS)
        plgpu.barrier_wait(arrived.at[turn])
        return add(masked, sums, *(x_s.at[turn] for x_s in buffers))

    pl.when(total > 0)(lambda: start(jnp.int32(0)))
    sums = lax.fori_loop(0, full, functools.partial(take, masked=False), sums)
    return lax.fori_loop(full, total, functools.partial(take, masked=True), sums)


def _place():
    """What this program computes: (row of the batch, head or group, tile)."""
    return tuple(lax.axis_index(name) for name in GRID)


def _forward_kernel(
    q, k, v, q_at, k_at, keys, full, total, o, lse, own, own_arrived, streamed, arrived, o_s, lse_s, *, static
):
    b, h, i = _place()
    g = lax.div(h, q.shape[2] // k.shape[2])
    queries, shape = pl.ds(i * static.q_tile, static.q_tile), (static.q_tile, static.k_tile)
    q_s, q_at_s = own
    _copy((q.at[b, queries, h], q_at.at[b, :, queries]), own, own_arrived)

    def sources(step):
        tile = pl.ds(keys[b, i, step] * static.k_tile, static.k_tile)
        return k.at[b, tile, g], v.at[b, tile, g], k_at.at[b, :, tile]

    def add(masked, sums, k_s, v_s, k_at_s):
        o_qV, top_q, sum_q = sums
        s_qk = _scores(_dot(q_s, _transposed(k_s)), static)
        if masked:
            s_qk = jnp.where(_seen(static.rule, q_at_s, k_at_s, _rows, _columns, shape), s_qk, MASKED)
        new_q = jnp.maximum(top_q, s_qk.max(1))
        p_qk, shrink_q = jnp.exp2(s_qk - _rows(new_q, shape)), jnp.exp2(top_q - new_q)
        o_qV = _add_dot(o_qV * _rows(shrink_q, o_qV.shape), p_qk.astype(v.dtype), v_s)
        return o_qV, new_q, sum_q * shrink_q + p_qk.sum(1)

    plgpu.barrier_wait(own_arrived)
    nothing = jnp.zeros(static.q_tile, jnp.float32)
    start = _zeros(static.q_tile, v.shape[3]), _by_row(nothing + MASKED), _by_row(nothing)
    o_qV, top_q, sum_q = _over_list(full[b, i], total[b, i], sources, streamed, arrived, add, start)
    # A row that saw nothing has kept its first maximum, or has summed exp2(0) over hidden keys.
    saw_q = (top_q > MASKED) & (_by_row(q_at_s[0]) >= 0)
    sum_q = jnp.where(saw_q, sum_q, 1)
    o_s[...] = (o_qV * _rows(jnp.where(saw_q, 1 / sum_q, 0), o_qV.shape)).astype(o.dtype)
    lse_s[...] = jnp.where(saw_q, top_q / LOG2E + jnp.log(sum_q), -jnp.inf)
    _write((o_s, o.at[b, queries, h]), (lse_s, lse.at[b, h, queries]))


def _dq_kernel(
    q, k, v, q_at, k_at, do, lse, delta, keys, full, total, dq, own, own_arrived, streamed, arrived, *, static
):
    b, h, i = _place()
    g = lax.div(h, q.shape[2] // k.shape[2])
    queries, shape = pl.ds(i * static.q_tile, static.q_tile), (static.q_tile, static.k_tile)
    q_s, do_s, q_at_s, lse_s, delta_s = own
    of_queries = q.at[b, queries, h], do.at[b, queries, h], q_at.at[b, :, queries]
    _copy((*of_queries, lse.at[b, h, queries], delta.at[b, h, queries]), own, own_arrived)

    def sources(step):
        tile = pl.ds(keys[b, i, step] * static.k_tile, static.k_tile)
        return k.at[b, tile, g], v.at[b, tile, g], k_at.at[b, :, tile]

    def add(masked, dq_qK, k_s, v_s, k_at_s):
        s_qk = _scores(_dot(q_s, _transposed(k_s)), static)
        p_qk = jnp.exp2(s_qk - _rows(lse_s[...], shape))
        if masked:
            p_qk = jnp.where(_seen(static.rule, q_at_s, k_at_s, _rows, _columns, shape), p_qk, 0)
        ds_qk = p_qk * (_dot(do_s, _transposed(v_s)) - _rows(delta_s[...], shape))
        return _add_dot(dq_qK, _before_cap(ds_qk, s_qk, static).astype(k.dtype), k_s)

    plgpu.barrier_wait(own_arrived)
    start = _zeros(static.q_tile, q.shape[3])
    dq_qK = _over_list(full[b, i], total[b, i], sources, streamed, arrived, add, start)
    q_s[...] = (static.scale * dq_qK).astype(dq.dtype)  # q has been read
    _write((q_s, dq.at[b, queries, h]))


def _dkv_kernel(
    q, k, v, q_at, k_at, do, lse, delta, queries, full, total, dk, dv,
    own, own_arrived, streamed, arrived, *, static
):  # fmt: skip
    b, g, j = _place()
    heads = q.shape[2] // k.shape[2]
    keys, shape = pl.ds(j * static.k_tile, static.k_tile), (static.k_tile, static.q_tile)
    k_s, v_s, k_at_s = own
    _copy((k.at[b, keys, g], v.at[b, keys, g], k_at.at[b, :, keys]), own, own_arrived)

    def sources(step):  # all heads of a tile, then the next tile
        h = g * heads + lax.rem(step, heads)
        tile = pl.ds(queries[b, j, lax.div(step, heads)] * static.q_tile, static.q_tile)
        return q.at[b, tile, h], do.at[b, tile, h], q_at.at[b, :, tile], lse.at[b, h, tile], delta.at[b, h, tile]

    def add(masked, sums, q_s, do_s, q_at_s, lse_s, delta_s):
        dk_kK, dv_kV = sums
        s_kq = _scores(_dot(k_s, _transposed(q_s)), static)
        p_kq = jnp.exp2(s_kq - _columns(lse_s[...], shape))
        if masked:
            p_kq = jnp.where(_seen(static.rule, q_at_s, k_at_s, _columns, _rows, shape), p_kq, 0)
        dv_kV = _add_dot(dv_kV, p_kq.astype(do.dtype), do_s)
        ds_kq = p_kq * (_dot(v_s, _transposed(do_s)) - _columns(delta_s[...], shape))
        return _add_dot(dk_kK, _before_cap(ds_kq, s_kq, static).astype(q.dtype), q_s), dv_kV

    plgpu.barrier_wait(own_arrived)
    start = _zeros(static.k_tile, k.shape[3]), _zeros(static.k_tile, v.shape[3])
    dk_kK, dv_kV = _over_list(full[b, j] * heads, total[b, j] * heads, sources, streamed, arrived, add, start)
    k_s[...] = (static.scale * dk_kK).astype(dk.dtype)  # k and v have been read
    v_s[...] = dv_kV.astype(dv.dtype)
    _write((k_s, dk.at[b, keys, g]), (v_s, dv.at[b, keys, g]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, q_BTHK, k_BSGK, v_BSGV, q_at, k_at, tiles):
    return _forward(static, q_BTHK, k_BSGK, v_BSGV, q_at, k_at, tiles)[0]


def _forward(static: Static, q_BTHK, k_BSGK, v_BSGV, q_at, k_at, tiles: BothWays):
    B, T, H, _ = q_BTHK.shape
    q, k = static.q_tile, static.k_tile
    inputs = q_BTHK, k_BSGK, v_BSGV, q_at, k_at
    o_qV = jax.ShapeDtypeStruct((q, v_BSGV.shape[3]), q_BTHK.dtype)
    outputs = _call(
        _forward_kernel,
        static,
        (B, H, T // q),
        (*inputs, *tiles.by_query),
        outputs=(
            jax.ShapeDtypeStruct((B, T, H, o_qV.shape[1]), o_qV.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
        own=(_tile(q_BTHK, q), _coordinates(q)),
        streamed=(_tile(k_BSGK, k), _tile(v_BSGV, k), _coordinates(k)),
        results=(o_qV, _numbers(q)),
    )
    return outputs, (*inputs, tiles, *outputs)


def _backward(static: Static, residuals, cotangents):
    *inputs, tiles, o_BTHV, lse_BHT = residuals
    do_BTHV, dlse_BHT = cotangents
    q_BTHK, k_BSGK, v_BSGV, *_ = inputs
    (B, T, H, _), (_, S, G, _) = q_BTHK.shape, k_BSGK.shape
    q, k = static.q_tile, static.k_tile
    saw_BHT = lse_BHT > -jnp.inf
    delta_BTH = (o_BTHV.astype(jnp.float32) * do_BTHV.astype(jnp.float32)).sum(-1)
    delta_BHT = delta_BTH.swapaxes(1, 2) - jnp.where(saw_BHT, dlse_BHT, 0)
    lse_BHT = jnp.where(saw_BHT, LOG2E * lse_BHT, jnp.inf)  # rows that saw nothing: every probability is 0
    inputs = *inputs, do_BTHV, lse_BHT, delta_BHT
    of_queries = _tile(q_BTHK, q), _tile(do_BTHV, q), _coordinates(q), _numbers(q), _numbers(q)
    of_keys = _tile(k_BSGK, k), _tile(v_BSGV, k), _coordinates(k)
    (dq_BTHK,) = _call(
        _dq_kernel,
        static,
        (B, H, T // q),
        (*inputs, *tiles.by_query),
        outputs=(q_BTHK,),
        own=of_queries,
        streamed=of_keys,
    )
    dk_BSGK, dv_BSGV = _call(
        _dkv_kernel,
        static,
        (B, G, S // k),
        (*inputs, *tiles.by_key),
        outputs=(k_BSGK, v_BSGV),
        own=of_keys,
        streamed=of_queries,
    )
    return dq_BTHK, dk_BSGK, dv_BSGV, None, None, None


_attend.defvjp(_forward, _backward)


def _tile(x_BTHK, tokens: int):
    return jax.ShapeDtypeStruct((tokens, x_BTHK.shape[3]), x_BTHK.dtype)


def _coordinates(tokens: int):
    return jax.ShapeDtypeStruct((4, tokens), jnp.int32)


def _numbers(tokens: int):
    return jax.ShapeDtypeStruct((tokens,), jnp.float32)


def _shared(x, *buffers: int):
    """Shared memory for arrays like x; bfloat16 is tiled and swizzled as products want it."""
    matrix = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM((*buffers, *x.shape), x.dtype, transforms=matrix if x.dtype == jnp.bfloat16 else ())


def _call(kernel, static: Static, grid: tuple, inputs, outputs, own, streamed, results=()):
    """Runs a kernel. inputs: arrays; outputs: like what. In shared memory, each like what:

    own: copied once; streamed: copied for each step; results: copied out.
    """
    run = plgpu.kernel(
        functools.partial(kernel, static=static),
        kernel_name=kernel.__name__.strip("_"),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs),
        grid=grid,
        grid_names=GRID,
        scratch_types=(
            tuple(_shared(x) for x in own),
            plgpu.Barrier(num_arrivals=len(own)),
            tuple(_shared(x, BUFFERS) for x in streamed),
            plgpu.Barrier(num_arrivals=len(streamed), num_barriers=BUFFERS),
            *map(_shared, results),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return run(*inputs)
