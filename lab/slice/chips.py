"""Chips of TPU slices: what they are published to do, how they are joined, and the time that a step takes at best."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lab.errors import UserError, choose
from lab.slice.hlo import Collective, Work


class Chip(NamedTuple):
    """flops: of bfloat16 a second. hbm: bytes. bandwidth: of HBM, bytes a second. link: bytes a second and direction
    between neighbours. dimensions: in which chips have neighbours; one whose length `ring` divides closes to a ring.
    slices: some that there are."""

    flops: float
    hbm: float
    bandwidth: float
    link: float
    dimensions: int
    ring: int
    slices: tuple[str, ...]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
# Google's pages "TPU v4", "v5e", "v5p" and "v6e" (docs.cloud.google.com/tpu/docs/<chip>, read in November 2026): bf16
# peak, HBM and its bandwidth, and the bandwidth between chips, both directions of all 4 or 6 links together (400, 1200,
# 800 GB/s). That of v4, 6 links of 50 GB/s, is in arXiv 2304.01433, table 4. Rings: jax-ml.github.io/scaling-book/tpus.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 50e9, 3, 4, CUBES),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 400e9 / 8, 2, 16, FLAT),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1200e9 / 12, 3, 4, CUBES),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 800e9 / 8, 2, 16, FLAT),
}


def parse(name: str) -> Chip:
    """The chip of a slice such as "v5e:16x16". Raises UserError for what is no slice of a known chip."""
    generation, colon, sides = name.partition(":")
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
        known = ", ".join(f"{each}:{chip.slices[-1]}" for each, chip in CHIPS.items())
        raise UserError(f"--topology={name} is no slice; choose CHIP:SIDES, such as {known}")
    chip = CHIPS[choose(f"the chip of --topology={name}", generation, CHIPS)]
    if sides.count("x") + 1 != chip.dimensions:
        shown = ", ".join(f"{generation}:{each}" for each in chip.slices)
        raise UserError(
            f"--topology={name}: a slice of {generation} has {chip.dimensions} sides; choose such as {shown}"
        )
    return chip


def received(chip: Chip, sides: Sequence[int], places: Sequence[Sequence[int]]) -> float:
    """Bytes a second that each of a group of chips can receive from the others, at best.

    places: of the chips of one group in the slice. In every dimension in which they differ a chip has two neighbours
    where the chips close to a ring, else one counts, as of the chip at the end; every n-th chip of a line shares its
    links with n - 1 other groups.
    """
    found = 0.0
    for dimension, length in enumerate(sides):
        along = sorted({place[dimension] for place in places})
        if len(along) > 1:
            apart = min(after - before for before, after in itertools.pairwise(along))
            closed = len(along) * apart == length and length % chip.ring == 0
            found += chip.link * (2 if closed else 1) / apart
    return found


class Roofline(NamedTuple):
    """Seconds of a step for each thing that a chip does: products of matrices, HBM, and exchange with other chips."""

    compute: float
    memory: float
    network: float

    @property
    def best(self) -> float:
        """All at once."""
        return max(self)

    @property
    def worst(self) -> float:
        """One after another."""
        return sum(self)

    @property
    def bound(self) -> str:
        """What the best is bound by."""
        return max(self._asdict().items(), key=lambda item: item[1])[0]


def roofline(chip: Chip, flops: float, bytes_moved: float, seconds_of_network: float) -> Roofline:
    """flops, bytes_moved: of each chip in a step."""
    return Roofline(flops / chip.flops, bytes_moved / chip.bandwidth, seconds_of_network)


def seconds(chip: Chip, sides: Sequence[int], places: Sequence[Sequence[int]], collective: Collective) -> float:
    """Of a collective at best. places: of the chips of the slice, in the order of the mesh."""
    if collective.kind == "collective-permute":
        return collective.moved / chip.link
    groups = collective.groups or (tuple(range(len(places))),)
    slowest = min(received(chip, sides, [places[device] for device in group]) for group in groups)
    return collective.moved / slowest if slowest else 0.0


def network(chip: Chip, sides: Sequence[int], places: Sequence[Sequence[int]], work: Work) -> Mapping:
    """Seconds of each collective of a program, as often as it runs."""
    return {each: count * seconds(chip, sides, places, each) for each, count in work.collectives.items()}
