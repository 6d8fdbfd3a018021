"""Attention over lists of non-empty tiles as Pallas kernels for TPUs (Mosaic): forward, dq, and dk with dv.

A grid has one step for each tile of a list, whose numbers are prefetched scalars: nothing is spent on empty tiles, and
tiles that hide nothing are not masked. Heads of a group are folded into rows. The backward pass computes each tile
again, by query tile for dq and by key tile for dk and dv, so that every sum has one order.

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
from lab.kernels.folding import fold_keys, fold_queries, unfold_queries
from lab.kernels.pallas_common import MASKED, Static, capped, dot, fields, of_rows, probabilities, score_gradients
from lab.kernels.rotary import angles
from lab.kernels.rules import Rule, pairs_visible
from lab.kernels.tiles import BothWays, Steps, in_line, is_step, pad_to_tiles, plan_both_ways

LANES = 128
ROWS = 1024  # of a query tile, with its heads: what fits VMEM beside 512 keys and values of 128
STEPS = 2**16  # of a grid: three numbers for each, within the 1 MiB of SMEM
VMEM = 32 * 2**20  # of the 64 MiB or more that a core has
QUERIES, KEYS = "queries", "keys"


def tile_sizes(T: int, S: int) -> tuple[int, int]:
    """Tokens of a query tile and of a key tile: multiples of 128 lanes, but fewer queries in a step of decoding."""
    q_tile = -(-T // 16) * 16 if is_step(T, S) else min(256 if T <= 2**16 else 512, -(-T // LANES) * LANES)
    return q_tile, min(512, -(-S // LANES) * LANES)


def rows_at_once(B: int, T: int, S: int) -> int:
    """How many of B rows one call takes: a divisor; 0 where the list of a single one does not fit SMEM."""
    q_tile, k_tile = tile_sizes(T, S)
    each = -(-T // q_tile) * -(-S // k_tile)
    return max((b for b in range(1, B + 1) if B % b == 0 and b * each <= STEPS), default=0)


def heads_per_tile(R: int, q_tile: int, width: int, step: bool = False) -> int:
    """How many of the R heads that share keys a query tile holds: a divisor, within VMEM for heads of this width.

    Twice as many in a step of decoding, which reads keys once for each tile and has no more than one or two.
    """
    rows = (ROWS if width <= 256 else ROWS // 2) * (1 + step)
    return max(f for f in range(1, R + 1) if R % f == 0 and (f == 1 or f * q_tile <= rows))


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
    B, T, H, K = q_BTHK.shape
    rows = rows_at_once(B, T, k_BSGK.shape[1])
    if not rows:
        raise UserError(f"pallas_tpu takes no rows of {T} queries over {k_BSGK.shape[1]} keys; choose tiled")
    if rows < B:
        row_groups = jax.tree.map(
            lambda x: jnp.asarray(x).reshape(B // rows, rows, *x.shape[1:]),
            (q_BTHK, k_BSGK, v_BSGV, q_coordinates, k_coordinates, tiles),
        )
        some = lambda x: attend(*x[:5], rule, scale, softcap, x[5], frequencies_3F, interpret=interpret)  # noqa: E731
        return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), jax.lax.map(some, row_groups))
    G, V = k_BSGK.shape[2], v_BSGV.shape[3]
    q_tile, k_tile = tile_sizes(T, k_BSGK.shape[1])
    C = H // heads_per_tile(H // G, q_tile, max(K, V), is_step(T, k_BSGK.shape[1]))
    static = Static(rule, float(scale), float(softcap or 0.0), interpret)
    o_NCRV, lse_NCR = _attend(
        static,
        fold_queries(q_BTHK, q_tile, C),
        fold_keys(k_BSGK, k_tile),
        fold_keys(v_BSGV, k_tile),
        fields(pad_to_tiles(q_coordinates, q_tile), q_tile, H // C),
        fields(pad_to_tiles(k_coordinates, k_tile), k_tile, 1),
        None if frequencies_3F is None else (_widened(frequencies_3F, K), _partners(frequencies_3F.shape[1], K)),
        tiles,
    )
    return unfold_queries(o_NCRV, B, T, H), unfold_queries(lse_NCR[..., None], B, T, H)[..., 0]


def _widened(frequencies_3F, K: int):
    """Of each dimension of a head [3, K]: the same for both of a pair, 0 for those that do not rotate."""
    F = frequencies_3F.shape[1]
    return jnp.concatenate([jnp.zeros((3, K - 2 * F)), frequencies_3F, frequencies_3F], axis=1)


def _partners(F: int, K: int):
    """[K, K] that puts -b in the place of a, and a in that of b, of every pair: lanes cannot be cut anywhere."""
    a, b = K - 2 * F + jnp.arange(F), K - F + jnp.arange(F)
    return jnp.zeros((K, K)).at[b, a].set(-1).at[a, b].set(1)


def _rows(ref) -> Coordinates:
    """Coordinates [1, n] of a block [4, n]."""
    return Coordinates(*(ref[i : i + 1, :] for i in range(4)))


def _columns(ref) -> Coordinates:
    """Coordinates [n, 1] of a block [n, 4]."""
    return Coordinates(*(ref[:, i : i + 1] for i in range(4)))


def _across(row_1R):
    """[1, R] as a column [R, 1]."""
    return jnp.broadcast_to(row_1R, (LANES, row_1R.shape[1])).T[:, :1]


def _along(column_R1):
    """[R, 1] as a row [1, R]."""
    return jnp.broadcast_to(column_R1, (column_R1.shape[0], LANES)).T[:1]


def _each_kind(flag, add) -> None:
    """add(masked) for the tile of this step, if it has one."""
    pl.when(flag & tile_lists.ADD_FULL != 0)(lambda: add(False))
    pl.when(flag & tile_lists.ADD_PARTIAL != 0)(lambda: add(True))


def _turned(x_RK, q_at, turning, sign: float = 1.0):
    """Rotated by the angle of each row, or back by it; turning: None, or what `_widened` and `_partners` gave."""
    if turning is None:
        return x_RK
    frequencies, partners = turning
    angle_RK = angles(_columns(q_at), [frequencies[i : i + 1, :] for i in range(3)])
    return x_RK * jnp.cos(angle_RK) + sign * jnp.sin(angle_RK) * dot(x_RK, partners[...], (1, 0))


def _forward_kernel(own, other, flags, raw_q, k, v, q_at, k_at, turning, outputs, scratch, *, static):
    (o, lse), (q, o_sum, top, total) = outputs, scratch
    flag = flags[pl.program_id(1)]

    @pl.when(flag & tile_lists.FIRST != 0)
    def _():
        q[...] = (static.scale * _turned(raw_q[...].astype(jnp.float32), q_at, turning)).astype(q.dtype)
        o_sum[...] = jnp.zeros_like(o_sum)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    def add(masked: bool):
        s_Rk = capped(dot(q[...], k[...], (1, 1)), static)
        if masked:
            s_Rk = jnp.where(pairs_visible(static.rule, _columns(q_at), _rows(k_at)), s_Rk, MASKED)
        old_R1 = top[:, :1]
        new_R1 = jnp.maximum(old_R1, s_Rk.max(1, keepdims=True))
        p_Rk, shrink_R1 = jnp.exp(s_Rk - new_R1), jnp.exp(old_R1 - new_R1)
        top[...] = jnp.broadcast_to(new_R1, top.shape)
        total[...] = jnp.broadcast_to(total[:, :1] * shrink_R1 + p_Rk.sum(1, keepdims=True), total.shape)
        o_sum[...] = o_sum[...] * shrink_R1 + dot(p_Rk.astype(v.dtype), v[...], (1, 0))

    _each_kind(flag, add)

    @pl.when(flag & tile_lists.LAST != 0)
    def _():
        # A row that saw nothing has kept its first maximum, or has summed exp(0) over hidden keys.
        saw_R1 = (top[:, :1] > MASKED) & (_columns(q_at).segment >= 0)
        sum_R1 = jnp.where(saw_R1, total[:, :1], 1)
        o[...] = jnp.where(saw_R1, o_sum[...] / sum_R1, 0).astype(o.dtype)
        lse[...] = _along(jnp.where(saw_R1, top[:, :1] + jnp.log(sum_R1), -jnp.inf))


def _dq_kernel(own, other, flags, raw_q, k, v, q_at, k_at, do, lse, delta, turning, outputs, scratch, *, static):
    (dq, q), (dq_sum, lse_R, delta_R) = outputs, scratch
    flag = flags[pl.program_id(1)]

    @pl.when(flag & tile_lists.FIRST != 0)
    def _():
        q[...] = (static.scale * _turned(raw_q[...].astype(jnp.float32), q_at, turning)).astype(q.dtype)
        dq_sum[...] = jnp.zeros_like(dq_sum)
        lse_R[...] = jnp.broadcast_to(_across(lse[...]), lse_R.shape)
        delta_R[...] = jnp.broadcast_to(_across(delta[...]), delta_R.shape)

    def add(masked: bool):
        s_Rk = capped(dot(q[...], k[...], (1, 1)), static)
        seen = pairs_visible(static.rule, _columns(q_at), _rows(k_at)) if masked else None
        p_Rk = probabilities(s_Rk, lse_R[:, :1], seen)
        ds_Rk = score_gradients(static, s_Rk, p_Rk, dot(do[...], v[...], (1, 1)), delta_R[:, :1])
        dq_sum[...] += dot(ds_Rk.astype(k.dtype), k[...], (1, 0))

    _each_kind(flag, add)

    @pl.when(flag & tile_lists.LAST != 0)
    def _():
        dq[...] = (static.scale * _turned(dq_sum[...], q_at, turning, -1.0)).astype(dq.dtype)


def _dkv_kernel(own, other, flags, q, k, v, q_at, k_at, do, lse, delta, turning, outputs, scratch, *, static):
    (dk, dv), (dk_sum, dv_sum) = outputs, scratch
    flag, bundle = flags[pl.program_id(1)], pl.program_id(2)

    @pl.when((flag & tile_lists.FIRST != 0) & (bundle == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def add(masked: bool):
        s_kR = capped(dot(k[...], q[...], (1, 1)), static)
        seen = pairs_visible(static.rule, _rows(q_at), _columns(k_at)) if masked else None
        p_kR = probabilities(s_kR, lse[...], seen)
        dv_sum[...] += dot(p_kR.astype(do.dtype), do[...], (1, 0))
        ds_kR = score_gradients(static, s_kR, p_kR, dot(v[...], do[...], (1, 1)), delta[...])
        dk_sum[...] += dot(ds_kR.astype(q.dtype), q[...], (1, 0))

    _each_kind(flag, add)

    @pl.when((flag & tile_lists.LAST != 0) & (bundle == pl.num_programs(2) - 1))
    def _():
        dk[...] = dk_sum[...].astype(dk.dtype)  # q is scaled here
        dv[...] = dv_sum[...].astype(dv.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, q_NCRK, k_MGkK, v_MGkV, q_at, k_at, turning, tiles):
    return _forward(static, q_NCRK, k_MGkK, v_MGkV, q_at, k_at, turning, tiles)[0]


def _forward(static: Static, q_NCRK, k_MGkK, v_MGkV, q_at, k_at, turning, tiles: BothWays):
    N, C, R, K = q_NCRK.shape
    _, G, k, V = v_MGkV.shape
    steps = in_line(tiles.by_query)
    of_queries, of_keys = _blocks(bundle=lambda c, _: c, group=lambda c, _: c * G // C, own=QUERIES)
    o_NCRV, lse_NC1R = _call(
        "attention_forward",
        functools.partial(_forward_kernel, static=static),
        static,
        (C, steps.count),
        steps,
        (
            (q_NCRK, of_queries(R, K)), (k_MGkK, of_keys(k, K)), (v_MGkV, of_keys(k, V)),
            (q_at.swapaxes(1, 2), of_queries(R, 4, heads=False)), (k_at, of_keys(4, k, heads=False)),
        ),
        turning,
        outputs=(
            (jax.ShapeDtypeStruct((N, C, R, V), q_NCRK.dtype), of_queries(R, V)),
            (jax.ShapeDtypeStruct((N, C, 1, R), jnp.float32), of_queries(1, R)),
        ),
        scratch=(pltpu.VMEM((R, K), q_NCRK.dtype), _sums(R, V), _sums(R, LANES), _sums(R, LANES)),
    )  # fmt: skip
    outputs = o_NCRV, lse_NC1R[:, :, 0]
    return outputs, (q_NCRK, k_MGkK, v_MGkV, q_at, k_at, turning, tiles, *outputs)


def _backward(static: Static, residuals, cotangents):
    q_NCRK, k_MGkK, v_MGkV, q_at, k_at, turning, tiles, o_NCRV, lse_NCR = residuals
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
    of_queries, of_keys = _blocks(bundle=lambda c, _: c, group=lambda c, _: c * G // C, own=QUERIES)
    dq_NCRK, turned_NCRK = _call(
        "attention_dq",
        functools.partial(_dq_kernel, static=static),
        static,
        (C, steps.count),
        steps,
        inputs(q_NCRK, of_queries, of_keys, q_at.swapaxes(1, 2), k_at),
        turning,
        outputs=((q_NCRK, of_queries(R, K)),) * 2,
        scratch=(_sums(R, K), _sums(R, LANES), _sums(R, LANES)),
    )
    each, steps = C // G, in_line(tiles.by_key)
    of_queries, of_keys = _blocks(bundle=lambda g, _, c: g * each + c, group=lambda g, _, c: g, own=KEYS)
    dk_MGkK, dv_MGkV = _call(
        "attention_dkv",
        functools.partial(_dkv_kernel, static=static),
        static,
        (G, steps.count, each),
        steps,
        inputs(turned_NCRK, of_queries, of_keys, q_at, k_at.swapaxes(1, 2)),
        None,
        outputs=((k_MGkK, of_keys(k, K)), (v_MGkV, of_keys(k, V))),
        scratch=(_sums(k, K), _sums(k, V)),
    )
    return dq_NCRK, dk_MGkK, dv_MGkV, None, None, _of_frequencies(q_NCRK, dq_NCRK, q_at, turning), None


def _of_frequencies(q_NCRK, dq_NCRK, q_at, turning):
    """Gradients of what `_widened` gave. With its angle a pair (a, b) moves by (-b, a), however far it is turned."""
    if turning is None:
        return None
    turned_NCRK = jnp.einsum("ncrj,jk->ncrk", q_NCRK.astype(jnp.float32), turning[1], precision="highest")
    at_N3R = q_at[:, jnp.array([3, 1, 2])].astype(jnp.float32)  # index, branch and time
    return jnp.einsum("ncrk,nfr->fk", dq_NCRK * turned_NCRK, at_N3R), None


_attend.defvjp(_forward, _backward)


def _blocks(bundle, group, own: str):
    """(of_queries, of_keys): each gives the blocks of its side, of the bundle or group that a place of the grid means.

    The place is (.., step, ..), the step second; own: the side whose tile the step adds to.
    """

    def of(side: str, head):
        def block(*shape: int, heads: bool = True) -> pl.BlockSpec:
            def index(*arguments):
                *place, own_tiles, other_tiles, _ = arguments
                tile = (own_tiles if side == own else other_tiles)[place[1]]
                return (tile, head(*place), 0, 0) if heads else (tile, 0, 0)

            return pl.BlockSpec((None, None, *shape) if heads else (None, *shape), index)

        return block

    return of(QUERIES, bundle), of(KEYS, group)


def _sums(*shape: int):
    return pltpu.VMEM(shape, jnp.float32)


def _call(name: str, kernel, static: Static, grid: tuple, steps: Steps, inputs, turning, outputs, scratch):
    """Runs a kernel. inputs: (array, block); turning: whole arrays, or None; outputs: (like what, block)."""
    whole = [(x, pl.BlockSpec(x.shape, lambda *_: (0, 0))) for x in turning or ()]
    arrays, in_specs = zip(*inputs, *whole, strict=True)
    made, out_specs = zip(*outputs, strict=True)

    def with_refs(*refs):
        refs, held = refs[: -len(scratch)], refs[-len(scratch) :]
        refs, written = refs[: -len(made)], refs[-len(made) :]
        read = 3 + len(inputs)  # after the steps
        kernel(*refs[:read], refs[read:] or None, written, held)

    run = pl.pallas_call(
        with_refs,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in made],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", *["arbitrary"] * (len(grid) - 1)), vmem_limit_bytes=VMEM
        ),
        interpret=static.interpret,
    )
    return run(steps.own, steps.other, steps.flags, *arrays)
