"""Coordinates to test on, made without the code under test."""

import numpy as np

from lab.coordinates import Coordinates

FIELDS = ("segment", "branch", "time", "index")


def scattered(rng: np.random.Generator, batch: int, length: int) -> Coordinates:
    """Every field drawn by itself, padding anywhere: nothing holds that packing would promise."""
    draw = lambda low, high: rng.integers(low, high, (batch, length)).astype(np.int32)  # noqa: E731
    return Coordinates(segment=draw(-1, 3), branch=draw(0, 4), time=draw(0, length), index=draw(0, length))


def interleaved(rng: np.random.Generator, batch: int, length: int) -> Coordinates:
    """Rows of groups: a prompt (perhaps empty), then branches sorted by (time, branch), and padding at the end."""
    rows = [_row(rng, length) for _ in range(batch)]
    return Coordinates(*(np.array([[token[field] for token in row] for row in rows], np.int32) for field in range(4)))


def _row(rng: np.random.Generator, length: int) -> list[tuple[int, int, int, int]]:
    fill, row, segment = rng.integers(length // 2, length + 1), [], 0
    while len(row) < fill:
        prompt = int(rng.integers(0, 6))
        group = [(time, 0) for time in range(prompt)]
        for branch in range(1, int(rng.integers(2, 6))):
            begin = prompt + int(rng.integers(0, 3))
            group += [(time, branch) for time in range(begin, begin + int(rng.integers(1, 9)))]
        row += [(segment, branch, time, index) for index, (time, branch) in enumerate(sorted(group))]
        segment += 1
    return row[:fill] + [(-1, 0, 0, 0)] * (length - fill)


def ragged(rng: np.random.Generator, batch: int, length: int) -> Coordinates:
    """One text per row, and padding: long enough for tiles that need no mask."""
    position = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    real = position < rng.integers(length // 2, length + 1, (batch, 1))
    fields = ((0, -1), (1, 0), (position, 0), (position, 0))
    return Coordinates(*(np.where(real, x, fill).astype(np.int32) for x, fill in fields))


PACKS = {"scattered": scattered, "interleaved": interleaved, "ragged": ragged}


def token(coordinates: Coordinates, *at: int) -> Coordinates:
    """One token of an array of coordinates, as plain ints."""
    return coordinates.map(lambda x: int(x[at]))
