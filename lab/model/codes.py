"""What is added to the embedding of a token for where it stands: modules of (config.model, key) of coordinates.

Every layer reads the one embedding: of a pattern the first entry that has a code gives it to all, and entries whose
codes differ are refused.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.model import parameter, parametrization, slots
from lab.model.extrapolation import LENGTHS
from lab.model.parameter import FixedTable
from lab.options import Option


class FourierCode(nnx.Module):
    """sin and cos of the branch number, added to the embedding (the code of arXiv 1706.03762, section 3.5, base 10000).

    Scaled so that its mean square is that of a token embedding, times model.embedding_scale, when training starts.
    """

    options: ClassVar[dict[str, Option]] = {}  # that make it another
    of: ClassVar[str] = "branch"

    def __init__(self, model, key: jax.Array | None = None):
        if model.dim % 2:
            raise UserError(
                f"model.dim = {model.dim} must be even: the code of model.position.name = {model.position.name!r} is "
                "made of pairs"
            )
        self.frequencies = FixedTable(
            jnp.asarray(10_000.0 ** (-2.0 * np.arange(model.dim // 2) / model.dim), jnp.float32)
        )
        self.amplitude = (2 * parametrization.wider(model) / model.dim) ** 0.5 * model.embedding_scale

    def __call__(self, coordinates: Coordinates) -> jax.Array:
        angle = getattr(coordinates, self.of)[..., None] * self.frequencies[...]
        return self.amplitude * jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class SinusoidalCode(FourierCode):
    """The same of the time: the code as it was proposed, all sines before all cosines."""

    of = "time"


class LearnedCode(nnx.Module):
    """A vector for each time 0..position.length - 1, drawn like token embeddings; it decays as they do, as in GPT-2."""

    options: ClassVar[dict[str, Option]] = {"length": LENGTHS["length"]}

    def __init__(self, model, key: jax.Array):
        shape = self.length, _ = model.position.length, model.dim
        key = jax.random.fold_in(key, 3 + model.layers)  # beside those of the transformer
        spread = (parametrization.wider(model) / model.dim) ** 0.5
        self.table = parameter.table(key, shape, ("position", "embed"), spread, decay=True)

    def __call__(self, coordinates: Coordinates) -> jax.Array:
        """[B, T, D]. Raises UserError for a token at a time without a vector, where times are known; where they are
        traced its vector is nan: it would be given the last one."""
        segment_BT, time_BT = slots.known(coordinates.segment), slots.known(coordinates.time)
        if segment_BT is not None and time_BT is not None:
            check_time("a token is", int(time_BT[segment_BT >= 0].max(initial=0)), self.length)
        lost_BT = (coordinates.segment >= 0) & (coordinates.time >= self.length)
        return jnp.where(lost_BT[..., None], jnp.nan, self.table[...][coordinates.time])


def check_time(what: str, time: int, length: int) -> None:
    """Refuses a time that has no learned vector."""
    if time >= length:
        raise UserError(
            f"{what} at time {time}, beyond model.position.length = {length}: model.position.name = 'learned' has "
            f"vectors for times up to {length - 1}; choose shorter texts, or a length of at least {time + 1}"
        )
