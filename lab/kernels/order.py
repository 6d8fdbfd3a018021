"""The order of a row's tokens that leaves the fewest tiles to compute. NumPy, on the host.

Attention with coordinate masks commutes with permutation: where tokens lie in a row is free. Rules that see all
branches want the tokens of one time together, those that see one branch want branches together; those of every
n-th time step want patches: a few columns and a few rows of the times of a branch, written in rows of n.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lab.coordinates import Coordinates
from lab.kernels.rules import Rule
from lab.kernels.tiles import EMPTY, tile_kinds

GAIN = 0.9  # another order is taken where it leaves at most this share of the tiles of the given one


class Arranged(NamedTuple):
    """order: int [B, T], which token comes at each place. share: of tiles computed then, over rows and rules."""

    order: np.ndarray
    share: float


def arrange(
    coordinates: Coordinates, rules: Sequence[Rule], sizes: tuple[int, int] | None, free: bool = True
) -> Arranged:
    """The best of some orders for each row [B, T]: as it is, branch after branch, and that with branches on tiles.

    A rule with a period in time, such as every(n), has one more for each: branches on tiles, in patches of n columns.
    rules: one for each layer of the pattern. sizes: of the tiles of queries and of keys; None where there are none, and
    the order is kept. free: False keeps the order, for layers that read tokens in turn.
    """
    B, T = coordinates.shape
    given = np.tile(np.arange(T), (B, 1))
    if sizes is None:
        return Arranged(given, 1.0)
    q_tile, k_tile = sizes
    orders, moved = [given], [coordinates]
    if free:
        by_branch = np.lexsort((coordinates.time, coordinates.branch, _padding_last(coordinates.segment)))
        orders += [by_branch, _on_tiles(coordinates, by_branch, max(q_tile, k_tile))]
        for period in sorted({period for rule in set(rules) for period in rule.periods()}):
            patches = _in_patches(coordinates, period, max(q_tile, k_tile))
            orders.append(_on_tiles(coordinates, patches, max(q_tile, k_tile)))
        moved += [_moved(coordinates, order) for order in orders[1:]]
    counts = np.array([_computed(each, rules, q_tile, k_tile) for each in moved])
    worth = np.concatenate([counts[:1], np.where(counts[1:] <= GAIN * counts[0], counts[1:], np.inf)])
    best = worth.argmin(0)
    chosen, rows = np.stack(orders), np.arange(B)
    tiles = len(rules) * -(-T // q_tile) * -(-T // k_tile)
    return Arranged(chosen[best, rows], float(counts[best, rows].mean() / tiles))


def _in_patches(coordinates: Coordinates, period: int, tile: int) -> np.ndarray:
    """Branch after branch, each cut into patches of a tile: of so many rows of `period` time steps, and columns.

    A tile then meets the columns of a key every `period` steps, and the rows of a window, in few others; in the order
    of time it would meet all of them. Columns are counted from the last, which `summary` keeps.
    """
    rows = 2 ** max(0, round(math.log2(tile)) // 2 - 1)  # 4 of 64: the window of a strided rule costs more by the row
    columns = tile // rows
    time = np.asarray(coordinates.time)
    column = (period - 1 - time % period) // columns
    return np.lexsort(
        (time, column, time // (rows * period), coordinates.branch, _padding_last(coordinates.segment)), axis=-1
    )


def _padding_last(segment: np.ndarray) -> np.ndarray:
    return np.where(segment < 0, np.iinfo(np.int32).max, segment)


def _moved(coordinates: Coordinates, order: np.ndarray) -> Coordinates:
    return coordinates.map(lambda x: np.take_along_axis(np.asarray(x), order, axis=1))


def _computed(coordinates: Coordinates, rules: Sequence[Rule], q_tile: int, k_tile: int) -> np.ndarray:
    """Tiles that are not empty in each row [B], of all rules together."""
    q, k = _padded(coordinates, q_tile), _padded(coordinates, k_tile)
    each = {rule: (tile_kinds(rule, q, k, q_tile, k_tile, np) != EMPTY).sum((1, 2)) for rule in set(rules)}
    return sum(each[rule] for rule in rules)


def _padded(coordinates: Coordinates, tile: int) -> Coordinates:
    short = ((0, 0), (0, -coordinates.shape[1] % tile))
    if not short[1][1]:
        return coordinates
    pad = lambda x, value: np.pad(x, short, constant_values=value)  # noqa: E731
    fields = coordinates.branch, coordinates.time, coordinates.index
    return Coordinates(pad(coordinates.segment, -1), *(pad(x, 0) for x in fields))


def _on_tiles(coordinates: Coordinates, by_branch: np.ndarray, tile: int) -> np.ndarray:
    """`by_branch` with padding of the row moved behind branches, so that each begins a tile, where there is enough."""
    order = by_branch.copy()
    segment, branch = (np.take_along_axis(x, by_branch, axis=1) for x in (coordinates.segment, coordinates.branch))
    for row in range(len(order)):
        tokens = int((segment[row] >= 0).sum())
        begins = np.flatnonzero(
            np.diff(segment[row, :tokens], prepend=-1).astype(bool)
            | np.diff(branch[row, :tokens], prepend=-1).astype(bool)
        )
        lengths = np.diff(begins, append=tokens)
        starts = np.cumsum(-(-lengths // tile) * tile) - -(-lengths // tile) * tile
        if tokens == 0 or starts[-1] + lengths[-1] > order.shape[1]:
            continue
        places = np.arange(tokens) + np.repeat(starts - begins, lengths)
        left = np.ones(order.shape[1], bool)
        left[places] = False
        order[row, places], order[row, left] = by_branch[row, :tokens], by_branch[row, tokens:]
    return order
