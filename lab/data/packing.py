"""Packing texts into rows of interleaved branches, with the coordinates and labels of every token. NumPy only."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lab.coordinates import Coordinates
from lab.data import skipping
from lab.data.skipping import skipped
from lab.errors import UserError
from lab.options import Option

ALIGNMENTS = ("left", "right")
PROMPTS = ("none", "first")
LONGEST_ROW, LARGEST_BATCH = 2**20, 2**28  # tokens: what one host can count the visible keys of, and can hold
OF_ROWS = {  # of every kind of data
    "text_length": Option(128, "tokens of a text at most; of a probe, of a row", least=2, most=LONGEST_ROW),
    "rows": Option(8, "of a training step, over all devices and hosts", least=1),
}
OPTIONS = (
    OF_ROWS
    | {
        "texts_per_row": Option(
            1,
            "of a training row: a multiple of N for draw = fixedN, of LOW + HIGH for LOW-HIGH",
            least=1,
            most=LONGEST_ROW,
        ),
        "draw": Option("fixed1", "branches of a group: fixedN, or LOW-HIGH, each number of them equally often"),
        "stagger": Option(False, "each branch starts later by a random offset"),
        "align": Option("left", "which ends of the branches of a group stand together", choices=ALIGNMENTS),
        "slots": Option(0, "0: branches take the numbers 1, 2, ...; S: a random subset of 1..S", least=0, most=2**16),
        "prompt": Option("none", "first: the first text of a group is its shared prompt", choices=PROMPTS),
    }
    | skipping.OPTIONS
)


class Row(NamedTuple):
    """Arrays int32 [T]. labels: the token that follows in the same branch, -1 where there is none. Padding: token 0."""

    tokens: np.ndarray
    labels: np.ndarray
    coordinates: Coordinates


@dataclass(frozen=True)
class Layout:
    """How a row is laid out: `texts` texts in `length` tokens, in groups of low..high branches each.

    `texts` is a multiple of `texts_of_draw`.
    """

    texts: int
    length: int
    low: int
    high: int
    stagger: bool
    align: str
    slots: int
    prompt: str
    positions: str = "whole"
    positions_within: int = 0

    def row(self, texts: Sequence[np.ndarray], rng: np.random.Generator) -> Row:
        """Draws groups, slots, offsets and times from `rng` and packs the texts."""
        prompts = prompts_of_group(self.prompt)
        groups = draw_groups(self.texts, self.low + prompts, self.high + prompts, rng)
        options = dict(stagger=self.stagger, align=self.align, slots=self.slots, prompt=self.prompt)
        row = pack_row(texts, groups, self.length, rng, **options)
        return row._replace(coordinates=skipped(row.coordinates, self.positions, self.positions_within, rng))


def prompts_of_group(prompt: str) -> int:
    """Texts that a group has on top of its branches."""
    return int(prompt == "first")


def most_times(data) -> int:
    """Time steps from the first to the last at which a text of config.data may have a token: after a prompt, and later
    by as much as it is long; or those that its times are drawn from."""
    return data.positions_within or times_of_text(data)


def times_of_text(data) -> int:
    """The same before any are drawn."""
    return data.text_length * (1 + prompts_of_group(data.prompt) + data.stagger)


def highest_branch(data) -> int:
    """The highest number that a branch of a training row of config.data may have."""
    return data.slots or parse_draw(data.draw)[1]


def parse_draw(draw: str, field: str = "data.draw") -> tuple[int, int]:
    """The least and most that are drawn: fixedN -> (N, N), LOW-HIGH -> (LOW, HIGH). Raises UserError."""
    match = re.fullmatch(r"fixed(\d{1,99})|(\d{1,99})-(\d{1,99})", draw)
    low, high = (int(match[1] or match[2]), int(match[1] or match[3])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UserError(f"{field} = {draw!r} is not a draw; choose fixedN or LOW-HIGH with 1 <= LOW <= HIGH, as 1-15")
    return low, high


def texts_of_draw(low: int, high: int, prompt: str = "none") -> int:
    """The texts of which a row must hold a multiple: of one group if all have one size, else of a pair of groups."""
    least, most = (branches + prompts_of_group(prompt) for branches in (low, high))
    return least if low == high else least + most


def draw_groups(n: int, low: int, high: int, rng: np.random.Generator) -> list[int]:
    """Sizes of groups that sum to n, a multiple of `texts_of_draw`, each uniform over low..high in every place.

    They are antithetic pairs, s and low + high - s with s uniform, in random order: however s falls, the row is full.
    """
    if low == high:
        return [low] * (n // low)
    sizes = rng.integers(low, high + 1, size=n // (low + high))
    return rng.permutation([*sizes, *(low + high - sizes)]).tolist()


def pack_row(
    texts: Sequence[np.ndarray],
    groups: Sequence[int],
    length: int,
    rng: np.random.Generator,
    *,
    stagger: bool,
    align: str,
    slots: int,
    prompt: str,
) -> Row:
    """One row of `length` tokens: the texts in order, `groups` of them at a time, each group a segment.

    stagger: each branch starts later by an offset uniform over {0..its length}.
    align: right makes the branches of a group end together (before staggering); left starts them together.
    slots: 0 numbers branches 1, 2, ...; S takes a sorted random subset of 1..S.
    prompt: first makes each group's first text its shared prompt, branch 0.
    Raises UserError for texts longer than the row, and for more branches than slots.
    """
    lengths = np.array([len(text) for text in texts])
    offsets = rng.integers(0, lengths + 1) if stagger else np.zeros_like(lengths)
    return interleave(
        texts, groups, length, offsets, draw_slots(groups, slots, prompt, rng), align=align, prompt=prompt
    )


def draw_slots(groups: Sequence[int], slots: int, prompt: str, rng: np.random.Generator) -> np.ndarray:
    """The branch number of each text, int [n]; prompts have 0. See `pack_row`."""
    prompts = prompts_of_group(prompt)
    branches = [size - prompts for size in groups]
    if slots and max(branches) > slots:
        raise UserError(
            f"data.slots = {slots} is fewer than the {max(branches)} branches of a group; 0 means 1, 2, ..."
        )
    numbers = []
    for count in branches:
        numbers += [0] * prompts
        numbers += sorted(1 + rng.permutation(slots)[:count]) if slots else range(1, count + 1)
    return np.array(numbers)


def interleave(
    texts: Sequence[np.ndarray],
    groups: Sequence[int],
    length: int,
    offsets: np.ndarray,
    slots: np.ndarray,
    *,
    align: str,
    prompt: str,
) -> Row:
    """`pack_row` with the offset and the branch number of each text given: sorts tokens by (group, time, branch)."""
    lengths = np.array([len(text) for text in texts])
    total = int(lengths.sum())
    if total > length:
        raise UserError(f"{len(texts)} texts of {total} tokens do not fit a row of {length}; raise data.text_length")
    ends = np.cumsum(lengths)
    group = np.repeat(np.arange(len(groups)), groups)
    text = np.repeat(np.arange(len(texts)), lengths)

    begin = _begin_times(lengths, group, np.asarray(groups), offsets, align, prompt)
    time = np.arange(total) + (begin - (ends - lengths))[text]
    tokens = np.concatenate(texts)
    labels = np.append(tokens[1:], -1)
    labels[ends - 1] = -1

    order = np.lexsort((slots[text], time, group[text]))
    segment = group[text]  # already sorted, and `order` keeps it so
    group_lengths = np.bincount(segment, minlength=len(groups))
    index = np.arange(total) - (np.cumsum(group_lengths) - group_lengths)[segment]
    coordinates = Coordinates(
        segment=_padded(segment, length, -1),
        branch=_padded(slots[text][order], length, 0),
        time=_padded(time[order], length, 0),
        index=_padded(index, length, 0),
    )
    return Row(_padded(tokens[order], length, 0), _padded(labels[order], length, -1), coordinates)


def _begin_times(lengths, group, sizes, offsets, align: str, prompt: str) -> np.ndarray:
    """The time of each text's first token [n]: prompts at 0, branches where their prompt ends, shifted."""
    first = np.cumsum(sizes) - sizes
    branches = lengths.copy()  # what counts as a branch's length: nothing for prompts
    prompts = np.zeros_like(lengths)
    if prompt == "first":
        prompts[first] = lengths[first]
        branches[first] = 0
    begin = np.repeat(prompts[first], sizes) + offsets
    if align == "right":
        begin += np.repeat(np.maximum.reduceat(branches, first), sizes) - branches
    if prompt == "first":
        begin[first] = 0
    return begin


def _padded(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    row = np.full(length, fill, np.int32)
    row[: len(values)] = values
    return row
