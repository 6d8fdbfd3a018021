"""The loops of lab.kernels.tiled: over query tiles and their lists of key tiles, forward and backward.

N query tiles of all rows of the batch, M key tiles; q and k: tokens of a tile; R = H / G * q rows. P runs of query
tiles have a bias each: a single one, but under jax.vmap.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lab.coordinates import Coordinates
from lab.kernels import bias as biases
from lab.kernels.bias import Bias
from lab.kernels.dropout import factors
from lab.kernels.rules import Rule, visible
from lab.kernels.tiles import Tiles

AT_ONCE = 2**17  # numbers of keys that lists are read together up to: more do not stay in a cache
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


def _at(x, i):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, keepdims=False), x)


def _put(x, value, i):
    return lax.dynamic_update_index_in_dim(x, value, i, 0)


def _dot(spec: str, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _scores(static: TiledStatic, q_GRK, k_GkK, q_at: Coordinates, k_at: Coordinates | None, limits):
    """Scaled and capped scores [G, R, k], MASKED where the rule hides; k_at None: nothing of this tile is hidden.

    limits: as `_in_one_table` has them, or None.
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


def _in_one_table(q_coordinates: Coordinates, limits):
    """Coordinates of query tiles with nodes of one table [B M, M] of all rows, instead of one [M, M] of each."""
    if limits is None:
        return q_coordinates, None
    B, M, _ = limits.shape
    row_N1 = _run(jnp.arange(len(q_coordinates.node)), len(q_coordinates.node), B)[:, None]
    node = q_coordinates.node + M * row_N1
    return dataclasses.replace(q_coordinates, node=node), limits.reshape(B * M, M)


def _of_run(bias_P: Bias | None, i, N: int) -> Bias | None:
    return jax.tree.map(lambda x: x[0] if len(x) == 1 else _at(x, _run(i, N, len(x))), bias_P)


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


def _tile(static: TiledStatic, x, j):
    """[G, k, ..] of keys or values [M, k, G, ..] of a step, else [M, G, k, ..]; [M, k, ..] are of one group."""
    tile = _at(x, j)
    if tile.ndim == 2:
        return tile[None]
    return tile.swapaxes(0, 1) if static.step else tile


def forward(static, q_NGRK, keys, values, q_coordinates, k_coordinates, lists, bias_P, dropout, limits):
    """(o_NGRV, lse_NGR) for scaled queries."""
    q_coordinates, limits = _in_one_table(q_coordinates, limits)
    N, G, R, _ = q_NGRK.shape
    V = values.shape[-1]
    acc = jnp.promote_types(q_NGRK.dtype, jnp.float32)
    nothing = jnp.zeros((G, R, V), acc), jnp.full((G, R), MASKED, acc), jnp.zeros((G, R), acc)

    def add(i, q_GRK, q_at, j, k_at, carry):
        """What query tile i has seen, with key tile j."""
        o_GRV, max_GR, sum_GR = carry
        s_GRk = _scores(static, q_GRK, _tile(static, keys, j), q_at, k_at, limits)
        s_GRk = _biased(s_GRk, _of_run(bias_P, i, N), q_at, k_coordinates, j)
        new_GR = jnp.maximum(max_GR, s_GRk.max(-1))
        p_GRk = jnp.exp(s_GRk - new_GR[..., None])
        shrink_GR = jnp.exp(max_GR - new_GR)
        v_GkV = _tile(static, values, j)
        kept_GRk = _times_factors(p_GRk, dropout, i, j).astype(v_GkV.dtype)
        o_GRV = o_GRV * shrink_GR[..., None] + _dot("grc,gcv->grv", kept_GRk, v_GkV)
        return o_GRV, new_GR, sum_GR * shrink_GR + p_GRk.sum(-1)

    def end(q_at, carry):
        o_GRV, max_GR, sum_GR = carry
        # A row that saw nothing has kept its first maximum, or has summed exp(0) over hidden keys.
        saw_GR = (max_GR > MASKED) & _rows(q_at, R)[:, 0]
        o_GRV = jnp.where(saw_GR[..., None], o_GRV / jnp.where(saw_GR, sum_GR, 1)[..., None], 0)
        lse_GR = jnp.where(saw_GR, max_GR + jnp.log(jnp.where(saw_GR, sum_GR, 1)), -jnp.inf)
        return o_GRV.astype(q_NGRK.dtype), lse_GR

    def one(i, outputs):
        q_GRK, q_at = _at(q_NGRK, i), _at(q_coordinates, i)
        carry = _over_tiles(lists, i, functools.partial(add, i, q_GRK, q_at), nothing, k_coordinates)
        return jax.tree.map(lambda x, found: _put(x, found, i), outputs, end(q_at, carry))

    def several(turn, outputs):
        begin = jnp.minimum(turn * at_once, N - at_once)  # the last turn may do again what was done
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=begin, slice_size=at_once)
        q_UGRK, q_at, own = jax.tree.map(cut, (q_NGRK, q_coordinates, lists))
        i_U = begin + jnp.arange(at_once)

        def key_tiles(x, carry):
            j_U = own.keys[:, x]
            k_at = k_coordinates.map(lambda numbers: numbers[j_U])
            listed_U1 = (x < own.total)[:, None]  # behind the end of its list a query sees nothing
            k_at = dataclasses.replace(k_at, segment=jnp.where(listed_U1, k_at.segment, -1))
            return jax.vmap(add)(i_U, q_UGRK, q_at, j_U, k_at, carry)

        carry = jax.tree.map(lambda x: jnp.broadcast_to(x, (at_once, *x.shape)), nothing)
        found = jax.vmap(end)(q_at, lax.fori_loop(0, own.total.max(), key_tiles, carry))
        return jax.tree.map(lambda x, found: lax.dynamic_update_slice_in_dim(x, found, begin, 0), outputs, found)

    at_once = _lists_at_once(static, N, keys[0].size)
    outputs = jnp.zeros((N, G, R, V), q_NGRK.dtype), jnp.zeros((N, G, R), acc)
    return lax.fori_loop(0, -(-N // at_once), one if at_once == 1 else several, outputs)


def _lists_at_once(static: TiledStatic, N: int, numbers: int) -> int:
    """How many of N lists the turns of one loop read, for key tiles of so many numbers.

    A turn of a list with a single query is a few small operations, each of which takes longer to begin than to do.
    """
    return max(1, min(N, AT_ONCE // numbers)) if static.step and static.q_tile == 1 else 1


def backward(
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
    q_coordinates, limits = _in_one_table(q_coordinates, limits)
    N, G, R, K = q_NGRK.shape
    M, V, tile = len(values), values.shape[-1], static.k_tile
    acc = lse_NGR.dtype

    def query_tile(i, gradients):
        q_GRK, do_GRV, q_at = _at(q_NGRK, i), _at(do_NGRV, i), _at(q_coordinates, i)
        # Transposed once here: XLA's CPU dots would otherwise transpose them again for every key tile.
        q_GKR, do_GVR = lax.optimization_barrier((q_GRK.swapaxes(1, 2), do_GRV.swapaxes(1, 2)))
        lse_GR1, delta_GR1 = _at(lse_NGR, i)[..., None], _at(delta_NGR, i)[..., None]
        bias = _of_run(bias_P, i, N)

        def key_tile(j, k_at, carry):
            dq_GRK, dk_MGKk, dv_MGVk, dbias = carry
            k_GkK, v_GkV = _tile(static, keys, j), _tile(static, values, j)
            s_GRk = _scores(static, q_GRK, k_GkK, q_at, k_at, limits)
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
