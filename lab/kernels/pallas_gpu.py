"""Attention over lists of non-empty tiles as Pallas kernels for Hopper GPUs (Mosaic): forward, dq, and dk with dv.

A program has one query tile of a head (forward, dq) or one key tile of a group (dk with dv), and goes through the list
of that tile: first the tiles that hide nothing, then those that are masked. Programs with the longest lists begin
first, so that none is left alone at the end. One warpgroup computes a tile while the next are copied. The backward pass
computes each tile again; no two programs add to one sum, so every sum has one order. Queries rotate as they come: what
stays, and each side of the pairs, are operands of their own. Sizes of tiles and numbers of buffers follow from the
registers and the shared memory that benchmarks/compile_for_gpu.py prints; they have been timed on no machine. Steps of
decoding, which have few queries and stream keys, are left to the Triton kernels, or to tiled where jax no longer has
those.

b: row of the batch; h, g: head and group; i, j: query tile and key tile; q, k: tokens of a tile. What is named .._s
lies in shared memory. FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) on tile lists.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lab.coordinates import Coordinates
from lab.kernels import hopper, pallas_triton, tiled
from lab.kernels.folding import whole
from lab.kernels.pallas_common import MASKED, frequency_gradients
from lab.kernels.residuals import kept
from lab.kernels.rotary import rotate, rotation
from lab.kernels.rules import Rule, pairs_visible
from lab.kernels.tiles import BothWays, Tiles, both_ways, is_step, make_tiles, pad_to_tiles

TILE = 64  # tokens: the rows that a warpgroup multiplies at once
WIDTHS = (64, 128, 192, 256)  # no product is wider than 256; others are padded to the next with zeros, which is exact
TOGETHER = 320  # widths of keys and of values, whose gradients one program adds up
ROTATED = 192  # the widest keys whose rotation has room beside them in the shared memory of dq


class HopperStatic(NamedTuple):
    """What the program is compiled for."""

    rule: Rule
    scale: float
    softcap: float
    q_tile: int
    k_tile: int
    parts: tuple[int, ...]  # of the dimensions of a query: (those that stay,) F, F; or all of them


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
    if max(K, V) > WIDTHS[-1]:
        return f"needs widths up to {WIDTHS[-1]}, and these are {K} for keys and {V} for values"
    return None


class Queues(NamedTuple):
    """Tile lists, those of query tiles also for key tiles of twice the size; and the order in which programs take query
    tiles and key tiles, counted through the batch."""

    lists: BothWays
    wide: Tiles
    of_queries: jax.Array
    of_keys: jax.Array


def plan(rule: Rule, q_coordinates: Coordinates, k_coordinates: Coordinates):
    """The tile lists `attend` needs: made once per batch and rule, shared by layers."""
    T, S = q_coordinates.shape[1], k_coordinates.shape[1]
    if is_step(T, S):
        return _of_steps().plan(rule, q_coordinates, k_coordinates)
    q_tile, k_tile = tile_sizes(T, S)
    at = pad_to_tiles(q_coordinates, q_tile), pad_to_tiles(k_coordinates, 2 * k_tile)
    lists = both_ways(make_tiles(rule, *at, q_tile, k_tile))
    longest_first = (jnp.argsort(-tiles.total, axis=None).astype(jnp.int32) for tiles in lists)
    return Queues(lists, make_tiles(rule, *at, q_tile, 2 * k_tile), *longest_first)


def attend(q_BTHK, k_BSGK, v_BSGV, q_coordinates, k_coordinates, rule, scale, softcap, tiles=None, frequencies_3F=None):
    """Returns (o_BTHV, lse_BTH) as lab.kernels.reference.attend does; with frequencies, queries come unrotated."""
    tiles = plan(rule, q_coordinates, k_coordinates) if tiles is None else tiles
    (_, T, _, K), (_, S, _, V) = q_BTHK.shape, v_BSGV.shape
    parts = _parts(K, frequencies_3F)
    if frequencies_3F is not None and (is_step(T, S) or len(parts) == 1):
        q_BTHK = rotate(q_BTHK, rotation(q_coordinates, frequencies_3F))
        parts, frequencies_3F = _parts(K, None), None
    if is_step(T, S):
        step = _of_steps()
        options = dict(interpret=False) if step is pallas_triton else {}
        return step.attend(q_BTHK, k_BSGK, v_BSGV, q_coordinates, k_coordinates, rule, scale, softcap, tiles, **options)
    q_tile, k_tile = tile_sizes(T, S)
    o_BTHV, lse_BHT = _attend(
        HopperStatic(rule, float(scale), float(softcap or 0.0), q_tile, k_tile, parts),
        whole(q_BTHK, q_tile, WIDTHS[0]),
        whole(k_BSGK, 2 * k_tile, WIDTHS[0]),
        whole(v_BSGV, 2 * k_tile, WIDTHS[0]),
        _fields(pad_to_tiles(q_coordinates, q_tile)),
        _fields(pad_to_tiles(k_coordinates, 2 * k_tile)),
        frequencies_3F,
        tiles,
    )
    return o_BTHV[:, :T, :, :V], lse_BHT.swapaxes(1, 2)[:, :T]


def _of_steps():
    return tiled if pallas_triton.OBSTACLE else pallas_triton


def _parts(K: int, frequencies_3F) -> tuple[int, ...]:
    """Widths of the operands that a query comes in; a single one, padded, if it is not to rotate, or cannot here."""
    F = 0 if frequencies_3F is None else frequencies_3F.shape[1]
    split = (K - 2 * F, F, F) if K > 2 * F else (F, F)
    inside = F and K <= ROTATED and K % WIDTHS[0] == 0 and all(part % hopper.CHUNKS[-1] == 0 for part in split)
    return split if inside else (K + -K % WIDTHS[0],)


def _fields(coordinates: Coordinates):
    """int32 [B, 4, T]"""
    return jnp.stack(jax.tree.leaves(coordinates), axis=1)


def _seen(rule: Rule, q_at_s, k_at_s, of_queries, of_keys, shape):
    """Who sees whom, as a matrix; coordinates [4, n] of queries and keys, and which of them are rows."""
    spread = lambda at_s, over: Coordinates(*(over(at_s[i], shape) for i in range(4)))  # noqa: E731
    return pairs_visible(rule, spread(q_at_s, of_queries), spread(k_at_s, of_keys))


def _scores(dot, static: HopperStatic):
    """Scaled and capped, in base 2."""
    if static.softcap:
        return hopper.LOG2E * static.softcap * hopper.tanh(static.scale / static.softcap * dot)
    return hopper.LOG2E * static.scale * dot


def _before_cap(ds, s, static: HopperStatic):
    """The gradient of scores before they were capped."""
    return ds * (1 - jnp.square(s / (hopper.LOG2E * static.softcap))) if static.softcap else ds


def _turned(a, b, cos_sin_s, sign: float = 1.0):
    """Both sides of every pair, rotated by the angle of each row, or back by it."""
    cos, sin = map(hopper.matrix, cos_sin_s)
    return a * cos - sign * sin * b, b * cos + sign * sin * a


def _turn(q_s, cos_sin_s) -> None:
    """Rotates queries where they lie."""
    turned = _turned(*map(hopper.matrix, q_s[-2:]), cos_sin_s)
    for x_s, x in zip(q_s[-2:], turned, strict=True):
        x_s[...] = x.astype(x_s.dtype)


def _forward_kernel(
    q, k, v, q_at, k_at, turning, order, keys, full, total,
    o, lse, own, own_arrived, streamed, o_s, lse_s, *, static
):  # fmt: skip
    b, h, i = hopper.place(order, keys.shape[1])
    g = lax.div(h, q.shape[2] // k.shape[2])
    queries, shape = pl.ds(i * static.q_tile, static.q_tile), (static.q_tile, static.k_tile)
    (*q_s, q_at_s), cos_sin_s = own[: len(static.parts) + 1], own[len(static.parts) + 1 :]
    of_queries = *hopper.columns_of(q.at[b, queries, h], static.parts), q_at.at[b, :, queries]
    hopper.copy((*of_queries, *(x.at[b, queries] for x in turning)), own, own_arrived)

    def sources(step, j):
        tile = pl.ds(j * static.k_tile, static.k_tile)
        return v.at[b, tile, g], *hopper.columns_of(k.at[b, tile, g], static.parts)

    def add(sums, k_at_s, v_s, *k_s):
        o_qV, top_q, sum_q = sums
        s_qk = _scores(hopper.dot(q_s, k_s), static)
        if k_at_s is not None:
            s_qk = jnp.where(_seen(static.rule, q_at_s, k_at_s, hopper.rows, hopper.columns, shape), s_qk, MASKED)
        new_q = jnp.maximum(top_q, s_qk.max(1))
        p_qk, shrink_q = jnp.exp2(s_qk - hopper.rows(new_q, shape)), jnp.exp2(top_q - new_q)
        o_qV = hopper.add_dot(o_qV * hopper.rows(shrink_q, o_qV.shape), p_qk.astype(v.dtype), v_s)
        return o_qV, new_q, sum_q * shrink_q + p_qk.sum(1)

    plgpu.barrier_wait(own_arrived)
    if turning:
        _turn(q_s, cos_sin_s)
    nothing = jnp.zeros(static.q_tile, jnp.float32)
    start = hopper.zeros(static.q_tile, v.shape[3]), hopper.by_row(nothing + MASKED), hopper.by_row(nothing)
    listed, coordinates = hopper.listed(keys, b, i), hopper.tiles_of(k_at, b, static.k_tile)
    o_qV, top_q, sum_q = hopper.over_list(full[b, i], total[b, i], listed, sources, coordinates, streamed, add, start)
    # A row that saw nothing has kept its first maximum, or has summed exp2(0) over hidden keys.
    saw_q = (top_q > MASKED) & (hopper.by_row(q_at_s[0]) >= 0)
    sum_q = jnp.where(saw_q, sum_q, 1)
    o_s[...] = (o_qV * hopper.rows(jnp.where(saw_q, 1 / sum_q, 0), o_qV.shape)).astype(o.dtype)
    lse_s[...] = jnp.where(saw_q, top_q / hopper.LOG2E + jnp.log(sum_q), -jnp.inf)
    hopper.write((o_s, o.at[b, queries, h]), (lse_s, lse.at[b, h, queries]))


def _dq_kernel(
    q, k, v, q_at, k_at, do, lse, delta, turning, order, keys, full, total,
    dq, *turned_and_scratch, static,
):  # fmt: skip
    *turned, own, own_arrived, streamed = turned_and_scratch
    b, h, i = hopper.place(order, keys.shape[1])
    g = lax.div(h, q.shape[2] // k.shape[2])
    queries, shape = pl.ds(i * static.q_tile, static.q_tile), (static.q_tile, static.k_tile)
    (do_s, q_at_s, lse_s, delta_s, *q_s), cos_sin_s = own[: 4 + len(static.parts)], own[4 + len(static.parts) :]
    of_queries = do.at[b, queries, h], q_at.at[b, :, queries], lse.at[b, h, queries], delta.at[b, h, queries]
    in_parts = functools.partial(hopper.columns_of, parts=static.parts)
    hopper.copy((*of_queries, *in_parts(q.at[b, queries, h]), *(x.at[b, queries] for x in turning)), own, own_arrived)

    def sources(step, j):
        tile = pl.ds(j * static.k_tile, static.k_tile)
        return v.at[b, tile, g], *in_parts(k.at[b, tile, g])

    def add(sums, k_at_s, v_s, *k_s):
        s_qk = _scores(hopper.dot(q_s, k_s), static)
        p_qk = jnp.exp2(s_qk - hopper.rows(lse_s[...], shape))
        if k_at_s is not None:
            p_qk = jnp.where(_seen(static.rule, q_at_s, k_at_s, hopper.rows, hopper.columns, shape), p_qk, 0)
        ds_qk = p_qk * (hopper.dot([do_s], [v_s]) - hopper.rows(delta_s[...], shape))
        ds_qk = _before_cap(ds_qk, s_qk, static).astype(k.dtype)
        return [hopper.add_dot(part, ds_qk, x_s) for part, x_s in zip(sums, k_s, strict=True)]

    plgpu.barrier_wait(own_arrived)
    if turning:
        _turn(q_s, cos_sin_s)
        hopper.write(*zip(q_s, in_parts(turned[0].at[b, queries, h]), strict=True))
    start = [hopper.zeros(static.q_tile, part) for part in static.parts]
    listed, coordinates = hopper.listed(keys, b, i), hopper.tiles_of(k_at, b, static.k_tile)
    sums = hopper.over_list(full[b, i], total[b, i], listed, sources, coordinates, streamed, add, start)
    if turning:
        sums[-2:] = _turned(*sums[-2:], cos_sin_s, -1.0)
    for part_s, part in zip(q_s, sums, strict=True):  # q has been read
        part_s[...] = (static.scale * part).astype(dq.dtype)
    hopper.write(*zip(q_s, in_parts(dq.at[b, queries, h]), strict=True))


def _dkv_kernel(
    q, k, v, q_at, k_at, do, lse, delta, order, queries, full, total,
    *wanted_and_scratch, static, wanted,
):  # fmt: skip
    *found, own, own_arrived, streamed = wanted_and_scratch
    b, g, j = hopper.place(order, queries.shape[1])
    heads = q.shape[2] // k.shape[2]
    keys, shape = pl.ds(j * static.k_tile, static.k_tile), (static.k_tile, static.q_tile)
    k_s, v_s, k_at_s = own
    hopper.copy((k.at[b, keys, g], v.at[b, keys, g], k_at.at[b, :, keys]), own, own_arrived)

    def sources(step, i):  # all heads of a tile, then the next tile
        h, tile = g * heads + lax.rem(step, heads), pl.ds(i * static.q_tile, static.q_tile)
        return q.at[b, tile, h], do.at[b, tile, h], lse.at[b, h, tile], delta.at[b, h, tile]

    def add(sums, q_at_s, q_s, do_s, lse_s, delta_s):
        s_kq = _scores(hopper.dot([k_s], [q_s]), static)
        p_kq = jnp.exp2(s_kq - hopper.columns(lse_s[...], shape))
        if q_at_s is not None:
            p_kq = jnp.where(_seen(static.rule, q_at_s, k_at_s, hopper.columns, hopper.rows, shape), p_kq, 0)
        sums = dict(sums)
        if "dv" in wanted:
            sums["dv"] = hopper.add_dot(sums["dv"], p_kq.astype(do.dtype), do_s)
        if "dk" in wanted:
            ds_kq = p_kq * (hopper.dot([v_s], [do_s]) - hopper.columns(delta_s[...], shape))
            sums["dk"] = hopper.add_dot(sums["dk"], _before_cap(ds_kq, s_kq, static).astype(q.dtype), q_s)
        return sums

    plgpu.barrier_wait(own_arrived)
    own_s, scales = {"dk": k_s, "dv": v_s}, {"dk": static.scale, "dv": 1.0}
    start = {name: hopper.zeros(*own_s[name].shape) for name in wanted}
    listed, coordinates = hopper.listed(queries, b, j, heads), hopper.tiles_of(q_at, b, static.q_tile)
    steps = full[b, j] * heads, total[b, j] * heads
    sums = hopper.over_list(*steps, listed, sources, coordinates, streamed, add, start)
    for name in wanted:  # k and v have been read
        own_s[name][...] = (scales[name] * sums[name]).astype(k.dtype)
    hopper.write(*((own_s[name], x.at[b, keys, g]) for name, x in zip(wanted, found, strict=True)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: HopperStatic, q_BTHK, k_BSGK, v_BSGV, q_at, k_at, frequencies_3F, tiles):
    return _forward(static, q_BTHK, k_BSGK, v_BSGV, q_at, k_at, frequencies_3F, tiles)[0]


def _turning(q_at, frequencies_3F, dtype) -> tuple:
    """(cos, sin) [B, T, F] of the angles of queries, or nothing."""
    if frequencies_3F is None:
        return ()
    at = Coordinates(*(q_at[:, i] for i in range(4)))
    return tuple(x[:, :, 0].astype(dtype) for x in rotation(at, frequencies_3F))


def _forward(static: HopperStatic, q_BTHK, k_BSGK, v_BSGV, q_at, k_at, frequencies_3F, queues: Queues):
    B, T, H, _ = q_BTHK.shape
    q, k, lists = static.q_tile, static.k_tile, queues.lists.by_query
    if _narrow(k_BSGK, v_BSGV):  # fewer turns for as many products; two programs share a processor then
        k, lists = 2 * k, queues.wide
    inputs, turning = (q_BTHK, k_BSGK, v_BSGV, q_at, k_at), _turning(q_at, frequencies_3F, q_BTHK.dtype)
    o_qV = jax.ShapeDtypeStruct((q, v_BSGV.shape[3]), q_BTHK.dtype)
    outputs = hopper.call(
        functools.partial(_forward_kernel, static=static._replace(k_tile=k)),
        "forward_kernel",
        (B * T // q, H),
        (*inputs, turning, queues.of_queries, *lists),
        outputs=(
            jax.ShapeDtypeStruct((B, T, H, o_qV.shape[1]), o_qV.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
        own=(*_in_parts(q_BTHK, q, static), _coordinates(q), *(_rows_of(x, q) for x in turning)),
        streamed=(_tile(v_BSGV, k), *_in_parts(k_BSGK, k, static)),
        coordinates=_coordinates(k),
        results=(o_qV, _numbers(q)),
    )
    outputs = kept(outputs)
    return outputs, (*inputs, frequencies_3F, queues, *outputs)


def _backward(static: HopperStatic, residuals, cotangents):
    *inputs, frequencies_3F, queues, o_BTHV, lse_BHT = residuals
    do_BTHV, dlse_BHT = cotangents
    q_BTHK, k_BSGK, v_BSGV, q_at, _ = inputs
    (B, T, H, _), (_, S, G, _) = q_BTHK.shape, k_BSGK.shape
    q, k = static.q_tile, static.k_tile
    saw_BHT = lse_BHT > -jnp.inf
    delta_BTH = (o_BTHV.astype(jnp.float32) * do_BTHV.astype(jnp.float32)).sum(-1)
    delta_BHT = delta_BTH.swapaxes(1, 2) - jnp.where(saw_BHT, dlse_BHT, 0)
    lse_BHT = jnp.where(saw_BHT, hopper.LOG2E * lse_BHT, jnp.inf)  # rows that saw nothing: every probability is 0
    turning, cotangents = _turning(q_at, frequencies_3F, q_BTHK.dtype), (do_BTHV, lse_BHT, delta_BHT)
    buffers = 3 if _narrow(k_BSGK, v_BSGV) else 2  # what fits beside as many programs as registers allow
    dq_BTHK, *turned = hopper.call(
        functools.partial(_dq_kernel, static=static),
        "dq_kernel",
        (B * T // q, H),
        (*inputs, *cotangents, turning, queues.of_queries, *queues.lists.by_query),
        outputs=(q_BTHK,) * (2 if turning else 1),
        own=(
            _tile(do_BTHV, q),
            _coordinates(q),
            _numbers(q),
            _numbers(q),
            *_in_parts(q_BTHK, q, static),
            *(_rows_of(x, q) for x in turning),
        ),
        streamed=(_tile(v_BSGV, k), *_in_parts(k_BSGK, k, static)),
        coordinates=_coordinates(k),
        buffers=buffers,
    )
    # Wider sums of both do not fit the registers of a program.
    together = k_BSGK.shape[3] + v_BSGV.shape[3] <= TOGETHER
    outputs = {"dk": k_BSGK, "dv": v_BSGV}
    for wanted in (("dk", "dv"),) if together else (("dk",), ("dv",)):
        found = hopper.call(
            functools.partial(_dkv_kernel, static=static, wanted=wanted),
            f"{'dkv' if together else wanted[0]}_kernel",
            (B * S // k, G),
            (*turned, *inputs[len(turned) :], *cotangents, queues.of_keys, *queues.lists.by_key),
            outputs=[outputs[name] for name in wanted],
            own=(_tile(k_BSGK, k), _tile(v_BSGV, k), _coordinates(k)),
            streamed=(_tile(q_BTHK, q), _tile(do_BTHV, q), _numbers(q), _numbers(q)),
            coordinates=_coordinates(q),
            buffers=buffers,
        )
        outputs |= zip(wanted, found, strict=True)
    dk_BSGK, dv_BSGV = outputs["dk"], outputs["dv"]
    of_frequencies_3F = frequency_gradients(q_BTHK, dq_BTHK, q_at, frequencies_3F, heads=2)
    return dq_BTHK, dk_BSGK, dv_BSGV, None, None, of_frequencies_3F, None


_attend.defvjp(_forward, _backward)


def _narrow(k_BSGK, v_BSGV) -> bool:
    return max(k_BSGK.shape[3], v_BSGV.shape[3]) <= WIDTHS[0]


def _tile(x_BTHK, tokens: int):
    return jax.ShapeDtypeStruct((tokens, x_BTHK.shape[3]), x_BTHK.dtype)


def _in_parts(x_BTHK, tokens: int, static: HopperStatic):
    return [jax.ShapeDtypeStruct((tokens, part), x_BTHK.dtype) for part in static.parts]


def _rows_of(x_BTF, tokens: int):
    return jax.ShapeDtypeStruct((tokens, x_BTF.shape[2]), x_BTF.dtype)


def _coordinates(tokens: int):
    return jax.ShapeDtypeStruct((4, tokens), jnp.int32)


def _numbers(tokens: int):
    return jax.ShapeDtypeStruct((tokens,), jnp.float32)
