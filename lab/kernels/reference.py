"""Attention as the formula says: the whole matrix, in one precision. For tests, and for reading."""

import jax
import jax.numpy as jnp

from lab.coordinates import Coordinates
from lab.kernels.bias import Bias, dense
from lab.kernels.dropout import Dropped, dropped
from lab.kernels.rules import Rule, visible


def attend(
    q_BTHK,
    k_BSGK,
    v_BSGV,
    q_coordinates: Coordinates,
    k_coordinates: Coordinates,
    rule: Rule,
    scale,
    softcap,
    bias: Bias | None = None,
    dropout: Dropped | None = None,
    limits=None,
):
    """Returns (o_BTHV, lse_BTH): softmax(scale q k^T, soft-capped, plus bias, over visible keys) v, and its log sum.

    Dropout is of the probabilities, and leaves the log sum as it is.
    """
    s_BGRTS = scores(q_BTHK, k_BSGK, scale)
    o_BTHV, lse_BTH = attend_scores(s_BGRTS, v_BSGV, q_coordinates, k_coordinates, rule, softcap, bias, dropout, limits)
    return o_BTHV.astype(q_BTHK.dtype), lse_BTH


def scores(q_BTHK, k_BSGK, scale):
    """scale q k^T [B, G, R, T, S] for R query heads of each group, in float32 or wider."""
    B, T, H, _ = q_BTHK.shape
    G = k_BSGK.shape[2]
    precision = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, -1).astype(precision)
    return scale * jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK.astype(precision))


def attend_scores(
    s_BGRTS,
    v_BSGV,
    q_coordinates: Coordinates,
    k_coordinates: Coordinates,
    rule: Rule,
    softcap,
    bias: Bias | None = None,
    dropout: Dropped | None = None,
    limits=None,
):
    """`attend` of scores, in their precision."""
    B, G, R, T, _ = s_BGRTS.shape
    p_BGRTS, lse_BGRT = probabilities(s_BGRTS, q_coordinates, k_coordinates, rule, softcap, bias, dropout, limits)
    o_BTGRV = jnp.einsum("bgrts,bsgv->btgrv", p_BGRTS, v_BSGV.astype(s_BGRTS.dtype))
    return o_BTGRV.reshape(B, T, G * R, -1), jnp.moveaxis(lse_BGRT, 3, 1).reshape(B, T, G * R)


def probabilities(
    s_BGRTS,
    q_coordinates: Coordinates,
    k_coordinates: Coordinates,
    rule: Rule,
    softcap,
    bias: Bias | None = None,
    dropout: Dropped | None = None,
    limits=None,
):
    """(p_BGRTS, lse_BGRT) of scores: the softmax over visible keys, of which some are dropped, zeros where none is
    visible; and its log sum."""
    if softcap:
        s_BGRTS = softcap * jnp.tanh(s_BGRTS / softcap)
    if bias is not None:
        pairs = q_coordinates.map(lambda x: x[:, :, None]), k_coordinates.map(lambda x: x[:, None, :])
        b_HBTS = dense(bias, *pairs, s_BGRTS.dtype)
        s_BGRTS = s_BGRTS + jnp.moveaxis(b_HBTS, 0, 1).reshape(s_BGRTS.shape)
    seen_B11TS = visible(rule, q_coordinates, k_coordinates, limits)[:, None, None]
    top_BGRT1 = jax.lax.stop_gradient(jnp.max(s_BGRTS, axis=-1, keepdims=True, where=seen_B11TS, initial=-1e30))
    p_BGRTS = jnp.where(seen_B11TS, jnp.exp(jnp.where(seen_B11TS, s_BGRTS - top_BGRT1, 0)), 0)
    sum_BGRT1 = p_BGRTS.sum(-1, keepdims=True)
    saw = sum_BGRT1 > 0
    lse_BGRT = jnp.where(saw, top_BGRT1 + jnp.log(jnp.where(saw, sum_BGRT1, 1)), -jnp.inf)[..., 0]
    p_BGRTS = p_BGRTS / jnp.where(saw, sum_BGRT1, 1)
    if dropout is not None:
        state_BGRT1 = jnp.moveaxis(dropout.states(), 2, 1).reshape(*lse_BGRT.shape, 1)
        p_BGRTS = dropped(p_BGRTS, state_BGRT1, dropout.key_BS[:, None, None, None], dropout.rate)
    return p_BGRTS, lse_BGRT
