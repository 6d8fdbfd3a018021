"""Attention over lists of non-empty tiles as Pallas kernels for Hopper GPUs (Mosaic): forward, dq, and dk with dv.

A program takes query tiles of a head (forward, dq) or a key tile of a group (dk with dv), and goes through the list of
each: first the tiles that hide nothing, then those that are masked. The longest lists are taken first, so that none is
left alone at the end. One warpgroup copies what is next, and two compute half of a tile each, or one where heads are
wider than WIDEST. Forward they take turns at the tensor cores: one multiplies while the other takes exponentials. The
backward pass computes each tile again; no two programs add to one sum, so every sum has one order. Queries of narrow
heads rotate as they come: what stays, and each side of the pairs, are operands of their own. Steps of decoding, which
have few queries and stream keys, are left to the Triton kernels, or to tiled where jax no longer has those.

b: row of the batch; h, g: head and group; q, k: tokens of a tile. What is named .._s lies in shared memory.
FlashAttention-2 and -3 (arXiv 2307.08691, 2407.08608) on tile lists.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lab.coordinates import Coordinates
from lab.kernels import hopper, hopper_kernels, pallas_triton, tiled
from lab.kernels.folding import whole
from lab.kernels.hopper_kernels import HopperStatic
from lab.kernels.pallas_common import frequency_gradients
from lab.kernels.residuals import kept
from lab.kernels.rotary import rotate, rotation
from lab.kernels.rules import Rule
from lab.kernels.tiles import BothWays, is_step, pad_to_tiles, plan_both_ways

WIDTHS = (64, 128, 192, 256)  # no product is wider than 256; others are padded to the next with zeros, which is exact
TOGETHER = 256  # widths of keys and of values, whose gradients one program adds up
ROOMY = 320  # widths of keys and of values, beyond which gradients have no place of their own in shared memory
WIDE = 128  # from wider keys or values on a step of the forward pass reads half as many tokens
WIDEST = 192  # from wider ones on a program has one consumer: there is no room for two
ROTATED = 64  # the widest keys whose rotation has room beside them in shared memory; it is cheap beside wider ones


def tile_sizes(T: int, S: int) -> tuple[int, int]:
    """Tokens of a query tile and of a key tile."""
    return hopper.TILE, hopper.TILE


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
    """Tile lists, and the order in which programs take query tiles and key tiles, counted through the batch."""

    lists: BothWays
    of_queries: jax.Array
    of_keys: jax.Array


def plan(rule: Rule, q_coordinates: Coordinates, k_coordinates: Coordinates):
    """The tile lists `attend` needs: made once per batch and rule, shared by layers."""
    T, S = q_coordinates.shape[1], k_coordinates.shape[1]
    if is_step(T, S):
        return _of_steps().plan(rule, q_coordinates, k_coordinates)
    lists = plan_both_ways(rule, q_coordinates, k_coordinates, hopper.TILE, hopper.TILE)
    return Queues(lists, *(jnp.argsort(-tiles.total, axis=None).astype(jnp.int32) for tiles in lists))


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
    o_BTHV, lse_BHT = _attend(
        HopperStatic(rule, float(scale), float(softcap or 0.0), parts),
        *(whole(x, hopper.TILE, WIDTHS[0]) for x in (q_BTHK, k_BSGK, v_BSGV)),
        *(_fields(pad_to_tiles(at, hopper.TILE)) for at in (q_coordinates, k_coordinates)),
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
    inputs = q_BTHK, k_BSGK, v_BSGV, q_at, k_at
    outputs = kept(_output(static, *inputs, frequencies_3F, queues))
    return outputs, (*inputs, frequencies_3F, queues, *outputs)


def _backward(static: HopperStatic, residuals, cotangents):
    return *_gradients(static, residuals, cotangents), None


# Calls of one shape are lowered once, for all layers.
@functools.partial(jax.jit, static_argnums=0)
def _output(static: HopperStatic, q_BTHK, k_BSGK, v_BSGV, q_at, k_at, frequencies_3F, queues: Queues):
    (B, T, H, K), V = q_BTHK.shape, v_BSGV.shape[3]
    turning = _turning(q_at, frequencies_3F, q_BTHK.dtype)
    keys = hopper.TILE if max(K, V) <= WIDE else hopper.ROWS
    return hopper.call(
        functools.partial(hopper_kernels.forward_kernel, static=static),
        "forward_kernel",
        B * T // hopper.TILE * H,
        (q_BTHK, k_BSGK, v_BSGV, q_at, k_at, turning, queues.of_queries, *queues.lists.by_query),
        outputs=(
            jax.ShapeDtypeStruct((B, T, H, V), q_BTHK.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
        own=(*_in_parts(q_BTHK, hopper.ROWS, static), _coordinates(hopper.ROWS), *map(_rows_of, turning)),
        pipelines=((*_in_parts(k_BSGK, keys, static), _coordinates(keys)), (_tile(v_BSGV, keys),)),
        results=(_tile(v_BSGV, hopper.ROWS), _numbers(hopper.ROWS)),
        consumers=_consumers(K, V),
    )


@functools.partial(jax.jit, static_argnums=0)
def _gradients(static: HopperStatic, residuals, cotangents):
    *inputs, frequencies_3F, queues, o_BTHV, lse_BHT = residuals
    do_BTHV, dlse_BHT = cotangents
    q_BTHK, k_BSGK, v_BSGV, q_at, _ = inputs
    (B, T, H, K), (_, S, G, V) = q_BTHK.shape, v_BSGV.shape
    saw_BHT = lse_BHT > -jnp.inf
    delta_BTH = (o_BTHV.astype(jnp.float32) * do_BTHV.astype(jnp.float32)).sum(-1)
    delta_BHT = delta_BTH.swapaxes(1, 2) - jnp.where(saw_BHT, dlse_BHT, 0)
    lse_BHT = jnp.where(saw_BHT, hopper.LOG2E * lse_BHT, jnp.inf)  # rows that saw nothing: every probability is 0
    turning, cotangents = _turning(q_at, frequencies_3F, q_BTHK.dtype), (do_BTHV, lse_BHT, delta_BHT)
    rows, consumers, roomy = hopper.ROWS, _consumers(K, V), K + V <= ROOMY
    dq_BTHK, *turned = hopper.call(
        functools.partial(hopper_kernels.dq_kernel, static=static),
        "dq_kernel",
        B * T // hopper.TILE * H,
        (*inputs, *cotangents, turning, queues.of_queries, *queues.lists.by_query),
        outputs=(q_BTHK,) * (2 if turning else 1),
        own=(
            _tile(do_BTHV, rows),
            _coordinates(rows),
            _numbers(rows),
            _numbers(rows),
            *_in_parts(q_BTHK, rows, static),
            *map(_rows_of, turning),
        ),
        pipelines=((_coordinates(rows), _tile(v_BSGV, rows), *_in_parts(k_BSGK, rows, static)),),
        results=_in_parts(q_BTHK, rows, static) if roomy else (),
        consumers=consumers,
    )
    # Wider sums of both do not fit the registers of a program.
    together = K + V <= TOGETHER
    outputs = {"dk": k_BSGK, "dv": v_BSGV}
    for wanted in (("dk", "dv"),) if together else (("dk",), ("dv",)):
        found = hopper.call(
            functools.partial(hopper_kernels.dkv_kernel, static=static, wanted=wanted),
            f"{'dkv' if together else wanted[0]}_kernel",
            B * S // hopper.TILE * G,
            (*turned, *inputs[len(turned) :], *cotangents, queues.of_keys, *queues.lists.by_key),
            outputs=[outputs[name] for name in wanted],
            own=(_tile(k_BSGK, rows), _tile(v_BSGV, rows), _coordinates(rows)),
            pipelines=(
                (
                    _coordinates(rows),
                    _tile(q_BTHK, rows),
                    _tile(do_BTHV, rows),
                    _numbers(rows),
                    _numbers(rows),
                ),
            ),
            results=[_tile(outputs[name], rows) for name in wanted] if roomy else (),
            consumers=consumers,
            stay=False,
        )
        outputs |= zip(wanted, found, strict=True)
    of_frequencies_3F = frequency_gradients(q_BTHK, dq_BTHK, q_at, frequencies_3F, heads=2)
    return dq_BTHK, outputs["dk"], outputs["dv"], None, None, of_frequencies_3F


_attend.defvjp(_forward, _backward)


def _consumers(K: int, V: int) -> int:
    return 1 if max(K, V) > WIDEST else hopper.CONSUMERS


def _tile(x_BTHK, tokens: int):
    return jax.ShapeDtypeStruct((tokens, x_BTHK.shape[3]), x_BTHK.dtype)


def _in_parts(x_BTHK, tokens: int, static: HopperStatic):
    return [jax.ShapeDtypeStruct((tokens, part), x_BTHK.dtype) for part in static.parts]


def _rows_of(x_BTF):
    return jax.ShapeDtypeStruct((hopper.ROWS, x_BTF.shape[2]), x_BTF.dtype)


def _coordinates(tokens: int):
    return jax.ShapeDtypeStruct((4, tokens), jnp.int32)


def _numbers(tokens: int):
    return jax.ShapeDtypeStruct((tokens,), jnp.float32)
