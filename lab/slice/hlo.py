"""Reads a compiled program (the text of HLO modules): its FLOPs, the bytes of memory that it moves, its collectives.

Everything is of one device. XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop
turns, where the program says so.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from lab.slice.parse import Array, Instruction, groups, instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {  # touch no memory: they name, group or wait for what others made
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "add-dependency", "domain",
}  # fmt: skip
PLACEHOLDERS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone")
SLICES = {"dynamic-slice", "gather", "slice"}  # read of their first operand what they give
# Products of matrices in each kernel of attention, by what they are as large as: (queries, outputs) x keys.
ATTENTION = {"attention_forward": (1, 1), "attention_dq": (2, 1), "attention_dkv": (2, 2)}
QUERIES, OUTPUT_GRADIENTS = 4, 9  # operands that say how large, after the length of the grid and three lists of steps


class Collective(NamedTuple):
    """kind: a name of KINDS. groups: of devices that exchange, numbered as in the mesh, flat, or pairs of who sends to
    whom; None where the program says it in a way that is not known here. bytes: what each device puts in. chain: the
    name of its parts, where several instructions of a computation do parts of it beside other work."""

    kind: str
    groups: tuple[tuple[int, ...], ...] | None
    bytes: int
    chain: str = ""

    @property
    def size(self) -> int:
        """Devices of a group."""
        return len(self.groups[0]) if self.groups else 1

    @property
    def put_out(self) -> float:
        """Bytes that each device has afterwards."""
        factor = {"all-gather": self.size, "reduce-scatter": 1 / self.size}.get(self.kind, 1)
        return self.bytes * factor

    @property
    def moved(self) -> float:
        """Bytes that each device receives at the least, in a ring."""
        others = self.size - 1
        return {
            "all-gather": self.bytes * others,
            "all-reduce": 2 * self.bytes * others / self.size,
            "collective-permute": self.bytes,
        }.get(self.kind, self.bytes * others / self.size)


@dataclasses.dataclass
class Work:
    """What a program does when it runs once. kernels: FLOPs of attention for each key that a query sees. unknown: loops
    whose length it does not say, which count once."""

    flops: float = 0.0
    kernels: float = 0.0
    bytes: float = 0.0
    unknown: int = 0
    collectives: collections.Counter[Collective] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Work", times: int = 1) -> None:
        for name in ("flops", "kernels", "bytes", "unknown"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for collective, count in other.collectives.items():
            self.collectives[collective] += times * count


def read(text: str) -> Work:
    """The work of a program, from the text of its module."""
    return _Module(text).work()


def axes_of(collective: Collective, mesh: Mapping[str, int]) -> str:
    """The axes of a mesh, of {axis: size}, over which a collective lies: "fsdp x tensor"; "?" for none of its axes. A
    permutation lies over those along which anything is passed."""
    groups = collective.groups or ()
    sizes = list(mesh.values())
    number = np.arange(math.prod(sizes)).reshape(sizes)
    wanted = {frozenset(group) for group in groups}
    large = [i for i, size in enumerate(sizes) if size > 1]
    if collective.kind == "collective-permute":
        places = [np.unravel_index(pair, sizes) for pair in groups]
        return " x ".join(list(mesh)[i] for i in large if any(len({*place[i]}) > 1 for place in places)) or "?"
    for chosen in range(1, 2 ** len(large)):
        axes = [axis for i, axis in enumerate(large) if chosen >> i & 1]
        lying = np.moveaxis(number, axes, range(-len(axes), 0)).reshape(-1, math.prod(sizes[axis] for axis in axes))
        if {frozenset(map(int, group)) for group in lying} == wanted:
            return " x ".join(list(mesh)[axis] for axis in axes)
    return "?"


class _Module:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self._of, self._read, self._written = map(functools.cache, (self._of, self._read, self._written))
        self.entry, current = None, None
        found = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(found[1]) if found else 1
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?.*{$", line):
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith("  ") and current is not None and (parsed := instruction(line)):
                current[parsed.name] = parsed

    def work(self) -> Work:
        return self._of(self.entry)

    def _of(self, name: str) -> Work:
        """Of a computation whose instructions run one after another."""
        found, seen = Work(), set()
        for each in self.computations[name].values():
            if each.kind == "while":
                turns = self._turns(name, each)
                found.unknown += turns is None
                for part in _called(each, "body", "condition"):
                    found.add(self._of(part), 1 if turns is None else turns)
            elif each.kind == "conditional":
                ways = [self._of(way) for way in _called(each, "branch_computations", "true_computation",
                                                         "false_computation")]  # fmt: skip
                found.add(max(ways, key=lambda way: (way.flops + way.kernels, way.bytes)))
            elif each.kind in ("call", "async-start"):
                for part in _called(each, "to_apply", "calls"):
                    found.add(self._of(part))
            else:
                work = self._alone(name, each)
                for collective in [*work.collectives]:
                    if collective.chain and collective in seen:
                        del work.collectives[collective]
                    elif each.kind == "fusion":
                        work.bytes += collective.bytes + collective.put_out
                    seen.add(collective)
                found.add(work)
        return found

    def _turns(self, name: str, loop: Instruction) -> int | None:
        """Of a loop whose length is a constant: as the program says it, or as it counts from 0."""
        if told := re.search(r'"known_trip_count":{"n":"?(\d+)', loop.rest):
            return int(told[1])
        condition = self.computations[_called(loop, "condition")[0]]
        root = next(each for each in condition.values() if each.root)
        if root.kind == "compare" and "direction=LT" in root.rest:
            counter, limit = (condition[operand] for operand in root.operands)
            if (counter.kind, limit.kind) == ("get-tuple-element", "constant"):
                return -(-int(limit.operands[0]) // self._step(loop, counter))
        return None

    def _step(self, loop: Instruction, counter: Instruction) -> int:
        """By which a loop counts: 2 where XLA has unrolled a product that is made as its weights arrive."""
        body = self.computations[_called(loop, "body")[0]]
        index = int(re.search(r"index=(\d+)", counter.rest)[1])
        following = next(each for each in body.values() if each.root).operands[index]
        added = [body[operand] for operand in body[following].operands if operand in body]
        by = [int(each.operands[0]) for each in added if each.kind == "constant"]
        return by[0] if body[following].kind == "add" and by else 1

    def _alone(self, computation: str, each: Instruction) -> Work:
        """Of an instruction that is started by itself, with what is fused into it."""
        within = self.computations[computation]
        found = self._inside(computation, each)
        if each.kind in FREE or each.kind.endswith("-done") or _placeholder(each):
            return found
        fused = _called(each, "calls") if each.kind == "fusion" else ()
        for place in range(len(each.operands)):
            found.bytes += self._read(fused[0], place) if fused else _read_directly(within, each, place)
        found.bytes += self._written(fused[0]) if fused else _written_directly(within, each)
        return found

    def _inside(self, computation: str, each: Instruction) -> Work:
        """FLOPs and collectives of an instruction, and of what is fused into it; no bytes."""
        found, within = Work(), self.computations[computation]
        kind = each.kind.removesuffix("-start")
        if each.kind == "fusion":
            for part in _called(each, "calls"):
                scattered = "all-reduce-scatter" in part or "all-reduce-scatter" in each.name
                for inner in self.computations[part].values():
                    work = self._inside(part, inner)
                    if scattered:
                        kept = [(c._replace(kind="reduce-scatter"), n) for c, n in work.collectives.items()]
                        work = dataclasses.replace(work, collectives=collections.Counter(dict(kept)))
                    found.add(work)
        elif each.kind == "dot":
            found.flops = _dot(within, each)
        elif each.kind == "convolution":
            found.flops = _convolution(within, each)
        elif each.kind == "custom-call" and (kernel := re.search(r"attention_(?:forward|dq|dkv)", each.rest)):
            of_queries, of_outputs = ATTENTION[kernel[0]]
            queries = _size(within, each.operands[QUERIES])
            outputs = math.prod(each.arrays[0].shape) if kernel[0] == "attention_forward" else _size(
                within, each.operands[OUTPUT_GRADIENTS])  # fmt: skip
            found.kernels = 2 * (of_queries * queries + of_outputs * outputs)
        elif kind in KINDS:
            bytes_in = sum(array.bytes for operand in each.operands for array in within[operand].arrays)
            chain = re.search(r'chain_id="(\w+)"', each.rest)
            among = groups(each.rest, self.devices)
            found.collectives[Collective(kind, among, bytes_in, chain[1] if chain else "")] += 1
        return found

    def _read(self, computation: str, place: int) -> float:
        """Bytes that a fused computation reads of its operand."""
        within = self.computations[computation]
        for each in within.values():
            if each.kind == "parameter" and re.match(rf"{place}\b", each.operands[0] if each.operands else ""):
                return self._used(computation, each)
        return 0.0

    def _used(self, computation: str, given: Instruction) -> float:
        """Bytes that are read of what `given` names: as little as its users take, where all take slices."""
        whole, read = _in_hbm(given.arrays), 0.0
        for user in self.computations[computation].values():
            for place, operand in enumerate(user.operands):
                if operand != given.name or user.kind == "parameter":
                    continue
                if user.kind in SLICES and place == 0:
                    read += sum(array.bytes for array in user.arrays)
                elif user.kind in ("tuple", *KINDS) or _placeholder(user):
                    continue  # handed on
                elif user.kind == "dynamic-update-slice" and place == 0:
                    continue  # in place
                elif user.kind == "bitcast":
                    read += self._used(computation, user._replace(arrays=given.arrays))
                elif user.kind == "fusion":
                    read += min(self._read(_called(user, "calls")[0], place), whole)
                else:
                    return whole
        return min(read, whole)

    def _written(self, computation: str) -> float:
        """Bytes that a fused computation writes: of what is updated in place the update."""
        within = self.computations[computation]
        root = next(each for each in within.values() if each.root)
        return sum(self._made(computation, part) for part in (root.operands if root.kind == "tuple" else [root.name]))

    def _made(self, computation: str, name: str) -> float:
        within = self.computations[computation]
        each = within[name]
        of = within.get(each.operands[0]) if each.kind in SLICES else each  # of a sum that is scattered
        if (of and of.kind in KINDS) or each.kind == "parameter" or _placeholder(each):
            return 0
        if each.kind == "bitcast" and _in_hbm(each.arrays):
            return self._made(computation, each.operands[0])
        if each.kind == "fusion":
            return min(self._written(_called(each, "calls")[0]), _in_hbm(each.arrays))
        if each.kind == "dynamic-update-slice" and _in_hbm(each.arrays):
            return sum(array.bytes for array in within[each.operands[1]].arrays)
        return _in_hbm(each.arrays)


def _in_hbm(arrays: Iterable[Array]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _size(within: Mapping[str, Instruction], name: str) -> int:
    return math.prod(within[name].arrays[0].shape)


def _called(each: Instruction, *attributes: str) -> list[str]:
    """The computations that an instruction names under these attributes."""
    found = []
    for attribute in attributes:
        if told := re.search(rf"\b{attribute}=({{[^}}]*}}|%?[\w.\-]+)", each.rest):
            found += [name.strip(" %") for name in told[1].strip("{}").split(",")]
    return found


def _read_directly(within: Mapping[str, Instruction], each: Instruction, place: int) -> float:
    if each.operands[place] not in within:
        return 0.0
    arrays = within[each.operands[place]].arrays
    if each.kind in SLICES and place == 0:
        return min(sum(array.bytes for array in each.arrays), _in_hbm(arrays))
    return 0.0 if each.kind == "dynamic-update-slice" and place == 0 else _in_hbm(arrays)


def _written_directly(within: Mapping[str, Instruction], each: Instruction) -> float:
    if each.kind == "dynamic-update-slice":
        return _in_hbm(within[each.operands[1]].arrays)
    if each.kind.removesuffix("-start") in KINDS:
        return sum(_in_hbm(within[operand].arrays) for operand in each.operands)
    return _in_hbm(each.arrays[:1] if each.kind.endswith("-start") else each.arrays)


def _dot(within: Mapping[str, Instruction], each: Instruction) -> float:
    contracted = re.search(r"lhs_contracting_dims={([\d,]*)}", each.rest)[1]
    left = within[each.operands[0]].arrays[0].shape
    return 2.0 * math.prod(each.arrays[0].shape) * math.prod(left[int(n)] for n in contracted.split(",") if n)


def _convolution(within: Mapping[str, Instruction], each: Instruction) -> float:
    """Multiplications and additions with numbers, not with padding or the holes of a dilation: TPUs write products with
    batch dimensions as convolutions of which few places of a window meet."""
    of_left, of_right, of_output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest).groups()
    left, right = (within[operand].arrays[0].shape for operand in each.operands[:2])
    output = each.arrays[0].shape
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window={([^}]*)}", each.rest) or ["", ""])[1]))
    spatial = [letter for letter in of_output if letter.isdigit()]
    numbers = lambda name, default: [int(n) for n in window[name].split("x")] if name in window else [  # noqa: E731
        default] * len(spatial)  # fmt: skip
    strides, holes_left, holes_right = (numbers(name, 1) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    pads = [int(pad.split("_")[0]) for pad in window["pad"].split("x")] if "pad" in window else [0] * len(spatial)
    met = 1
    for i, letter in enumerate(spatial):
        length, taps = left[of_left.index(letter)], right[of_right.index(letter)]
        places = (np.arange(output[of_output.index(letter)]) * strides[i] - pads[i])[:, None]
        places = places + np.arange(taps) * holes_right[i]
        met *= int(((places >= 0) & (places % holes_left[i] == 0) & (places < (length - 1) * holes_left[i] + 1)).sum())
    rows = output[of_output.index("b")] * output[of_output.index("f")]
    return 2.0 * rows * right[of_right.index("i")] * met


def _placeholder(each: Instruction) -> bool:
    """Whether a call names memory, or a part of a collective, and does nothing."""
    return each.kind == "custom-call" and any(f'"{name}"' in each.rest for name in PLACEHOLDERS)
