"""What the attention kernels of every Pallas backend compute alike, whichever way the scores s lie: [R, k] or [k, R].

Letters as in lab.kernels.folding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lab.coordinates import Coordinates
from lab.kernels.rules import Rule

ANGLED = np.array([3, 1, 2])  # of the four rows of coordinates: index, branch and time, as frequencies have them
MASKED = -1e30  # not -inf: a tile may hide every key of a query, and inf - inf is nan


class Static(NamedTuple):
    """What the program is compiled for."""

    rule: Rule
    scale: float
    softcap: float  # 0: none
    interpret: bool


def fields(coordinates: Coordinates, tile: int, heads: int):
    """Coordinates of each row of a tile, int32 [tiles, 4, heads * tile]."""
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
