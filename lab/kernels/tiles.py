"""Which tiles of the attention matrix are worth computing, found from the ranges of their coordinates.

n query tiles, m key tiles; q and k are the tile sizes. Padding (segment -1) is left out of every range.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lab.coordinates import Coordinates
from lab.kernels.rules import Range, Rule


class Tiles(NamedTuple):
    """For each query tile, the key tiles it needs: first those that need no mask, then those that do.

    keys: int32 [B, n, m], the first `total` of each row are meant. full, total: int32 [B, n].
    """

    keys: jax.Array
    full: jax.Array
    total: jax.Array


def pad_to_tiles(coordinates: Coordinates, tile: int) -> Coordinates:
    """Coordinates [B, T] padded with segment -1 to a multiple of the tile size."""
    short = -coordinates.shape[1] % tile
    pad = lambda x, value: jnp.pad(x, ((0, 0), (0, short)), constant_values=value)  # noqa: E731
    return Coordinates(pad(coordinates.segment, -1), *(pad(x, 0) for x in
                       (coordinates.branch, coordinates.time, coordinates.index)))  # fmt: skip


def tile_ranges(coordinates: Coordinates, tile: int) -> tuple[Coordinates, jax.Array, jax.Array]:
    """Ranges [B, n] of each field over the tokens of a tile, whether it has any token, and whether it has padding."""
    tiled = coordinates.map(lambda x: x.reshape(x.shape[0], -1, tile))
    real = tiled.segment >= 0
    limit = jnp.iinfo(jnp.int32).max // 4  # far from overflow when a rule adds or subtracts two of them

    def span(x):
        return Range(jnp.where(real, x, limit).min(-1), jnp.where(real, x, -limit).max(-1))

    return Coordinates(*map(span, (tiled.segment, tiled.branch, tiled.time, tiled.index))), real.any(-1), ~real.all(-1)


def make_tiles(rule: Rule, q: Coordinates, k: Coordinates, q_tile: int, k_tile: int) -> Tiles:
    """Tile lists for query coordinates [B, T] and key coordinates [B, S], both multiples of their tile sizes."""
    q_ranges, q_any, _ = tile_ranges(q, q_tile)
    k_ranges, k_any, k_padded = tile_ranges(k, k_tile)
    rows, columns = (
        Coordinates(*(Range(widen(r.low), widen(r.high)) for r in (c.segment, c.branch, c.time, c.index)))
        for c, widen in ((q_ranges, lambda x: x[:, :, None]), (k_ranges, lambda x: x[:, None, :]))
    )
    same = Range(
        (rows.segment.low == rows.segment.high)
        & (columns.segment.low == columns.segment.high)
        & (rows.segment.low == columns.segment.low),
        (rows.segment.low <= columns.segment.high) & (columns.segment.low <= rows.segment.high),
    )
    certainly, possibly = rule.visible_range(rows, columns)
    # Padded queries in a full tile do no harm: their output is dropped. Padded keys would be seen.
    full = same.low & certainly & q_any[:, :, None] & (k_any & ~k_padded)[:, None, :]
    some = same.high & possibly & q_any[:, :, None] & k_any[:, None, :]
    order = jnp.argsort(jnp.where(full, 0, jnp.where(some, 1, 2)), axis=-1, stable=True)
    count = lambda x: x.sum(-1, dtype=jnp.int32)  # noqa: E731
    return Tiles(order.astype(jnp.int32), count(full & some), count(some))
