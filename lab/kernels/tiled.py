"""Attention over lists of non-empty tiles, in plain XLA: memory linear in length, tuned for a CPU.

An outer loop over query tiles, an inner loop over the key tiles of its list: first those that need no mask, then
those that do (lab.kernels.tiled_loops). The query heads of a group are folded into rows. The backward pass computes
each tile again. A single query a row has longer key tiles, and few heads are not put apart for it: one product with all
of them costs less. Several lists of single queries are read at once.

N query tiles of all rows of the batch, M key tiles; q and k: tokens of a tile; R = H / G * q rows. P runs of query
tiles have a bias each: a single one, but under jax.vmap. FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) on
tile lists.
"""

import functools

import jax
import jax.numpy as jnp

from lab.coordinates import Coordinates
from lab.kernels import split, tiled_loops
from lab.kernels.bias import Bias
from lab.kernels.dropout import Dropped
from lab.kernels.folding import fold_queries, key_tiles, own_values, spread_queries, unfold_queries
from lab.kernels.residuals import kept
from lab.kernels.rules import Rule
from lab.kernels.tiled_loops import TileDropout, TiledStatic
from lab.kernels.tiles import FEW, MANY, Lanes, Tiles, alike, is_step, key_tile, make_lanes, make_tiles, pad_to_tiles

SPREAD = 32  # query heads times key heads at most that one product takes: it multiplies G times as much


def tile_sizes(T: int, S: int) -> tuple[int, int]:
    """Tokens of a query tile and of a key tile: 64, or less for short inputs; all queries of a step of decoding."""
    return T if is_step(T, S) else min(64, T), key_tile(T, S)


def plan(rule: Rule, q_coordinates: Coordinates, k_coordinates: Coordinates, limits=None, lanes=False) -> Tiles | Lanes:
    """The tile lists `attend` needs: made once per batch and rule, shared by layers.

    lanes: whether the queries of a step go on with texts of their own, so that a tile of all of them would read for
    each what the others alone see: of more than FEW each reads by itself what it alone sees, and they read the rest in
    tiles of MANY at most, as even as they can be. To put the keys of a tile in order costs more than their products.
    """
    T, S = q_coordinates.shape[1], k_coordinates.shape[1]
    q_tile, k_tile = tile_sizes(T, S)
    k_coordinates = pad_to_tiles(k_coordinates, k_tile)
    if lanes and T > FEW and is_step(T, S):
        return make_lanes(rule, q_coordinates, k_coordinates, -(-T // -(-T // MANY)), k_tile, limits)
    return make_tiles(rule, pad_to_tiles(q_coordinates, q_tile), k_coordinates, q_tile, k_tile, limits)


def attend(
    q_BTHK,
    k_BSGK,
    v_BSGV,
    q_coordinates,
    k_coordinates,
    rule,
    scale,
    softcap,
    tiles: Tiles | Lanes | None = None,
    bias: Bias | None = None,
    dropout: Dropped | None = None,
    limits=None,
):
    """Returns (o_BTHV, lse_BTH) as lab.kernels.reference.attend does."""
    if isinstance(tiles, Lanes):
        inputs = q_BTHK, k_BSGK, v_BSGV, q_coordinates, k_coordinates, rule, scale, softcap
        return split.merge([attend(*inputs, part, bias, dropout, limits) for part in tiles])
    tiles = plan(rule, q_coordinates, k_coordinates, limits) if tiles is None else tiles
    tiles = alike(tiles) if limits is not None and softcap else tiles
    B, T, H, _ = q_BTHK.shape
    q_tile, k_tile = tile_sizes(T, k_BSGK.shape[1])
    if is_step(T, k_BSGK.shape[1]):
        q_tile = -(-T // tiles.keys.shape[1])  # as planned, of lanes or of one text
    q_coordinates, k_coordinates = pad_to_tiles(q_coordinates, q_tile), pad_to_tiles(k_coordinates, k_tile)
    to_tiles = lambda x, tile: x.reshape(-1, tile)  # noqa: E731
    step = is_step(T, k_BSGK.shape[1])
    static = TiledStatic(rule, float(scale), float(softcap or 0.0), q_tile, k_tile, step)
    G = k_BSGK.shape[2]
    keys, values = key_tiles(k_BSGK, k_tile), key_tiles(v_BSGV, k_tile)
    if spread := q_tile == 1 and step and H * G <= SPREAD:
        groups, G, q_BTHK = G, 1, spread_queries(q_BTHK, G)
        keys, values = (x.reshape(*x.shape[:2], -1) for x in (keys, values))
    o_NGRV, lse_NGR = _attend(
        static,
        fold_queries(q_BTHK, q_tile, G),
        keys,
        values,
        q_coordinates.map(lambda x: to_tiles(x, q_tile)),
        k_coordinates.map(lambda x: to_tiles(x, k_tile)),
        _flat_lists(tiles),
        jax.tree.map(lambda x: x[None], bias),
        None if dropout is None else _dropout_of_tiles(dropout, q_tile, k_tile, G),
        limits,
    )
    o_BTHV, lse_BTH = unfold_queries(o_NGRV, B, T, H), unfold_queries(lse_NGR[..., None], B, T, H)[..., 0]
    return own_values(o_BTHV, groups) if spread else o_BTHV, lse_BTH


def _dropout_of_tiles(dropout: Dropped, q_tile: int, k_tile: int, G: int) -> TileDropout:
    state_NGR = fold_queries(dropout.states()[..., None], q_tile, G)[..., 0]
    return TileDropout(state_NGR, key_tiles(dropout.key_BS[..., None, None], k_tile)[..., 0, 0], dropout.rate[None])


def _flat_lists(tiles: Tiles) -> Tiles:
    """Lists over all rows of the batch: key tiles numbered through, so that one loop serves every row."""
    B, n, m = tiles.keys.shape
    keys = tiles.keys + jnp.arange(B, dtype=jnp.int32)[:, None, None] * m
    return Tiles(keys.reshape(B * n, m), tiles.full.reshape(B * n), tiles.total.reshape(B * n))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    static,
    q_NGRK,
    k_MkGK,
    v_MkGV,
    q_coordinates,
    k_coordinates,
    lists,
    bias_P: Bias | None,
    dropout: TileDropout | None,
    limits,
):
    return _forward(static, q_NGRK, k_MkGK, v_MkGV, q_coordinates, k_coordinates, lists, bias_P, dropout, limits)[0]


def _forward(static, q_NGRK, k_MkGK, v_MkGV, q_coordinates, k_coordinates, lists, bias_P, dropout, limits):
    q_NGRK = (q_NGRK * static.scale).astype(q_NGRK.dtype)
    keys, values = (x if static.step else x.swapaxes(1, 2) for x in (k_MkGK, v_MkGV))
    inputs = q_NGRK, keys, values, q_coordinates, k_coordinates, lists
    outputs = kept(_foldable(tiled_loops.forward, static)(*inputs, bias_P, dropout, limits))
    return outputs, (*inputs, bias_P, dropout, limits, *outputs)


def _backward(static, residuals, cotangents):
    *inputs, bias_P, dropout, limits, o_NGRV, lse_NGR = residuals
    do_NGRV, dlse_NGR = cotangents
    q_NGRK, keys, values = inputs[:3]
    acc = lse_NGR.dtype
    saw_NGR = lse_NGR > -jnp.inf
    # Rows that saw nothing: lse = +inf makes every probability 0, so nothing flows.
    lse_NGR = jnp.where(saw_NGR, lse_NGR, jnp.inf)
    delta_NGR = (o_NGRV.astype(acc) * do_NGRV.astype(acc)).sum(-1) - jnp.where(saw_NGR, dlse_NGR, 0)
    rows = do_NGRV, lse_NGR, delta_NGR
    backward = _foldable(tiled_loops.backward, static)
    dq_NGRK, dk_MGKk, dv_MGVk, dbias_P = backward(*inputs, *rows, bias_P, dropout, limits)
    return (
        (dq_NGRK * static.scale).astype(q_NGRK.dtype),
        _like(keys, dk_MGKk),  # q was scaled before the scores
        _like(values, dv_MGVk),
        None,
        None,
        None,
        jax.tree.map(lambda x, d: d.astype(x.dtype), bias_P, dbias_P),
        None,
        None,
    )


def _like(keys, d_MGKk):
    """A gradient as `_attend` was given the keys or values."""
    d = d_MGKk.transpose(0, 3, 1, 2).astype(keys.dtype)
    return d.reshape(keys.shape) if keys.ndim == 3 else d


def _foldable(loop, static: TiledStatic):
    """`loop` so that jax.vmap makes one longer loop of it: of its own, a batched trip count would run every tile."""

    @jax.custom_batching.custom_vmap
    def run(*arrays):
        return loop(static, *arrays)

    @run.def_vmap
    def fold(size, batched, *arrays):
        whole = jax.tree.map(lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape)), arrays, tuple(batched))
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), whole)
        M = whole[1].shape[1]
        keys = whole[5].keys + M * jnp.arange(size, dtype=jnp.int32)[:, None, None]
        lists = flat[5]._replace(keys=keys.reshape(flat[5].keys.shape))
        outputs = _foldable(loop, static)(*flat[:5], lists, *flat[6:])
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), outputs), jax.tree.map(lambda _: True, outputs)

    return run


_attend.defvjp(_forward, _backward)
