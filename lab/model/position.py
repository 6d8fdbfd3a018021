"""Where the position of a token enters: rotary angles of queries and keys, and what is added to the embedding.

F = R / 2 rotary pairs, where R of the K dimensions of a head rotate, its last; pair p = 0 is the fastest. Of these R,
p and p + F form pair p (the rotate-half convention, lab.kernels.rotary).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels.rotary import rotation
from lab.model.parameter import FixedTable
from lab.options import Option


class Encoding(NamedTuple):
    """How the position of tokens enters: radians per unit of index, branch and time for each of the rotary pairs of R
    dimensions, and what is added to the embedding of the tokens, made from the model config."""

    frequencies: Callable[..., dict[str, np.ndarray]]  # of (R, config.model.position)
    options: Mapping[str, Option]
    code: Callable | None = None


def rope2d_frequencies(R: int, position) -> dict[str, np.ndarray]:
    """Radians per unit of index, branch and time for each pair, [F] each: interleaved 2D RoPE.

    Of F pairs, the n = round(F * ratio) slowest are selected; among them even ones rotate by stride * branch, odd ones
    by time. The others rotate by the flat index, or by time (position.unselected). inv_p = theta^(-2 p / R).
    """
    F = R // 2
    pair = np.arange(F)
    inverse = position.theta ** (-2.0 * pair / R)
    n = round(F * position.ratio)
    selected = pair >= F - n
    even = (pair - (F - n)) % 2 == 0
    return {
        "index": np.where(~selected & (position.unselected == "index"), inverse, 0.0),
        "branch": np.where(selected & even, position.stride * inverse, 0.0),
        "time": np.where((selected & ~even) | (~selected & (position.unselected == "time")), inverse, 0.0),
    }


def time_frequencies(R: int, position) -> dict[str, np.ndarray]:
    """One-dimensional RoPE over time: what Fourier branch codes leave to the rotation."""
    inverse = position.theta ** (-2.0 * np.arange(R // 2) / R)
    return {"index": 0 * inverse, "branch": 0 * inverse, "time": inverse}


class FourierCode(nnx.Module):
    """sin and cos of the branch number, added to the embedding (the code of arXiv 1706.03762, section 3.5, base 10000).

    Scaled so that its mean square is that of a token embedding when training starts.
    """

    def __init__(self, model):
        if model.dim % 2:
            raise UserError(f"model.dim = {model.dim} must be even: a fourier code is made of pairs")
        self.frequencies = FixedTable(
            jnp.asarray(10_000.0 ** (-2.0 * np.arange(model.dim // 2) / model.dim), jnp.float32)
        )
        self.amplitude = (2 / model.dim) ** 0.5

    def __call__(self, coordinates: Coordinates) -> jax.Array:
        angle = coordinates.branch[..., None] * self.frequencies[...]
        return self.amplitude * jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


ROTARY = {
    "theta": Option(1e4, "base of the rotary frequencies", above=0),
    "dim": Option(0, "dimensions at the end of a head that rotate; 0: all", least=0),
    "table": Option("own", "own: frequencies of a head of that many; head: the fastest of the whole head's",
                    choices=("own", "head")),
}  # fmt: skip
BRANCHED = {
    "ratio": Option(0.0, "share of the rotary pairs that carry branch and time", least=0, most=1),
    "stride": Option(128, "time steps that a branch is worth", least=1),
    "unselected": Option("index", "what rotates the other pairs", choices=("index", "time")),
}

POSITIONS = {
    "rope2d": Encoding(rope2d_frequencies, ROTARY | BRANCHED),
    "fourier": Encoding(time_frequencies, ROTARY, code=FourierCode),
}


def rotary_dim(model) -> int:
    """Dimensions of a head that rotate, R."""
    return model.position.dim or model.mixer.head_dim


def frequencies(model) -> dict[str, np.ndarray]:
    """Radians per unit of index, branch and time for each rotated pair, [R / 2] each."""
    R, chosen = rotary_dim(model), model.position.copy_and_resolve_references()
    if chosen.table == "head":  # theta'^(-2p/R) = theta^(-2p/K): the fastest R / 2 pairs of the whole head's table
        chosen.theta **= R / model.mixer.head_dim
    return POSITIONS[chosen.name].frequencies(R, chosen)


def check(model) -> None:
    """Refuses rotary dimensions that a head has no place for."""
    R, field = rotary_dim(model), "model.position.dim" if model.position.dim else "model.mixer.head_dim"
    if R < 2 or R % 2:
        raise UserError(f"{field} = {R} must be even and at least 2: rotary dimensions come in pairs")
    if model.mixer.head_dim < R:
        raise UserError(
            f"model.position.dim = {R} is above model.mixer.head_dim = {model.mixer.head_dim}; choose an even number "
            "up to it, or 0 for all"
        )


def pair_counts(model) -> dict[str, int]:
    """How many rotary pairs carry the branch, the time and the index."""
    found = frequencies(model)
    return {name: int(np.count_nonzero(found[name])) for name in ("branch", "time", "index")}


class Rotary(nnx.Module):
    """angle(token, p) = index w_index[p] + branch w_branch[p] + time w_time[p]: one table, and a leaf of the model."""

    def __init__(self, model):
        found = frequencies(model)
        self.frequencies = FixedTable(
            jnp.asarray(np.stack([found[n] for n in ("index", "branch", "time")]), jnp.float32)
        )

    def __call__(self, coordinates: Coordinates) -> tuple[jax.Array, jax.Array]:
        """cos and sin of the angles, float32 [B, T, 1, R / 2]."""
        return rotation(coordinates, self.frequencies[...])
