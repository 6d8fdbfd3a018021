"""Attention and its derivatives as matrices of float64, in NumPy: independent of the code under test."""

import numpy as np


def attend(s_BHTS, v_BSGV, seen_BTS, do_BTHV, dlse_BTH, bias_BHTS=0.0, softcap=None, kept_BHTS=1.0):
    """((o_BTHV, lse_BTH), (of s_BHTS, of bias_BHTS, of v_BSGV)) for scores before the cap, and cotangents of both.

    kept_BHTS: what probabilities are multiplied with.
    """
    B, H, _, S = s_BHTS.shape
    G = v_BSGV.shape[2]
    v_BSHV = np.repeat(np.asarray(v_BSGV, np.float64), H // G, axis=2)
    do_BTHV, dlse_BHT1 = np.asarray(do_BTHV, np.float64), np.moveaxis(np.asarray(dlse_BTH, np.float64), 2, 1)[..., None]
    slope = 1.0
    if softcap:
        s_BHTS = softcap * np.tanh(s_BHTS / softcap)
        slope = 1 - (s_BHTS / softcap) ** 2
    seen = np.broadcast_to(seen_BTS[:, None], s_BHTS.shape)
    x = np.where(seen, s_BHTS + bias_BHTS, -np.inf)
    saw = seen.any(-1, keepdims=True)
    top = np.where(saw, x.max(-1, keepdims=True), 0)
    e = np.exp(x - top)
    total = np.where(saw, e.sum(-1, keepdims=True), 1)
    p = e / total
    o_BTHV = np.einsum("bhts,bshv->bthv", p * kept_BHTS, v_BSHV)
    lse_BTH = np.moveaxis(np.where(saw, top + np.log(total), -np.inf)[..., 0], 1, 2)
    dp = kept_BHTS * np.einsum("bthv,bshv->bhts", do_BTHV, v_BSHV)
    dbias = p * (dp - (p * dp).sum(-1, keepdims=True) + dlse_BHT1)
    dv_BSGV = np.einsum("bhts,bthv->bshv", p * kept_BHTS, do_BTHV).reshape(B, S, G, H // G, -1).sum(3)
    return (o_BTHV, lse_BTH), (dbias * slope, dbias, dv_BSGV)


def scores(q_BTHK, k_BSGK, scale: float):
    """scale q k^T, [B, H, T, S]."""
    q, k = np.asarray(q_BTHK, np.float64), np.asarray(k_BSGK, np.float64)
    return scale * np.einsum("bthk,bshk->bhts", q, np.repeat(k, q.shape[2] // k.shape[2], axis=2))


def of_scores(ds_BHTS, q_BTHK, k_BSGK, scale: float):
    """Gradients of q and k."""
    q, k = np.asarray(q_BTHK, np.float64), np.asarray(k_BSGK, np.float64)
    B, S, G, K = k.shape
    R = q.shape[2] // G
    dk_BSHK = scale * np.einsum("bhts,bthk->bshk", ds_BHTS, q)
    dq_BTHK = scale * np.einsum("bhts,bshk->bthk", ds_BHTS, np.repeat(k, R, axis=2))
    return dq_BTHK, dk_BSHK.reshape(B, S, G, R, K).sum(3)


def same_segment(queries, keys):
    """bool [B, T, S]: neither is padding, and both are of one segment."""
    return (queries.segment[:, :, None] == keys.segment[:, None, :]) & (keys.segment[:, None, :] >= 0)
