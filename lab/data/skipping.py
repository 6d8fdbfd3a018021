"""Times of a longer text, given to the tokens of a short one in training, so that the model has seen them. NumPy."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.options import Option

POSITIONS = ("whole", "random", "pose")
OPTIONS = {
    "positions": Option(
        "whole", "times of a training text: one after another, a random rising subset, or two runs", choices=POSITIONS
    ),
    "positions_within": Option(0, "times that random and pose draw from: 0 to this less 1", least=0, most=2**24),
}


def skipped(coordinates: Coordinates, positions: str, within: int, rng: np.random.Generator) -> Coordinates:
    """Coordinates [T] of a row whose segments have times of 0 .. within - 1; their order, and all but time, stays.

    random: the n time steps of a segment become a random subset, sorted (randomized positional encodings, arXiv
    2305.16843). pose: from a random one of them on they are later by a random number (PoSE of two chunks, arXiv
    2309.10400). whole: as they are.
    """
    if positions == "whole":
        return coordinates
    time = coordinates.time.copy()
    for segment in range(coordinates.segment.max(initial=-1) + 1):
        own = coordinates.segment == segment
        n = time[own].max() + 1
        if positions == "random":
            steps = np.sort(rng.choice(within, n, replace=False, shuffle=False))
        else:
            later, skip = rng.integers(0, n) + 1, rng.integers(0, within - n + 1)
            steps = np.arange(n) + skip * (np.arange(n) >= later)
        time[own] = steps[time[own]]
    return dataclasses.replace(coordinates, time=time)


def check(data: ConfigDict, times: int) -> None:
    """Refuses a range that means nothing, or is shorter than a text. times: of the longest one."""
    if data.positions == "whole" and data.positions_within:
        raise UserError(
            f"data.positions_within = {data.positions_within} means nothing beside data.positions = 'whole'; choose 0, "
            f"or one of: {', '.join(POSITIONS[1:])}"
        )
    if data.positions != "whole" and data.positions_within < times:
        raise UserError(
            f"data.positions_within = {data.positions_within} is fewer than the {times} time steps that a text may "
            f"have; choose at least that many for data.positions = {data.positions!r}"
        )
