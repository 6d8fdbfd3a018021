"""The text of HLO modules: instructions, the arrays that they make, and the devices that they speak of."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Array(NamedTuple):
    shape: tuple[int, ...]
    bytes: int
    in_hbm: bool  # not in the memory of the core


class Instruction(NamedTuple):
    name: str
    arrays: tuple[Array, ...]
    kind: str
    operands: tuple[str, ...]
    rest: str  # attributes
    root: bool


def instruction(line: str) -> Instruction | None:
    """Of a line of a computation; None if it is none."""
    named = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not named:
        return None
    start = line.index(" = ") + 3
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opened = line.index("(", end)
    closed = _closing(line, opened)
    inner, kind = line[opened + 1 : closed - 1], line[end:opened].strip()
    operands = [inner] if kind in ("parameter", "constant") else [part.split("%")[-1] for part in _parts(inner)]
    rest = line[closed:]
    return Instruction(named[2], _arrays(line[start:end]), kind, tuple(operands), rest, bool(named[1]))


def _closing(line: str, start: int) -> int:
    """One past the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(line)):
        depth += (line[place] in "({[") - (line[place] in ")}]")
        if depth == 0:
            return place + 1
    return len(line)


def _parts(text: str) -> Iterable[str]:
    """What commas outside of brackets separate."""
    depth, begun = 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and depth == 0:
            yield text[begun:place].strip()
            begun = place + 1
    if text[begun:].strip():
        yield text[begun:].strip()


def _arrays(type_text: str) -> tuple[Array, ...]:
    found = []
    for dtype, dims, layout in re.findall(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]({[^}]*})?", type_text):
        shape = tuple(int(n.strip("<=")) for n in dims.split(",") if n)
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(shape, math.prod(shape) * bits // 8, space is None or space[1] == "0"))
    return tuple(found)


def groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...] | None:
    """The groups of a collective; of a permutation the pairs of who sends to whom."""
    if pairs := re.search(r"source_target_pairs={((?:{\d+,\d+},?)*)}", attributes):
        each = (tuple(map(int, pair.split(","))) for pair in re.findall(r"{(\d+,\d+)}", pairs[1]))
        return tuple((source, target) for source, target in each if source != target)
    if spelled := re.search(r"replica_groups={((?:{[\d,]+},?)*)}", attributes):
        found = tuple(tuple(map(int, group.split(","))) for group in re.findall(r"{([\d,]+)}", spelled[1]))
        return found or (tuple(range(devices)),)
    if counted := re.search(rf"replica_groups=\[([\d,]+)\]<={IOTA}", attributes):
        return _listed(_iota(counted[2], counted[3]).reshape(_integers(counted[1])[0], -1))
    if over := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({IOTA}\))? {{([^}}]*)}}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", over[1])}
        axes = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", over[4]) if name in sizes]
        if ":" in over[4] or not axes:  # a part of an axis
            return None
        number = _iota(over[2] or str(math.prod(sizes.values())), over[3]).reshape([*sizes.values()])
        together = math.prod([*sizes.values()][axis] for axis in axes)
        return _listed(np.moveaxis(number, axes, range(-len(axes), 0)).reshape(-1, together))
    return None


IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # numbers in order in an array of this shape, its axes in that order


def _iota(shape: str, order: str | None) -> np.ndarray:
    number = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return number.transpose(_integers(order)) if order else number


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _listed(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, group)) for group in groups)
