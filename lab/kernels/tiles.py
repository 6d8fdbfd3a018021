"""Which tiles of the attention matrix are worth computing, found from the ranges of their coordinates.

n query tiles, m key tiles; q and k are the tile sizes. Padding (segment -1) is left out of every range.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lab.coordinates import Coordinates
from lab.kernels.rules import Range, Rule

FULL, PARTIAL, EMPTY = range(3)  # tiles in the order of a list: no pair is hidden, some may be, all are
FEW = 8  # queries that each go on with a text of their own, but read all texts together, at no more cost
MANY = 64  # queries of a tile at most where there are more: each reads its own text by itself
WIDE, WIDE_FROM = 256, 1024  # keys of a tile that one query, or FEW, read, and of a row from which on FEW do
SHARED = 8  # keys for each query from which on reading them is what a call costs
FIRST, LAST, ADD_FULL, ADD_PARTIAL = 1, 2, 4, 8  # what a step does: begins and ends its tile, adds another to it


class Tiles(NamedTuple):
    """For each query tile, the key tiles it needs: first those that need no mask, then those that do.

    keys: int32 [B, n, m], the first `total` of each row are meant. full, total: int32 [B, n].
    """

    keys: jax.Array
    full: jax.Array
    total: jax.Array


def is_step(T: int, S: int) -> bool:
    """Whether T queries over S keys are a step of decoding: one tile of queries then reads each key once for all."""
    return T <= 256 and S >= SHARED * T


def key_tile(T: int, S: int) -> int:
    """Keys of a tile that T queries over S keys read: 64, or less for short inputs. One query, or a few over many keys,
    read larger tiles, so that a loop has fewer turns, if these divide S: none are copied to fill the last one."""
    larger = (WIDE, WIDE // 2) if T == 1 else (WIDE,) if T <= FEW and S >= WIDE_FROM else ()
    return next((tile for tile in larger if S % tile == 0), min(64, S))


def pad_to_tiles(coordinates: Coordinates, tile: int) -> Coordinates:
    """Coordinates [B, T] padded with segment -1 to a multiple of the tile size."""
    short = -coordinates.shape[1] % tile
    pad = lambda x, value: jnp.pad(x, ((0, 0), (0, short)), constant_values=value)  # noqa: E731
    node = None if coordinates.node is None else pad(coordinates.node, 0)
    return Coordinates(pad(coordinates.segment, -1), *(pad(x, 0) for x in
                       (coordinates.branch, coordinates.time, coordinates.index)), node)  # fmt: skip


def tile_ranges(coordinates: Coordinates, tile: int, xp=jnp) -> tuple[Coordinates, jax.Array, jax.Array]:
    """Ranges [B, n] of each field over the tokens of a tile, whether it has any token, and whether it has padding."""
    tiled = coordinates.map(lambda x: x.reshape(x.shape[0], -1, tile))
    real = tiled.segment >= 0
    return tiled.map(lambda x: _span(x, real, xp)), real.any(-1), ~real.all(-1)


def _span(x, real, xp) -> Range:
    """Of the numbers of each tile whose tokens are no padding; [B, n, tile] to [B, n]."""
    limit = np.iinfo(np.int32).max // 4  # far from overflow when a rule adds or subtracts two of them
    return Range(xp.where(real, x, limit).min(-1), xp.where(real, x, -limit).max(-1))


def _remainder_ranges(rule: Rule, q: Coordinates, k: Coordinates, q_tile: int, k_tile: int, xp) -> dict[tuple, Range]:
    """Ranges of the rule's remainders over the tokens of each tile, by their trees: [B, n, 1] of q, [B, 1, m] of k.

    A tile of every 64th time step has all times and one remainder, which the range of its times does not show.
    """
    found = {}
    for term in rule.remainders():
        at, tile, widen = (
            (q, q_tile, lambda x: x[:, :, None]) if term.sides() == {"q"} else (k, k_tile, lambda x: x[:, None, :])
        )
        values, real = (x.reshape(len(x), -1, tile) for x in (term.values(at, at), at.segment >= 0))
        found[term.tree] = Range(*map(widen, _span(values, real, xp)))
    return found


def tile_kinds(rule: Rule, q: Coordinates, k: Coordinates, q_tile: int, k_tile: int, xp=jnp, limits=None):
    """FULL, PARTIAL or EMPTY [B, n, m] for coordinates [B, T] and [B, S], multiples of their tile sizes.

    xp: the module whose arrays they are, jax.numpy or numpy. limits: int32 [B, M, M], of a rule that is `forked`.
    """
    q_ranges, q_any, _ = tile_ranges(q, q_tile, xp)
    k_ranges, k_any, k_padded = tile_ranges(k, k_tile, xp)
    rows, columns = (
        c.map(widen) for c, widen in ((q_ranges, lambda x: x[:, :, None]), (k_ranges, lambda x: x[:, None, :]))
    )
    same = Range(
        (rows.segment.low == rows.segment.high)
        & (columns.segment.low == columns.segment.high)
        & (rows.segment.low == columns.segment.low),
        (rows.segment.low <= columns.segment.high) & (columns.segment.low <= rows.segment.high),
    )
    remainders = _remainder_ranges(rule, q, k, q_tile, k_tile, xp)
    certainly, possibly = rule.visible_range(rows, columns, remainders, limits)
    # Padded queries in a full tile do no harm: their output is dropped. Padded keys would be seen.
    full = same.low & certainly & q_any[:, :, None] & (k_any & ~k_padded)[:, None, :]
    some = same.high & possibly & q_any[:, :, None] & k_any[:, None, :]
    return xp.where(some, xp.where(full, FULL, PARTIAL), EMPTY)


def make_tiles(
    rule: Rule, q: Coordinates, k: Coordinates, q_tile: int, k_tile: int, limits=None, parts: int = 1
) -> Tiles:
    """Tile lists for query coordinates [B, T] and key coordinates [B, S], both multiples of their tile sizes.

    With limits, tiles come in the order of their index, and those from the first that needs a mask on have one: where a
    text owns tiles whole, it meets them in its own order then, and what it is to the bit, wherever in the row they lie
    and whatever other texts are there, whose tiles add zeros. parts: into which each such list is dealt in turns, by
    index and branch, so that these too are what the text says: lists [B, parts * n, m], all n of a part together.
    """
    kind_Bnm = tile_kinds(rule, q, k, q_tile, k_tile, limits=limits)
    if limits is None:
        return _listed(kind_Bnm)
    of_tile = tile_ranges(k, k_tile)[0]
    part_Bm = (of_tile.index.low // k_tile + of_tile.branch.low) % parts
    dealt_Bpm = part_Bm[:, None] == jnp.arange(parts)[:, None]
    kind_Bpnm = jnp.where(dealt_Bpm[:, :, None], kind_Bnm[:, None], EMPTY)
    return _in_order(kind_Bpnm.reshape(len(kind_Bnm), -1, kind_Bnm.shape[2]), of_tile.index.low)


def _in_order(kind_Bnm, first_Bm) -> Tiles:
    """first: the number that key tiles are ordered by."""
    order = jnp.argsort(jnp.where(kind_Bnm == EMPTY, np.iinfo(np.int32).max, first_Bm[:, None]), axis=-1, stable=True)
    leading = jnp.cumprod(jnp.take_along_axis(kind_Bnm, order, axis=-1) == FULL, axis=-1, dtype=jnp.int32)
    return Tiles(order.astype(jnp.int32), leading.sum(-1), (kind_Bnm != EMPTY).sum(-1, dtype=jnp.int32))


def alike(tiles: Tiles) -> Tiles:
    """The same lists, with a mask for every tile. Whether a tile is full may depend on who else is in a row, and XLA's
    CPU compiler rounds capped scores otherwise in the loop of full tiles, where nothing stands between the cap and the
    softmax."""
    return tiles._replace(full=jnp.zeros_like(tiles.full))


class Lanes(NamedTuple):
    """Of queries that each go on with a text of their own: key tiles that tiles of several queries read, and those that
    each query reads by itself. Attention over both is merged."""

    together: Tiles
    alone: Tiles


def make_lanes(rule: Rule, q: Coordinates, k: Coordinates, q_tile: int, k_tile: int, limits) -> Lanes:
    """`make_tiles` of T queries whose own texts have the nodes below T; what requests may share has nodes from T on.

    A query reads by itself the tiles of own texts that it alone sees. What may be shared it reads together with others,
    be there any or not: they come and go, and its numbers must stay what they are to the bit.
    """
    T = q.shape[1]
    q = pad_to_tiles(q, q_tile)
    kind_BTm, of_tile = tile_kinds(rule, q, k, 1, k_tile, limits=limits), tile_ranges(k, k_tile)[0]
    seen_BTm, first_Bm = kind_BTm != EMPTY, of_tile.index.low
    alone_Bm = (seen_BTm.sum(1) == 1) & (of_tile.node.low < T)
    kind_Bnqm = kind_BTm.reshape(len(kind_BTm), -1, q_tile, kind_BTm.shape[2])
    padded_Bnq1 = (q.segment < 0).reshape(*kind_Bnqm.shape[:3], 1)
    full_Bnm, empty_Bnm = ((kind_Bnqm == FULL) | padded_Bnq1).all(2), (kind_Bnqm == EMPTY).all(2)
    kind_Bnm = jnp.where(empty_Bnm | alone_Bm[:, None], EMPTY, jnp.where(full_Bnm, FULL, PARTIAL))
    return Lanes(_in_order(kind_Bnm, first_Bm), _of_one(seen_BTm & alone_Bm[:, None], first_Bm))


def _of_one(seen_BTm, first_Bm) -> Tiles:
    """Lists of tiles that are each on one at most: all in one line, of which each query has a piece; all with masks."""
    m = first_Bm.shape[1]
    query_Bm = jnp.where(seen_BTm.any(1), seen_BTm.argmax(1), seen_BTm.shape[1])
    line_Bm = jnp.lexsort((first_Bm, query_Bm), axis=-1).astype(jnp.int32)
    total_BT = seen_BTm.sum(-1, dtype=jnp.int32)
    place_BTm = (total_BT.cumsum(-1) - total_BT)[..., None] + jnp.arange(m, dtype=jnp.int32)
    keys_BTm = jnp.take_along_axis(line_Bm[:, None], jnp.minimum(place_BTm, m - 1), axis=-1)
    return Tiles(keys_BTm, 0 * total_BT, total_BT)


class BothWays(NamedTuple):
    """The lists of query tiles, and those of key tiles, whose `keys` are the query tiles [B, m, n] that need each."""

    by_query: Tiles
    by_key: Tiles


def both_ways(tiles: Tiles) -> BothWays:
    """With the lists of key tiles, which the gradients of keys and values need."""
    return BothWays(tiles, _transposed(tiles))


def plan_both_ways(
    rule: Rule, q: Coordinates, k: Coordinates, q_tile: int, k_tile: int, limits=None, parts: int = 1
) -> BothWays:
    """The lists for coordinates of any length."""
    q, k = pad_to_tiles(q, q_tile), pad_to_tiles(k, k_tile)
    return both_ways(make_tiles(rule, q, k, q_tile, k_tile, limits, parts))


def _transposed(tiles: Tiles) -> Tiles:
    m = tiles.keys.shape[2]
    place = jnp.arange(m, dtype=jnp.int32)
    full, total = tiles.full[..., None], tiles.total[..., None]
    kind = jnp.where(place < full, FULL, jnp.where(place < total, PARTIAL, EMPTY))
    return _listed(jnp.take_along_axis(kind, jnp.argsort(tiles.keys, axis=-1), axis=-1).swapaxes(1, 2))


def _listed(kind_Bnm) -> Tiles:
    order = jnp.argsort(kind_Bnm, axis=-1, stable=True)
    count = lambda x: x.sum(-1, dtype=jnp.int32)  # noqa: E731
    return Tiles(order.astype(jnp.int32), count(kind_Bnm == FULL), count(kind_Bnm != EMPTY))


def cut(tiles: Tiles, own: int, listed: int) -> Tiles:
    """The lists of smaller tiles: each tile that has a list cut into `own`, each tile on a list into `listed`."""
    B, n, m = tiles.keys.shape
    keys = (tiles.keys[..., None] * listed + jnp.arange(listed, dtype=jnp.int32)).reshape(B, n, m * listed)
    return jax.tree.map(lambda x: jnp.repeat(x, own, axis=1), Tiles(keys, tiles.full * listed, tiles.total * listed))


class Steps(NamedTuple):
    """The lists of all rows of a batch end to end, for a grid that makes one step for each tile of a list.

    own, other: int32 [P], the tile that a step adds to and the one that it reads, counted through the batch. flags:
    what it does. count: int32 [], how many of the P are meant. A tile whose list is empty has one step, that only ends.
    """

    own: jax.Array
    other: jax.Array
    flags: jax.Array
    count: jax.Array


def in_line(tiles: Tiles) -> Steps:
    """The steps of the lists, in their order."""
    B, n, m = tiles.keys.shape
    lengths = jnp.maximum(tiles.total.reshape(-1), 1)
    ends = jnp.cumsum(lengths)
    own = jnp.repeat(jnp.arange(B * n, dtype=jnp.int32), lengths, total_repeat_length=B * n * m)
    place = jnp.arange(B * n * m, dtype=jnp.int32) - (ends - lengths)[own]
    other = tiles.keys.reshape(B * n, m)[own, jnp.minimum(place, m - 1)] + own // n * m
    full, total = tiles.full.reshape(-1)[own], tiles.total.reshape(-1)[own]
    kind = jnp.where(place < full, ADD_FULL, jnp.where(place < total, ADD_PARTIAL, 0))
    flags = kind + jnp.where(place == 0, FIRST, 0) + jnp.where(place == lengths[own] - 1, LAST, 0)
    return Steps(own, other, flags.astype(jnp.int32), ends[-1].astype(jnp.int32))
