"""Attention over lists of non-empty tiles as Pallas kernels through Triton, for GPUs before Hopper.

A program walks the list of one tile, first the tiles that hide nothing, unmasked: the tiles of keys of a bundle of
query heads for the output and dq, the tiles of queries of a group of keys for dk and dv, computing each again. No two
programs write to one place, so every sum has one order. Triton takes powers of two only: a width such as 192 is read as
128 + 64, and tiles are cut into blocks that such widths leave room for. Keys are read where they lie. In a step of
decoding the queries of up to 64 branches and 4 heads (bfloat16, to width 128; else fewer) are one block, which reads
each key once for all of them. With limits a program looks up what two nodes show each other where it masks, and the
list of a step is dealt into parts, which are merged.

Queries are rotated before: folding copies them, and XLA rotates as it copies. Letters as in lab.kernels.folding, with
blocks for tiles; s is transposed for dk and dv, [k, R]. FlashAttention-2 (arXiv 2307.08691).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lab.coordinates import Coordinates
from lab.kernels import split
from lab.kernels.folding import fold_queries, key_tiles, unfold_queries, whole
from lab.kernels.pallas_common import MASKED, Static, capped, dot, fields, of_rows, probabilities, score_gradients
from lab.kernels.residuals import kept
from lab.kernels.rules import Rule, pairs_visible
from lab.kernels.tiles import BothWays, alike, cut, is_step, pad_to_tiles, plan_both_ways

try:
    from jax.experimental.pallas import triton
except ImportError:  # jax has announced that it will go
    triton = None

OBSTACLE = None if triton else f"needs the Triton lowering of Pallas, which jax {jax.__version__} no longer has"
LEAST = 16  # of each side of a product
BUNDLES, SLOTS = 4, 256  # of heads, about so many in a model; of a row, for each part of a list that is dealt
ALL = slice(None)
OF_QUERIES, OF_KEYS = 1, 2  # the axis of an array's heads; 0 is that of its tiles


class BlockSize(NamedTuple):
    """What a program holds at a time (rows: queries of one or several heads), and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int


# Bytes of a number -> the widest head -> its block: what compiles for 99 KiB of shared memory and spills next to no
# registers; float32 beyond 256 spills, and needs the 163 KiB of an A100. No GPU has timed any of it.
BLOCKS = {
    2: {
        128: BlockSize(64, 64, 4, 2),
        192: BlockSize(64, 32, 8, 1),
        256: BlockSize(32, 32, 8, 1),
        math.inf: BlockSize(16, 16, 8, 1),
    },
    4: {128: BlockSize(32, 32, 8, 1), math.inf: BlockSize(16, 16, 8, 1)},
}


# In a step of decoding: as many rows as there are registers for, since each block reads every key it sees.
STEP_BLOCKS = {
    2: {64: BlockSize(256, 32, 8, 2), 128: BlockSize(256, 32, 8, 1), 192: BlockSize(128, 32, 8, 1),
        256: BlockSize(128, 16, 8, 1), math.inf: BlockSize(32, 16, 8, 1)},
    4: {64: BlockSize(64, 32, 8, 1)},
}  # fmt: skip


def block_of(width: int, dtype, step: bool) -> BlockSize:
    """For heads of this width, in a step of decoding or else."""
    size = jnp.dtype(dtype).itemsize
    table = BLOCKS[size] | (STEP_BLOCKS[size] if step else {})
    return table[min(widest for widest in table if width <= widest)]


def tile_sizes(T: int, S: int) -> tuple[int, int]:
    """Tokens of a query tile and of a key tile, powers of two."""
    return tuple(min(64, max(LEAST, pl.next_power_of_2(length))) for length in (T, S))


def plan(rule: Rule, q_coordinates: Coordinates, k_coordinates: Coordinates, limits=None, lanes=False) -> BothWays:
    """The tile lists `attend` needs: made once per batch and rule, shared by layers.

    With limits the list of a step is dealt into parts, so that few rows have more programs. lanes: not read. All
    queries of a tile read what each alone sees.
    """
    (B, T), S = q_coordinates.shape, k_coordinates.shape[1]
    dealt = limits is not None and is_step(T, S)
    parts = max(1, min(split.PROGRAMS // (BUNDLES * B), S // SLOTS)) if dealt else 1
    return plan_both_ways(rule, q_coordinates, k_coordinates, *tile_sizes(T, S), limits, parts)


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
    *,
    interpret,
    limits=None,
):
    """Returns (o_BTHV, lse_BTH) as lab.kernels.reference.attend does."""
    by_query, by_key = plan(rule, q_coordinates, k_coordinates, limits) if tiles is None else tiles
    by_query = alike(by_query) if limits is not None and softcap else by_query
    B, T, H, K = q_BTHK.shape
    S, G, V = v_BSGV.shape[1:]
    q_tile, k_tile = tile_sizes(T, S)
    block = block_of(max(K, V), q_BTHK.dtype, is_step(T, S))
    q_size, k_size = min(q_tile, block.rows), min(k_tile, block.keys)
    C = H // math.gcd(H // G, block.rows // q_size)
    of_query, of_key = q_tile // q_size, k_tile // k_size
    q_BTHK, q_coordinates = whole(q_BTHK, q_tile, LEAST), pad_to_tiles(q_coordinates, q_tile)
    padded = q_BTHK.shape[1]
    count = by_query.keys.shape[1] * q_tile // padded
    for_each = lambda x: jnp.concatenate([x] * count, axis=1)  # noqa: E731  part: queries once more
    o_NCRV, lse_NCR = _attend(
        Static(rule, float(scale), float(softcap or 0.0), interpret),
        block,
        fold_queries(for_each(q_BTHK), q_size, C),
        key_tiles(whole(k_BSGK, k_tile, LEAST), k_size),
        key_tiles(whole(v_BSGV, k_tile, LEAST), k_size),
        fields(q_coordinates.map(for_each), q_size, H // C),
        fields(pad_to_tiles(k_coordinates, k_tile), k_size, 1),
        BothWays(cut(by_query, of_query, of_key), cut(by_key, of_key, of_query)),
        limits,
    )
    o_BTHV = unfold_queries(o_NCRV, B, count * padded, H)[..., :V]
    lse_BTH = unfold_queries(lse_NCR[..., None], B, count * padded, H)[..., 0]
    if count > 1:
        of_parts = [jnp.split(x, count, axis=1) for x in (o_BTHV, lse_BTH)]
        o_BTHV, lse_BTH = split.merge([*zip(*of_parts, strict=True)])
    return o_BTHV[:, :T], lse_BTH[:, :T]


def parts(width: int) -> list[slice]:
    """Slices of a multiple of 16 whose lengths are powers of two, the widest first."""
    slices, start = [], 0
    while start < width:
        end = start + (1 << (width - start).bit_length() - 1)
        slices.append(slice(start, end))
        start = end
    return slices


def _read(ref, *place) -> list:
    """The parts [n, part] of the rows at a place."""
    return [ref[(*place, part)] for part in parts(ref.shape[-1])]


def _write(ref, values) -> None:
    for part, value in zip(parts(ref.shape[-1]), values, strict=True):
        ref[:, part] = value.astype(ref.dtype)


def _zeros(ref) -> list:
    return [jnp.zeros((ref.shape[0], part.stop - part.start), jnp.float32) for part in parts(ref.shape[-1])]


def _products(a, b):
    """a b^T of rows in parts."""
    return sum(dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True))


def _plus(sums, weights, rows) -> list:
    """sums + weights rows, in parts."""
    return [x + dot(weights.astype(y.dtype), y, (1, 0)) for x, y in zip(sums, rows, strict=True)]


def _coordinates(ref, *place) -> Coordinates:
    return Coordinates(*(ref[(*place, field)] for field in range(ref.shape[-2])))


def _looked_up(tables):
    """What reads limits [1, M, M] of two nodes; None where there are none."""
    if not tables:
        return None
    (limits,) = tables
    return lambda q_node, k_node: limits[(0, *jnp.broadcast_arrays(q_node, k_node))]


def _column(x):
    return x[:, None]


def _row(x):
    return x[None, :]


def _over_list(others, full, total, add, carry):
    """carry after add(tile, masked, carry) for each tile of the list."""
    carry = lax.fori_loop(0, full[0], lambda x, carry: add(others[x], False, carry), carry)
    return lax.fori_loop(full[0], total[0], lambda x, carry: add(others[x], True, carry), carry)


def _forward_kernel(others, full, total, q, q_at, k, v, k_at, *rest, static):
    *tables, o, lse = rest
    limits = _looked_up(tables)
    q_RK, q_R1 = _read(q, ALL), _coordinates(q_at).map(_column)

    def add(j, masked, carry):
        o_RV, top_R, sum_R = carry
        s_Rk = capped(_products(q_RK, _read(k, j, ALL)), static)
        if masked:
            seen_Rk = pairs_visible(static.rule, q_R1, _coordinates(k_at, j).map(_row), limits)
            s_Rk = jnp.where(seen_Rk, s_Rk, MASKED)
        new_R = jnp.maximum(top_R, s_Rk.max(1))
        p_Rk, shrink_R = jnp.exp(s_Rk - _column(new_R)), jnp.exp(top_R - new_R)
        o_RV = _plus([_column(shrink_R) * part for part in o_RV], p_Rk, _read(v, j, ALL))
        return o_RV, new_R, sum_R * shrink_R + p_Rk.sum(1)

    start = _zeros(o), jnp.full(lse.shape, MASKED, jnp.float32), jnp.zeros(lse.shape, jnp.float32)
    o_RV, top_R, sum_R = _over_list(others, full, total, add, start)
    # A row that saw nothing has kept its first maximum, or has summed exp(0) over hidden keys.
    saw_R = (top_R > MASKED) & (_coordinates(q_at).segment >= 0)
    sum_R = jnp.where(saw_R, sum_R, 1)
    _write(o, [jnp.where(_column(saw_R), part / _column(sum_R), 0) for part in o_RV])
    lse[...] = jnp.where(saw_R, top_R + jnp.log(sum_R), -jnp.inf)


def _dq_kernel(others, full, total, q, do, lse, delta, q_at, k, v, k_at, *rest, static):
    *tables, dq = rest
    limits = _looked_up(tables)
    q_RK, do_RV, q_R1 = _read(q, ALL), _read(do, ALL), _coordinates(q_at).map(_column)
    lse_R1, delta_R1 = _column(lse[...]), _column(delta[...])

    def add(j, masked, dq_RK):
        k_kK = _read(k, j, ALL)
        s_Rk = capped(_products(q_RK, k_kK), static)
        seen = pairs_visible(static.rule, q_R1, _coordinates(k_at, j).map(_row), limits) if masked else None
        p_Rk = probabilities(s_Rk, lse_R1, seen)
        ds_Rk = score_gradients(static, s_Rk, p_Rk, _products(do_RV, _read(v, j, ALL)), delta_R1)
        return _plus(dq_RK, ds_Rk, k_kK)

    dq_RK = _over_list(others, full, total, add, _zeros(dq))
    _write(dq, [static.scale * part for part in dq_RK])


def _dkv_kernel(others, full, total, k, v, k_at, q, do, lse, delta, q_at, *rest, static):
    *tables, dk, dv = rest
    limits = _looked_up(tables)
    k_kK, v_kV, k_k1 = _read(k, ALL), _read(v, ALL), _coordinates(k_at).map(_column)

    def add_bundle(c, carry):
        def add(i, masked, carry):
            dk_kK, dv_kV = carry
            q_RK, do_RV = _read(q, i, c, ALL), _read(do, i, c, ALL)
            s_kR = capped(_products(k_kK, q_RK), static)
            seen = pairs_visible(static.rule, _coordinates(q_at, i).map(_row), k_k1, limits) if masked else None
            p_kR = probabilities(s_kR, _row(lse[i, c]), seen)
            ds_kR = score_gradients(static, s_kR, p_kR, _products(v_kV, do_RV), _row(delta[i, c]))
            return _plus(dk_kK, ds_kR, q_RK), _plus(dv_kV, p_kR, do_RV)

        return _over_list(others, full, total, add, carry)

    dk_kK, dv_kV = lax.fori_loop(0, q.shape[1], add_bundle, (_zeros(dk), _zeros(dv)))
    _write(dk, dk_kK)  # q was scaled before the scores
    _write(dv, dv_kV)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(static: Static, block: BlockSize, q_NCRK, k_MkGK, v_MkGV, q_at, k_at, tiles, limits):
    return _forward(static, block, q_NCRK, k_MkGK, v_MkGV, q_at, k_at, tiles, limits)[0]


def _forward(static: Static, block: BlockSize, q_NCRK, k_MkGK, v_MkGV, q_at, k_at, tiles: BothWays, limits):
    q_NCRK = (q_NCRK * static.scale).astype(q_NCRK.dtype)
    N, C, R, _ = q_NCRK.shape
    outputs = _call(
        functools.partial(_forward_kernel, static=static),
        (static.interpret, block),
        (tiles.by_query, limits),
        own=((q_NCRK, OF_QUERIES), (q_at, None)),
        others=((k_MkGK, OF_KEYS), (v_MkGV, OF_KEYS), (k_at, None)),
        outputs=(
            (jax.ShapeDtypeStruct((N, C, R, v_MkGV.shape[3]), q_NCRK.dtype), OF_QUERIES),
            (jax.ShapeDtypeStruct((N, C, R), jnp.float32), OF_QUERIES),
        ),
    )
    outputs = kept(outputs)
    return outputs, (q_NCRK, k_MkGK, v_MkGV, q_at, k_at, tiles, limits, *outputs)


def _backward(static: Static, block: BlockSize, residuals, cotangents):
    q_NCRK, k_MkGK, v_MkGV, q_at, k_at, tiles, limits, o_NCRV, lse_NCR = residuals
    do_NCRV, dlse_NCR = cotangents
    rows = q_NCRK, do_NCRV, *of_rows(o_NCRV, lse_NCR, do_NCRV, dlse_NCR)
    keys = (k_MkGK, OF_KEYS), (v_MkGV, OF_KEYS), (k_at, None)
    (dq_NCRK,) = _call(
        functools.partial(_dq_kernel, static=static),
        (static.interpret, block),
        (tiles.by_query, limits),
        own=(*((x, OF_QUERIES) for x in rows), (q_at, None)),
        others=keys,
        outputs=((q_NCRK, OF_QUERIES),),
    )
    G = k_MkGK.shape[2]
    of_groups = [(x.reshape(x.shape[0], G, -1, *x.shape[2:]), OF_QUERIES) for x in rows]
    dk_MkGK, dv_MkGV = _call(
        functools.partial(_dkv_kernel, static=static),
        (static.interpret, block),
        (tiles.by_key, limits),
        own=keys,
        others=(*of_groups, (q_at, None)),
        outputs=keys[:2],
    )
    return dq_NCRK, dk_MkGK, dv_MkGV, None, None, None, None


_attend.defvjp(_forward, _backward)


def _call(kernel, compiled: tuple[bool, BlockSize], seen: tuple, own, others, outputs):
    """Runs kernel(list, full, total, *own, *others, *limits, *outputs) for each tile and head of own[0].

    seen: the lists, and limits [B, M, M] or None, of which a program has those of its row.

    Of each (array [tiles, ..], axis of its heads or None) a program has one head, and one tile, or of others all tiles
    of its row of the batch. Where an array has fewer heads than own[0], several share one.
    """
    (interpret, block), (lists, limits) = compiled, seen
    tables = () if limits is None else (limits,)
    _, n, m = lists.keys.shape
    tiles, programs = len(own[0][0]), own[0][0].shape[own[0][1]]

    def spec(x, axis: int | None, count: int | None) -> pl.BlockSpec:
        def index(i, c):
            place = {0: i // n if count else i} | ({axis: c * x.shape[axis] // programs} if axis else {})
            return tuple(place.get(other, 0) for other in range(x.ndim))

        return pl.BlockSpec(
            tuple(count if i == 0 else None if i == axis else size for i, size in enumerate(x.shape)), index
        )

    one = pl.BlockSpec((1,), lambda i, c: (i,))
    run = pl.pallas_call(
        kernel,
        grid=(tiles, programs),
        in_specs=[
            pl.BlockSpec((None, m), lambda i, c: (i, 0)), one, one,
            *(spec(*x, None) for x in own), *(spec(*x, m) for x in others), *(spec(x, None, 1) for x in tables),
        ],
        out_specs=[spec(*x, None) for x in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        compiler_params=None if interpret else triton.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=interpret,
    )  # fmt: skip
    arrays = [x for x, _ in (*own, *others)]
    return run(lists.keys.reshape(-1, m), lists.full.reshape(-1), lists.total.reshape(-1), *arrays, *tables)
