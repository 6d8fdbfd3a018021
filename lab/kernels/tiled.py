"""Attention over lists of non-empty tiles, in plain XLA: memory linear in length, tuned for a CPU.

An outer loop over query tiles, an inner loop over the key tiles of its list: first those that need no mask, then
those that do. The query heads of a group are folded into rows. The backward pass computes each tile again. A single
query a row has longer key tiles, and no heads are put apart for it: one product with all of them costs less.

N query tiles of all rows of the batch, M key tiles; q and k: tokens of a tile; R = H / G * q rows. P runs of query
tiles have a bias each: a single one, but under jax.vmap. FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) on
tile lists.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lab.coordinates import Coordinates
from lab.kernels import bias as biases
from lab.kernels import split
from lab.kernels.bias import Bias
from lab.kernels.dropout import Dropped, factors
from lab.kernels.folding import fold_queries, key_tiles, own_values, spread_queries, unfold_queries
from lab.kernels.residuals import kept
from lab.kernels.rules import Rule, visible
from lab.kernels.tiles import FEW, MANY, Lanes, Tiles, is_step, key_tile, make_lanes, make_tiles, pad_to_tiles

SPREAD = 32  # query heads at most that one product takes: what it multiplies in vain grows with them
MASKED = -1e30  # not -inf: a tile may hide every key of a query, and inf - inf is nan


class TileDropout(NamedTuple):
    """`Dropped` by tiles: states of the hash, words of keys, and the rate of each run."""

    state_NGR: jax.Array
    word_Mk: jax.Array
    rate_P: jax.Array


class TiledStatic(NamedTuple):
    """What the program is compiled for."""

    rule: Rule
    scale: float
    softcap: float
    q_tile: int
    k_tile: int
    step: bool  # of decoding: keys are read once, where they lie; else often, so each group's are put together first


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
    if spread := q_tile == 1 and step and H <= SPREAD:
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


def _at(x, i):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, keepdims=False), x)


def _put(x, value, i):
    return lax.dynamic_update_index_in_dim(x, value, i, 0)


def _dot(spec: str, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _scores(static: TiledStatic, q_GRK, k_GkK, q_at: Coordinates, k_at: Coordinates | None, limits):
    """Scaled and capped scores [G, R, k], MASKED where the rule hides; k_at None: nothing of this tile is hidden.

    limits: int32 [M, M] of the row, or None.
    """
    s_GRk = _dot("grd,gcd->grc", q_GRK, k_GkK)
    if static.softcap:
        s_GRk = static.softcap * jnp.tanh(s_GRk / static.softcap)
    if k_at is None:
        return s_GRk
    seen = visible(static.rule, q_at, k_at, limits)
    G, R, k = s_GRk.shape
    return jnp.where(seen, s_GRk.reshape(G, R // static.q_tile, static.q_tile, k), MASKED).reshape(G, R, k)


def _run(i, N: int, P: int):
    """The run, or the row, of P that query tile i of N belongs to."""
    return i // (N // P)


def _pairs(q_at: Coordinates, k_at: Coordinates) -> tuple[Coordinates, Coordinates]:
    return q_at.map(lambda x: x[:, None]), k_at.map(lambda x: x[None, :])


def _biased(s_GRk, bias: Bias | None, q_at: Coordinates, k_coordinates: Coordinates, j):
    """Scores of key tile j, with what the bias adds: MASKED stays what it is, which is far beyond any bias."""
    if bias is None:
        return s_GRk
    b_Hqk = biases.looked_up(bias, *_pairs(q_at, _at(k_coordinates, j)), s_GRk.dtype)
    return s_GRk + b_Hqk.reshape(s_GRk.shape)


def _times_factors(x_GRk, dropout: TileDropout | None, i, j):
    """Numbers of query tile i and key tile j times their factors of dropout."""
    if dropout is None:
        return x_GRk
    rate = _at(dropout.rate_P, _run(i, len(dropout.state_NGR), len(dropout.rate_P)))
    return x_GRk * factors(_at(dropout.state_NGR, i)[..., None], _at(dropout.word_Mk, j), rate, x_GRk.dtype)


def _over_tiles(lists: Tiles, i, body, carry, k_coordinates: Coordinates):
    """body(j, coordinates of key tile j or None where no mask is needed, carry) over the list of query tile i."""
    keys = _at(lists.keys, i)
    carry = lax.fori_loop(0, lists.full[i], lambda x, carry: body(keys[x], None, carry), carry)
    masked = lambda x, carry: body(keys[x], _at(k_coordinates, keys[x]), carry)  # noqa: E731
    return lax.fori_loop(lists.full[i], lists.total[i], masked, carry)


def _rows(q_at: Coordinates, R: int):
    """bool [R, 1]: the rows of a folded query tile that are no padding."""
    return jnp.tile(q_at.segment >= 0, R // q_at.segment.shape[0])[:, None]


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
    outputs = kept(_foldable(_forward_loop, static)(*inputs, bias_P, dropout, limits))
    return outputs, (*inputs, bias_P, dropout, limits, *outputs)


def _tile(static: TiledStatic, x, j):
    """[G, k, ..] of keys or values [M, k, G, ..] of a step, else [M, G, k, ..]; [M, k, ..] are of one group."""
    tile = _at(x, j)
    if tile.ndim == 2:
        return tile[None]
    return tile.swapaxes(0, 1) if static.step else tile


def _forward_loop(static, q_NGRK, keys, values, q_coordinates, k_coordinates, lists, bias_P, dropout, limits):
    """(o_NGRV, lse_NGR) for scaled queries."""
    N, G, R, _ = q_NGRK.shape
    V = values.shape[-1]
    acc = jnp.promote_types(q_NGRK.dtype, jnp.float32)

    def query_tile(i, outputs):
        q_GRK, q_at = _at(q_NGRK, i), _at(q_coordinates, i)
        bias, of_row = (jax.tree.map(lambda x: _at(x, _run(i, N, len(x))), of) for of in (bias_P, limits))

        def key_tile(j, k_at, carry):
            o_GRV, max_GR, sum_GR = carry
            s_GRk = _scores(static, q_GRK, _tile(static, keys, j), q_at, k_at, of_row)
            s_GRk = _biased(s_GRk, bias, q_at, k_coordinates, j)
            new_GR = jnp.maximum(max_GR, s_GRk.max(-1))
            p_GRk = jnp.exp(s_GRk - new_GR[..., None])
            shrink_GR = jnp.exp(max_GR - new_GR)
            v_GkV = _tile(static, values, j)
            kept_GRk = _times_factors(p_GRk, dropout, i, j).astype(v_GkV.dtype)
            o_GRV = o_GRV * shrink_GR[..., None] + _dot("grc,gcv->grv", kept_GRk, v_GkV)
            return o_GRV, new_GR, sum_GR * shrink_GR + p_GRk.sum(-1)

        carry = jnp.zeros((G, R, V), acc), jnp.full((G, R), MASKED, acc), jnp.zeros((G, R), acc)
        o_GRV, max_GR, sum_GR = _over_tiles(lists, i, key_tile, carry, k_coordinates)
        # A row that saw nothing has kept its first maximum, or has summed exp(0) over hidden keys.
        saw_GR = (max_GR > MASKED) & _rows(q_at, R)[:, 0]
        o_GRV = jnp.where(saw_GR[..., None], o_GRV / jnp.where(saw_GR, sum_GR, 1)[..., None], 0)
        lse_GR = jnp.where(saw_GR, max_GR + jnp.log(jnp.where(saw_GR, sum_GR, 1)), -jnp.inf)
        return _put(outputs[0], o_GRV.astype(q_NGRK.dtype), i), _put(outputs[1], lse_GR, i)

    empty = jnp.zeros((N, G, R, V), q_NGRK.dtype), jnp.zeros((N, G, R), acc)
    return lax.fori_loop(0, N, query_tile, empty)


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
    dq_NGRK, dk_MGKk, dv_MGVk, dbias_P = _foldable(_backward_loop, static)(*inputs, *rows, bias_P, dropout, limits)
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


def _backward_loop(
    static,
    q_NGRK,
    keys,
    values,
    q_coordinates,
    k_coordinates,
    lists,
    do_NGRV,
    lse_NGR,
    delta_NGR,
    bias_P,
    dropout,
    limits,
):
    """(dq_NGRK of the scaled queries, dk_MGKk, dv_MGVk, and the gradient of bias_P)."""
    N, G, R, K = q_NGRK.shape
    M, V, tile = len(values), values.shape[-1], static.k_tile
    acc = lse_NGR.dtype

    def query_tile(i, gradients):
        q_GRK, do_GRV, q_at = _at(q_NGRK, i), _at(do_NGRV, i), _at(q_coordinates, i)
        # Transposed once here: XLA's CPU dots would otherwise transpose them again for every key tile.
        q_GKR, do_GVR = lax.optimization_barrier((q_GRK.swapaxes(1, 2), do_GRV.swapaxes(1, 2)))
        lse_GR1, delta_GR1 = _at(lse_NGR, i)[..., None], _at(delta_NGR, i)[..., None]
        bias, of_row = (jax.tree.map(lambda x: _at(x, _run(i, N, len(x))), of) for of in (bias_P, limits))

        def key_tile(j, k_at, carry):
            dq_GRK, dk_MGKk, dv_MGVk, dbias = carry
            k_GkK, v_GkV = _tile(static, keys, j), _tile(static, values, j)
            s_GRk = _scores(static, q_GRK, k_GkK, q_at, k_at, of_row)
            p_GRk = jnp.exp(_biased(s_GRk, bias, q_at, k_coordinates, j) - lse_GR1)
            dp_GRk = _times_factors(_dot("grv,gcv->grc", do_GRV, v_GkV), dropout, i, j)
            ds_GRk = p_GRk * (dp_GRk - delta_GR1)
            if bias is not None:
                ds_Hqk = ds_GRk.reshape(-1, static.q_tile, tile)
                of_tile = biases.of_dense(bias, ds_Hqk, *_pairs(q_at, _at(k_coordinates, j)))
                dbias = jax.tree.map(jnp.add, dbias, of_tile)
            if static.softcap:
                ds_GRk = ds_GRk * jnp.where(s_GRk > MASKED, 1 - jnp.square(s_GRk / static.softcap), 0)
            p_GRk = _times_factors(p_GRk, dropout, i, j)
            p_GRk, ds_GRk = p_GRk.astype(v_GkV.dtype), ds_GRk.astype(k_GkK.dtype)
            dk_MGKk = _put(dk_MGKk, _at(dk_MGKk, j) + _dot("gdr,grc->gdc", q_GKR, ds_GRk), j)
            dv_MGVk = _put(dv_MGVk, _at(dv_MGVk, j) + _dot("gvr,grc->gvc", do_GVR, p_GRk), j)
            return dq_GRK + _dot("grc,gcd->grd", ds_GRk, k_GkK), dk_MGKk, dv_MGVk, dbias

        carry = jnp.zeros((G, R, K), acc), *gradients[1:3], jax.tree.map(lambda x: jnp.zeros(x.shape, acc), bias)
        dq_GRK, dk_MGKk, dv_MGVk, dbias = _over_tiles(lists, i, key_tile, carry, k_coordinates)
        dbias_P = jax.tree.map(lambda x, d: _put(x, d + _at(x, run := _run(i, N, len(x))), run), gradients[3], dbias)
        return _put(gradients[0], dq_GRK, i), dk_MGKk, dv_MGVk, dbias_P

    zeros = (
        jnp.zeros((N, G, R, K), acc), jnp.zeros((M, G, K, tile), acc), jnp.zeros((M, G, V, tile), acc),
        jax.tree.map(lambda x: jnp.zeros(x.shape, acc), bias_P),
    )  # fmt: skip
    dq_NGRK, dk_MGKk, dv_MGVk, dbias_P = lax.fori_loop(0, N, query_tile, zeros)
    return dq_NGRK, dk_MGKk, dv_MGVk, dbias_P


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
