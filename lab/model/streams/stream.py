"""What every stream is, and the plain one."""

from typing import ClassVar

import jax
import numpy as np
from flax import nnx

from lab.coordinates import Coordinates
from lab.model.placement import OF_SUBLAYERS, PLACEMENTS
from lab.options import Option


class Stream(nnx.Module):
    """How outputs of sublayers are combined. Layer m of 0..L-1 is `block`: mix(x) is Attn(n1(x)), feed(h) MLP(n2(h)),
    and block(x) the plain residual layer. Which norms n1, n2 there are is the placement's to say.

    A state of fixed size may be scanned over layers, m is then traced; one that grows is not, and m is an int. This is
    the plain residual; a stream says where it differs. What layers have alike lives in their blocks (`of_layer`), the
    rest here. A placement that norms the sum is for Plain, which leaves the sum to it.
    """

    grows: ClassVar[bool] = False  # whether the state grows with the layers
    needs: ClassVar[int] = 1  # layers, to mean anything
    mixers: ClassVar[tuple[str, ...] | None] = None  # those that it can look into; None: it need not
    adds: ClassVar[bool] = True  # whether layers keep what a position adds to their scores
    placements: ClassVar[tuple[str, ...]] = OF_SUBLAYERS  # those under which it means something
    shares_norm: ClassVar[bool] = False  # whether a layer's feed-forward reads what its mixer does, normed once
    options: ClassVar[dict[str, Option]] = {}
    reads: ClassVar[tuple[str, ...]] = ()  # further options of the model that it reads
    replaces: ClassVar[tuple[str, ...]] = ()  # those that mean nothing beside it

    def __init__(self, model, key: jax.Array):
        self.name = model.stream.name

    @classmethod
    def check(cls, model) -> None:
        """Refuses what else of a model it cannot work on, naming the field and the valid choices."""

    def place(self, x_BTD: jax.Array, coordinates: Coordinates) -> jax.Array:
        """The embedding of tokens where they stand: as it is, unless it has no weights for their positions."""
        return x_BTD

    @staticmethod
    def of_layer(model, key: jax.Array, m: jax.Array) -> nnx.Module | None:
        """Parameters of layer m, of one shape in all."""
        return None

    def init_cache(self, batch: int, length: int, dtype) -> tuple:
        """What it keeps of tokens beside the caches of the layers, empty."""
        return ()

    def start(self, x_BTD: jax.Array, cache: tuple | None):
        """The state before layer 0, of the embedding."""
        return x_BTD

    def layer(self, x_BTD, block, view, cache, *, m):
        """The state after layer m, and the new cache of the layer."""
        return block(x_BTD, view, cache)

    def finish(self, x_BTD) -> tuple[jax.Array, tuple]:
        """What the head reads, and the new cache of the stream."""
        return x_BTD, ()

    def cached(self, mixers: list) -> tuple[tuple[int, int], ...]:
        """(groups, width) of each array that it keeps of a token beside the caches of the layers, given in order."""
        return ()

    def work_per_token(self, blocks: list, visible: list[float]) -> float:
        """Multiplications for a token beside those of the layers, given in order with the keys that a token sees."""
        return 0

    def mixing(self) -> dict[str, np.ndarray]:
        """Learned weights of layer i (column) in layer m (row) [L, L], by name; nan where there is none.

        [L, L + 1] where the embedding comes first.
        """
        return {}


class Plain(Stream):
    """The plain residual, under every placement."""

    placements = tuple(PLACEMENTS)
