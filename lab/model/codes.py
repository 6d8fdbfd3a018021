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
    of: ClassVar[str] = "time"

    def __init__(self, model, key: jax.Array):
        shape = self.rows, _ = self.rows_of(model.position), model.dim
        key = jax.random.fold_in(key, 3 + model.layers)  # beside those of the transformer
        spread = (parametrization.wider(model) / model.dim) ** 0.5
        self.table = parameter.table(key, shape, ("position", "embed"), spread, decay=True)

    def __call__(self, coordinates: Coordinates) -> jax.Array:
        """[B, T, D]. Raises UserError for a token at a place without a vector, where places are known; where they are
        traced its vector is nan: it would be given the last one."""
        place_BT = getattr(coordinates, self.of)
        segment_BT, known_BT = slots.known(coordinates.segment), slots.known(place_BT)
        if segment_BT is not None and known_BT is not None:
            self.check("a token is", int(known_BT[segment_BT >= 0].max(initial=0)), self.rows)
        lost_BT = (coordinates.segment >= 0) & (place_BT >= self.rows)
        return jnp.where(lost_BT[..., None], jnp.nan, self.table[...][place_BT])

    @staticmethod
    def rows_of(position) -> int:
        """How many vectors config.model.position asks for."""
        return position.length

    @staticmethod
    def check(what: str, time: int, rows: int) -> None:
        """Refuses a time that has no vector."""
        if time >= rows:
            raise UserError(
                f"{what} at time {time}, beyond model.position.length = {rows}: model.position.name = 'learned' has "
                f"vectors for times up to {rows - 1}; choose shorter texts, or a length of at least {time + 1}"
            )


class LearnedBranchCode(LearnedCode):
    """A vector for each branch number 1..position.branches and one for the prompt, drawn in the same way: the thought
    embeddings of arXiv 2509.04475, but added to the embedding of a token and not to each layer's keys and values.

    A number beyond them is refused, not wrapped: two branches of one vector could not be told apart.
    """

    options: ClassVar[dict[str, Option]] = {
        "branches": Option(64, "the highest number of a branch; each has a vector", least=1, most=2**16)
    }
    of = "branch"

    @staticmethod
    def rows_of(position) -> int:
        return position.branches + 1

    @staticmethod
    def check(what: str, branch: int, rows: int) -> None:
        """Refuses a branch that has no vector."""
        if branch >= rows:
            raise UserError(
                f"{what} of branch {branch}, beyond model.position.branches = {rows - 1}: model.position.name = "
                f"'learned-branch' has vectors for branches up to that; choose fewer branches, or at least {branch}"
            )
