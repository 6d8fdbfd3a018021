"""What the attention kernels of every Pallas backend compute alike, whichever way the scores s lie: [R, k] or [k, R].

Letters as in lab.kernels.folding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lab.coordinates import Coordinates
from lab.kernels.rules import Rule

MASKED = -1e30  # not -inf: a tile may hide every key of a query, and inf - inf is nan


class Static(NamedTuple):
    """What the program is compiled for."""

    rule: Rule
    scale: float
    softcap: float  # 0: none
    interpret: bool


def fields(coordinates: Coordinates, tile: int, heads: int):
    """Coordinates of each row of a tile, int32 [tiles, 4 or with nodes 5, heads * tile]."""
    stacked = jnp.stack([jnp.asarray(x).reshape(-1, tile) for x in jax.tree.leaves(coordinates)], axis=1)
    return jnp.tile(stacked, (1, 1, heads))


def dot(a, b, contract: tuple[int, int]):
    """Summed over one axis of each, in float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def capped(s, static: Static):
    return static.softcap * jnp.tanh(s / static.softcap) if static.softcap else s


def probabilities(s, lse, seen):
    """exp(s - lse) where `seen`, else 0; None: nothing of this tile is hidden."""
    p = jnp.exp(s - lse)
    return p if seen is None else jnp.where(seen, p, 0)


def score_gradients(static: Static, s, p, dp, delta):
    """Of the scores before the cap, from capped scores s, probabilities p, and the gradients dp of p."""
    ds = p * (dp - delta)
    return ds * (1 - jnp.square(s / static.softcap)) if static.softcap else ds


def of_rows(o_NCRV, lse_NCR, do_NCRV, dlse_NCR):
    """(lse, delta) [N, C, R] as the backward kernels want them; delta is what a row takes from each gradient of p."""
    saw_NCR = lse_NCR > -jnp.inf
    delta_NCR = (o_NCRV.astype(jnp.float32) * do_NCRV.astype(jnp.float32)).sum(-1) - jnp.where(saw_NCR, dlse_NCR, 0)
    return jnp.where(saw_NCR, lse_NCR, jnp.inf), delta_NCR  # rows that saw nothing: every probability is 0


def frequency_gradients(q, dq, q_at, frequencies_3F, heads: int):
    """Of the frequencies that queries [N, .., K] rotate by [3, F], from theirs; None without frequencies.

    With its angle a pair (a, b) moves by (-b, a), however far it is turned. heads: the axis of these; q_at: the four
    coordinates of tokens or rows, [N, 4, n].
    """
    if frequencies_3F is None:
        return None
    F = frequencies_3F.shape[1]
    (a, b), (da, db) = ((x[..., -2 * F : -F].astype(jnp.float32), x[..., -F:].astype(jnp.float32)) for x in (q, dq))
    of_angles_NnF = (a * db - b * da).sum(heads)
    _, branch, time, index = (q_at[:, i].astype(jnp.float32) for i in range(4))
    return jnp.einsum("nrf,inr->if", of_angles_NnF, jnp.stack([index, branch, time]), precision="highest")
