"""Where the position of a token enters: rotary angles of queries and keys, and what is added to the embedding.

F = R / 2 rotary pairs, where R of the K dimensions of a head rotate, its last; pair p = 0 is the fastest. Of these R,
p and p + F form pair p (the rotate-half convention, lab.kernels.rotary).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lab.coordinates import Coordinates
from lab.errors import UserError, choose
from lab.kernels.rotary import rotation
from lab.model.parameter import Table


def rope2d_frequencies(head_dim: int, rotary) -> dict[str, np.ndarray]:
    """Radians per unit of index, branch and time for each pair, [F] each: interleaved 2D RoPE.

    Of F pairs, the n = round(F * ratio) slowest are selected; among them even ones rotate by stride * branch, odd ones
    by time. The others rotate by the flat index, or by time (rotary.unselected). inv_p = theta^(-2 p / K).
    """
    F = head_dim // 2
    pair = np.arange(F)
    inverse = rotary.theta ** (-2.0 * pair / head_dim)
    n = round(F * rotary.ratio)
    selected = pair >= F - n
    even = (pair - (F - n)) % 2 == 0
    return {
        "index": np.where(~selected & (rotary.unselected == "index"), inverse, 0.0),
        "branch": np.where(selected & even, rotary.stride * inverse, 0.0),
        "time": np.where((selected & ~even) | (~selected & (rotary.unselected == "time")), inverse, 0.0),
    }


def fourier_frequencies(head_dim: int, rotary) -> dict[str, np.ndarray]:
    """One-dimensional RoPE over time: what Fourier branch codes leave to the rotation."""
    inverse = rotary.theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    return {"index": 0 * inverse, "branch": 0 * inverse, "time": inverse}


FREQUENCIES = {"rope2d": rope2d_frequencies, "fourier": fourier_frequencies}


def rotary_dim(model) -> int:
    """Dimensions of a head that rotate, R."""
    return model.rotary.dim or model.head_dim


def frequencies(model) -> dict[str, np.ndarray]:
    """Radians per unit of index, branch and time for each rotated pair, [R / 2] each."""
    R, rotary = rotary_dim(model), model.rotary.copy_and_resolve_references()
    if rotary.table == "head":  # theta'^(-2p/R) = theta^(-2p/K): the fastest R / 2 pairs of the whole head's table
        rotary.theta **= R / model.head_dim
    return FREQUENCIES[model.position](R, rotary)


def check(model) -> None:
    """Refuses position settings that mean nothing."""
    choose("model.position", model.position, FREQUENCIES)
    choose("model.rotary.unselected", model.rotary.unselected, ("index", "time"))
    if not 0 <= model.rotary.ratio <= 1:
        raise UserError(f"model.rotary.ratio = {model.rotary.ratio} is outside 0..1")
    if not model.rotary.theta > 0:
        raise UserError(f"model.rotary.theta = {model.rotary.theta} must be positive")
    choose("model.rotary.table", model.rotary.table, ("own", "head"))
    R, field = rotary_dim(model), "model.rotary.dim" if model.rotary.dim else "model.head_dim"
    if R < 2 or R % 2:
        raise UserError(f"{field} = {R} must be even and at least 2: rotary dimensions come in pairs")
    if model.head_dim < R:
        raise UserError(
            f"model.rotary.dim = {R} is above model.head_dim = {model.head_dim}; choose an even number up to it, or 0 "
            "for all"
        )
    if model.position == "fourier" and model.dim % 2:
        raise UserError(f"model.dim = {model.dim} must be even: a fourier code is made of pairs")


def pair_counts(model) -> dict[str, int]:
    """How many rotary pairs carry the branch, the time and the index."""
    found = frequencies(model)
    return {name: int(np.count_nonzero(found[name])) for name in ("branch", "time", "index")}


class Rotary(nnx.Module):
    """angle(token, p) = index w_index[p] + branch w_branch[p] + time w_time[p]: one table, and a leaf of the model."""

    def __init__(self, model):
        found = frequencies(model)
        self.frequencies = Table(jnp.asarray(np.stack([found[n] for n in ("index", "branch", "time")]), jnp.float32))

    def __call__(self, coordinates: Coordinates) -> tuple[jax.Array, jax.Array]:
        """cos and sin of the angles, float32 [B, T, 1, R / 2]."""
        return rotation(coordinates, self.frequencies[...])


class FourierCode(nnx.Module):
    """sin and cos of the branch number, added to the embedding (the code of arXiv 1706.03762, section 3.5, base 10000).

    Scaled so that its mean square is that of a token embedding when training starts.
    """

    def __init__(self, model):
        self.frequencies = Table(jnp.asarray(10_000.0 ** (-2.0 * np.arange(model.dim // 2) / model.dim), jnp.float32))
        self.amplitude = (2 / model.dim) ** 0.5

    def __call__(self, coordinates: Coordinates) -> jax.Array:
        angle = coordinates.branch[..., None] * self.frequencies[...]
        return self.amplitude * jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
