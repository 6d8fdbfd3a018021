"""Where a token stands: the one description that masks, rotary angles, packing and decoding are functions of."""

import dataclasses

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coordinates:
    """Four int32 arrays of one shape, usually [B, T]; a fifth where texts fork (`limits` of lab.kernels.attend).

    segment: which packed group the token belongs to; -1 is padding, and an empty cache slot.
    branch: 0 is the shared prompt, 1, 2, ... are the parallel texts of the segment.
    time: position within the branch; prompt first, every branch starts where the prompt ends (plus its offset).
    index: position within the segment as laid out, 0, 1, ...
    node: of a tree of texts, which one the token belongs to: a row of the table that says how far one sees another.
    """

    segment: jax.Array | np.ndarray
    branch: jax.Array | np.ndarray
    time: jax.Array | np.ndarray
    index: jax.Array | np.ndarray
    node: jax.Array | np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.segment.shape

    def map(self, function) -> "Coordinates":
        """The same function applied to each of the arrays."""
        return jax.tree.map(function, self)

    @classmethod
    def single(cls, batch: int, length: int, start: int = 0) -> "Coordinates":
        """One ordinary text per row: segment 0, branch 1, time = index = start, start + 1, ..."""
        zeros = np.zeros((batch, length), np.int32)
        positions = zeros + np.arange(start, start + length, dtype=np.int32)
        return cls(segment=zeros, branch=zeros + 1, time=positions, index=positions)

    @classmethod
    def padding(cls, batch: int, length: int) -> "Coordinates":
        """Nothing but padding: what an empty cache holds."""
        zeros = np.zeros((batch, length), np.int32)
        return cls(segment=zeros - 1, branch=zeros, time=zeros, index=zeros)
