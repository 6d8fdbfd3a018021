"""Attention over lists of non-empty tiles as Pallas kernels for GPUs from Hopper on (Mosaic): forward, dq, dk with dv.

A program has one query tile of one head (forward, dq), or one key tile of one group (dk and dv), and walks the tiles
of its list: first those that hide nothing, then those that are masked. Copies of the next tile run while this one is
computed. Scores, probabilities and sums stay in the registers of one warpgroup; every sum has one order.

q and k: tokens of a tile; a number for each of them is a row or a column of a matrix of theirs. Scores are kept in
base 2. FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) on tile lists.
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
from lab.kernels.rules import Rule, pairs_visible
from lab.kernels.tiles import BothWays, both_ways, make_tiles, pad_to_tiles

MASKED = -1e30  # not -inf: a tile may hide every key of a query, and inf - inf is nan
TILE = 64  # tokens: the rows that a warpgroup multiplies at once
BUFFERS = 2  # one tile is computed while the next is copied
WIDTHS = (64, 128, 192, 256)  # what rows of 128 bytes make up, and one instruction multiplies
LOG2E = math.log2(math.e)
GRID = ("row", "head", "tile")
BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


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
    """Why keys of width K and values of width V cannot be taken, or None if they can."""
    if dtype != jnp.bfloat16:
        return f"takes bfloat16, and this is {jnp.dtype(dtype).name}"
    if K not in WIDTHS or V not in WIDTHS:
        return f"takes heads of width {', '.join(map(str, WIDTHS))}, and these are {K} (keys) and {V} (values)"
    return None


def plan(rule: Rule, q_coordinates: Coordinates, k_coordinates: Coordinates) -> BothWays:
    """The tile lists `attend` needs: made once per batch and rule, shared by layers."""
    q_tile, k_tile = tile_sizes(q_coordinates.shape[1], k_coordinates.shape[1])
    padded = pad_to_tiles(q_coordinates, q_tile), pad_to_tiles(k_coordinates, k_tile)
    return both_ways(make_tiles(rule, *padded, q_tile, k_tile))


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
):
    """Returns (o_BTHV, lse_BTH) as lab.kernels.reference.attend does."""
    tiles = plan(rule, q_coordinates, k_coordinates) if tiles is None else tiles
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    q_tile, k_tile = tile_sizes(T, S)
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


def _dot(a, b):
    """a @ b in float32; b, and a unless it is a value, lie in shared memory."""

    def multiply(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _add_dot(sums, a, b):
    """sums + a @ b"""
    return pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(plgpu.ACC.init(sums))


def _transposed(ref):
    return plgpu.transpose_ref(ref, (1, 0))


def _load(ref, layout):
    return plgpu.load(ref, (), layout=layout, optimized=False)


def _coordinates(ref, layout) -> Coordinates:
    """The fields of a block [4, n]."""
    return Coordinates(*(_load(ref.at[i], layout) for i in range(4)))


def _rows(x, shape):
    """A number for each row, as a matrix."""
    return lax.broadcast_in_dim(x, shape, (0,))


def _columns(x, shape):
    """A number for each column, as a matrix."""
    return lax.broadcast_in_dim(x, shape, (1,))


def _constant(value: float, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _zeros(*shape):
    return _constant(0, shape, plgpu.Layout.WGMMA)


def _tanh(x):
    """Through the exponential: the instruction for tanh is off by 2^-11."""
    return 1 - 2 / (jnp.exp2(2 * LOG2E * x) + 1)


def _scores(dot, static: Static):
    """Scaled and capped, in base 2."""
    if static.softcap:
        return static.softcap * LOG2E * _tanh(dot * (static.scale / static.softcap))
    return dot * (static.scale * LOG2E)


def _before_cap(ds, s, static: Static):
    """The gradient of scores before they were capped."""
    return ds * (1 - jnp.square(s / (static.softcap * LOG2E))) if static.softcap else ds


def _over_list(full, total, copies, ready, add, sums):
    """sums after add(step, buffer, masked, sums) for each of `total` steps, the first `full` of them without a mask.

    copies(step, buffer): (from, to) of what a step reads. ready: for each buffer, a barrier that they arrive at.
    """

    def fetch(step):
        buffer = lax.rem(step, BUFFERS)
        for source, target in copies(step, buffer):
            plgpu.copy_gmem_to_smem(source, target, ready.at[buffer])

    def body(step, sums, masked: bool):
        # The other buffer is free: the step before has waited for its products.
        pl.when(step + 1 < total)(lambda: fetch(step + 1))
        buffer = lax.rem(step, BUFFERS)
        plgpu.barrier_wait(ready.at[buffer])
        return add(step, buffer, masked, sums)

    pl.when(total > 0)(lambda: fetch(jnp.int32(0)))
    sums = lax.fori_loop(0, full, functools.partial(body, masked=False), sums)
    return lax.fori_loop(full, total, functools.partial(body, masked=True), sums)


def _store(*pairs) -> None:
    """Copies (from shared memory, to) out, and waits."""
    plgpu.commit_smem()
    for source, target in pairs:
        plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)


def _place():
    """(row of the batch, head or group, tile) of this program."""
    return tuple(lax.axis_index(name) for name in GRID)


def _forward_kernel(
    q, k, v, q_at, k_at, keys, full, total, o, lse, q_s, k_s, v_s, k_at_s, o_s, lse_s, here, ready, *, static
):
    b, h, i = _place()
    g = lax.div(h, q.shape[2] // k.shape[2])
    queries, shape = pl.ds(i * static.q_tile, static.q_tile), (static.q_tile, static.k_tile)
    plgpu.copy_gmem_to_smem(q.at[b, queries, h], q_s, here)
    q_at_q = _coordinates(q_at.at[b, :, queries], BY_ROW)

    def copies(step, buffer):
        tile = pl.ds(keys[b, i, step] * static.k_tile, static.k_tile)
        return (
            (k.at[b, tile, g], k_s.at[buffer]),
            (v.at[b, tile, g], v_s.at[buffer]),
            (k_at.at[b, :, tile], k_at_s.at[buffer]),
        )

    def add(step, buffer, masked, sums):
        o_qV, top_q, sum_q = sums
        s_qk = _scores(_dot(q_s, _transposed(k_s.at[buffer])), static)
        if masked:
            s_qk = jnp.where(_seen(static, q_at_q, _coordinates(k_at_s.at[buffer], BY_COLUMN), shape), s_qk, MASKED)
        new_q = jnp.maximum(top_q, s_qk.max(1))
        p_qk, shrink_q = jnp.exp2(s_qk - _rows(new_q, shape)), jnp.exp2(top_q - new_q)
        o_qV = _add_dot(o_qV * _rows(shrink_q, o_qV.shape), p_qk.astype(v.dtype), v_s.at[buffer])
        return o_qV, new_q, sum_q * shrink_q + p_qk.sum(1)

    plgpu.barrier_wait(here)
    start = (
        _zeros(static.q_tile, v.shape[3]),
        _constant(MASKED, (static.q_tile,), BY_ROW),
        _constant(0, (static.q_tile,), BY_ROW),
    )
    o_qV, top_q, sum_q = _over_list(full[b, i], total[b, i], copies, ready, add, start)
    # A row that saw nothing has kept its first maximum, or has summed exp2(0) over hidden keys.
    saw_q = (top_q > MASKED) & (q_at_q.segment >= 0)
    sum_q = jnp.where(saw_q, sum_q, 1)
    o_s[...] = (o_qV * _rows(jnp.where(saw_q, 1 / sum_q, 0), o_qV.shape)).astype(o.dtype)
    lse_s[...] = jnp.where(saw_q, top_q / LOG2E + jnp.log(sum_q), -jnp.inf)
    _store((o_s, o.at[b, queries, h]), (lse_s, lse.at[b, h, queries]))


def _seen(static: Static, q_at: Coordinates, k_at: Coordinates, shape, q_as=_rows, k_as=_columns):
    """Whether the query of a row sees the key of a column."""
    return pairs_visible(static.rule, q_at.map(lambda x: q_as(x, shape)), k_at.map(lambda x: k_as(x, shape)))


def _dq_kernel(
    q, k, v, q_at, k_at, keys, full, total, do, lse, delta, dq, q_s, do_s, k_s, v_s, k_at_s, here, ready, *, static
):
    b, h, i = _place()
    g = lax.div(h, q.shape[2] // k.shape[2])
    queries, shape = pl.ds(i * static.q_tile, static.q_tile), (static.q_tile, static.k_tile)
    plgpu.copy_gmem_to_smem(q.at[b, queries, h], q_s, here)
    plgpu.copy_gmem_to_smem(do.at[b, queries, h], do_s, here)
    q_at_q = _coordinates(q_at.at[b, :, queries], BY_ROW)
    lse_q, delta_q = (_load(x.at[b, h, queries], BY_ROW) for x in (lse, delta))

    def copies(step, buffer):
        tile = pl.ds(keys[b, i, step] * static.k_tile, static.k_tile)
        return (
            (k.at[b, tile, g], k_s.at[buffer]),
            (v.at[b, tile, g], v_s.at[buffer]),
            (k_at.at[b, :, tile], k_at_s.at[buffer]),
        )

    def add(step, buffer, masked, dq_qK):
        s_qk = _scores(_dot(q_s, _transposed(k_s.at[buffer])), static)
        p_qk = jnp.exp2(s_qk - _rows(lse_q, shape))
        if masked:
            p_qk = jnp.where(_seen(static, q_at_q, _coordinates(k_at_s.at[buffer], BY_COLUMN), shape), p_qk, 0)
        ds_qk = p_qk * (_dot(do_s, _transposed(v_s.at[buffer])) - _rows(delta_q, shape))
        return _add_dot(dq_qK, _before_cap(ds_qk, s_qk, static).astype(k.dtype), k_s.at[buffer])

    plgpu.barrier_wait(here)
    dq_qK = _over_list(full[b, i], total[b, i], copies, ready, add, _zeros(static.q_tile, q.shape[3]))
    q_s[...] = (dq_qK * static.scale).astype(dq.dtype)
    _store((q_s, dq.at[b, queries, h]))


def _dkv_kernel(
    q, k, v, q_at, k_at, queries, full, total, do, lse, delta, dk, dv,
    k_s, v_s, q_s, do_s, q_at_s, lse_s, delta_s, here, ready, *, static,
):  # fmt: skip
    b, g, j = _place()
    heads = q.shape[2] // k.shape[2]
    keys, shape = pl.ds(j * static.k_tile, static.k_tile), (static.k_tile, static.q_tile)
    plgpu.copy_gmem_to_smem(k.at[b, keys, g], k_s, here)
    plgpu.copy_gmem_to_smem(v.at[b, keys, g], v_s, here)
    k_at_k = _coordinates(k_at.at[b, :, keys], BY_ROW)

    def copies(step, buffer):
        h = g * heads + lax.rem(step, heads)
        tile = pl.ds(queries[b, j, lax.div(step, heads)] * static.q_tile, static.q_tile)
        return (
            (q.at[b, tile, h], q_s.at[buffer]),
            (do.at[b, tile, h], do_s.at[buffer]),
            (q_at.at[b, :, tile], q_at_s.at[buffer]),
            (lse.at[b, h, tile], lse_s.at[buffer]),
            (delta.at[b, h, tile], delta_s.at[buffer]),
        )

    def add(step, buffer, masked, sums):
        dk_kK, dv_kV = sums
        s_kq = _scores(_dot(k_s, _transposed(q_s.at[buffer])), static)
        p_kq = jnp.exp2(s_kq - _columns(_load(lse_s.at[buffer], BY_COLUMN), shape))
        if masked:
            q_at_q = _coordinates(q_at_s.at[buffer], BY_COLUMN)
            p_kq = jnp.where(_seen(static, q_at_q, k_at_k, shape, q_as=_columns, k_as=_rows), p_kq, 0)
        dv_kV = _add_dot(dv_kV, p_kq.astype(do.dtype), do_s.at[buffer])
        delta_kq = _columns(_load(delta_s.at[buffer], BY_COLUMN), shape)
        ds_kq = p_kq * (_dot(v_s, _transposed(do_s.at[buffer])) - delta_kq)
        return _add_dot(dk_kK, _before_cap(ds_kq, s_kq, static).astype(q.dtype), q_s.at[buffer]), dv_kV

    plgpu.barrier_wait(here)
    start = _zeros(static.k_tile, k.shape[3]), _zeros(static.k_tile, v.shape[3])
    dk_kK, dv_kV = _over_list(full[b, j] * heads, total[b, j] * heads, copies, ready, add, start)
    k_s[...] = (dk_kK * static.scale).astype(dk.dtype)
    v_s[...] = dv_kV.astype(dv.dtype)
    _store((k_s, dk.at[b, keys, g]), (v_s, dv.at[b, keys, g]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, q_BTHK, k_BSGK, v_BSGV, q_at, k_at, tiles):
    return _forward(static, q_BTHK, k_BSGK, v_BSGV, q_at, k_at, tiles)[0]


def _forward(static: Static, q_BTHK, k_BSGK, v_BSGV, q_at, k_at, tiles: BothWays):
    B, T, H, K = q_BTHK.shape
    V, q, k = v_BSGV.shape[3], static.q_tile, static.k_tile
    inputs = q_BTHK, k_BSGK, v_BSGV, q_at, k_at
    outputs = _call(
        functools.partial(_forward_kernel, static=static),
        (B, H, T // q),
        (*inputs, *tiles.by_query),
        (jax.ShapeDtypeStruct((B, T, H, V), q_BTHK.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)),
        (_matrix(q, K),),
        (_matrix(k, K, BUFFERS), _matrix(k, V, BUFFERS), plgpu.SMEM((BUFFERS, 4, k), jnp.int32)),
        (_matrix(q, V), plgpu.SMEM((q,), jnp.float32)),
    )
    return outputs, (*inputs, tiles, *outputs)


def _backward(static: Static, residuals, cotangents):
    *inputs, tiles, o_BTHV, lse_BHT = residuals
    do_BTHV, dlse_BHT = cotangents
    q_BTHK, k_BSGK, v_BSGV = inputs[:3]
    B, T, H, K = q_BTHK.shape
    _, S, G, V = v_BSGV.shape
    q, k = static.q_tile, static.k_tile
    saw_BHT = lse_BHT > -jnp.inf
    delta_BTH = (o_BTHV.astype(jnp.float32) * do_BTHV.astype(jnp.float32)).sum(-1)
    delta_BHT = delta_BTH.swapaxes(1, 2) - jnp.where(saw_BHT, dlse_BHT, 0)
    lse_BHT = jnp.where(saw_BHT, lse_BHT * LOG2E, jnp.inf)  # rows that saw nothing: every probability is 0
    others = do_BTHV, lse_BHT, delta_BHT
    (dq_BTHK,) = _call(
        functools.partial(_dq_kernel, static=static),
        (B, H, T // q),
        (*inputs, *tiles.by_query, *others),
        (_like(q_BTHK),),
        (_matrix(q, K), _matrix(q, V)),
        (_matrix(k, K, BUFFERS), _matrix(k, V, BUFFERS), plgpu.SMEM((BUFFERS, 4, k), jnp.int32)),
    )
    numbers = plgpu.SMEM((BUFFERS, q), jnp.float32)
    dk_BSGK, dv_BSGV = _call(
        functools.partial(_dkv_kernel, static=static),
        (B, G, S // k),
        (*inputs, *tiles.by_key, *others),
        (_like(k_BSGK), _like(v_BSGV)),
        (_matrix(k, K), _matrix(k, V)),
        (
            _matrix(q, K, BUFFERS), _matrix(q, V, BUFFERS), plgpu.SMEM((BUFFERS, 4, q), jnp.int32),
            numbers, numbers,
        ),
    )  # fmt: skip
    return dq_BTHK, dk_BSGK, dv_BSGV, None, None, None


_attend.defvjp(_forward, _backward)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _matrix(rows: int, width: int, *buffers: int):
    """bfloat16 in shared memory, tiled and swizzled as products want it."""
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM((*buffers, rows, width), jnp.bfloat16, transforms=transforms)


def _call(kernel, grid: tuple, inputs, outputs, own, streamed, results=()):
    """Runs a kernel. Shared memory: own, copied once; streamed, copied for each step; results, copied out."""
    run = plgpu.kernel(
        kernel,
        out_type=outputs,
        grid=grid,
        grid_names=GRID,
        scratch_types=(
            *own, *streamed, *results,
            plgpu.Barrier(num_arrivals=len(own)),
            plgpu.Barrier(num_arrivals=len(streamed), num_barriers=BUFFERS),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )  # fmt: skip
    return run(*inputs)
