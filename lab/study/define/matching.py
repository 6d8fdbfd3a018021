"""Solves what cells ask to be matched on: the value of an integer field, and how long each cell trains."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from itertools import chain, cycle
from typing import NamedTuple

from ml_collections import ConfigDict

from lab.errors import UserError, choose
from lab.model import abstract, accounting
from lab.options import Option, leaves, set_field
from lab.study.define import start
from lab.study.define.cell import Cell
from lab.study.define.cells import MATCH, PSEUDO, RUNG, Override
from lab.study.define.plan import nominal_tokens, visible_keys

TOLERANCE = 1e-3  # a residual beyond it is flagged
PROBED = 256  # multiples among which the smallest is sought that a field does not refuse
KEYS = ("to", "on", "by", "multiple")
PAIRS = Option(
    (), "(key, value), ..., as lab.study.define.cells.matched makes them", kind=tuple[tuple[str, object], ...]
)
MULTIPLE = Option(1, "what a value is a multiple of", least=1)
TO = Option("", "the name of a cell, or (label, value), ...", kind=str | tuple[tuple[str, object], ...])


@dataclasses.dataclass(frozen=True)
class Match:
    """`by`, a multiple of `multiple`, brings the cell's `on` nearest to that of the cell `to`."""

    to: str | tuple[tuple[str, object], ...]
    on: str
    by: str
    multiple: int = 1


class Solution(NamedTuple):
    """A cell's config as solved, and how near it came: rows for the plan."""

    config: ConfigDict
    matches: tuple[dict, ...]
    length: dict | None


def parameters(config: ConfigDict) -> float:
    """Trained numbers."""
    return accounting.parameters(abstract(config.model))["parameters"]


def train_flops(config: ConfigDict) -> float:
    """FLOPs of one token in a training step."""
    model = abstract(config.model)
    visible = [visible_keys(block.mixer.rule, config) for block in model.blocks]
    return accounting.train_flops_per_token(model, visible, start.trained(config, model)[1])


def cache(config: ConfigDict) -> float:
    """Numbers that decoding keeps per token, over all layers."""
    return accounting.cache_per_token_per_layer(abstract(config.model)) * config.model.layers


QUANTITIES = {"parameters": parameters, "train_flops": train_flops, "cache": cache}
LENGTHS = {
    "steps": None,
    "tokens": nominal_tokens,
    "flops": lambda config: nominal_tokens(config) * train_flops(config),
}


def solve(study: ConfigDict, cells: Sequence[Cell], overrides: Sequence[Override]) -> list[Solution]:
    """Of every cell, in order. `cells` are those that the overrides make before anything is matched.

    Raises UserError for a match that is spelled wrongly, names no cell, contradicts the cell or another match, runs in
    a circle, or is by a field that does not move what is matched; and for an unknown study.length.
    """
    solver = _Solver(cells, [_matches(override, cell.config) for override, cell in zip(overrides, cells, strict=True)])
    solved = [solver.solved(place) for place in range(len(cells))]
    lengths = _lengths(study, cells, overrides, [config for config, _ in solved])
    return [Solution(config, rows, length) for (config, rows), length in zip(solved, lengths, strict=True)]


def missed(row: dict) -> bool:
    """Whether a match, or a length, of the plan is further off than the tolerance."""
    return abs(row["residual"]) > TOLERANCE


def nearest_multiple(quantity: Callable[[int], float | None], target: float, multiple: int) -> int | None:
    """The positive multiple whose quantity is nearest to the target; the smaller of two as near.

    The quantity must not fall as the multiple grows; it is None of a value that cannot be, and such are passed over.
    None if it does not grow at all. Raises LookupError where no multiple has a quantity. Found by lines through two
    known values, and by halves, in turns: most quantities are nearly straight, and each value is a model to build.
    """
    known = functools.cache(lambda number: quantity(number * multiple))
    first_of = lambda *ranges: next((n for n in chain(*ranges) if known(n) is not None), None)  # noqa: E731
    low = first_of(range(1, PROBED + 1))
    if low is None:
        raise LookupError
    high = first_of(range(low + 1, 2 * low + PROBED))
    if high is None:
        return low * multiple
    if known(high) <= known(low):
        return None
    while known(low) < known(high) < target:
        ahead = (target - known(high)) / (known(high) - known(low)) * (high - low)
        guess = high + int(min(max(ahead, high), 63 * high))
        double = range(2 * high, 4 * high + PROBED), range(2 * high - 1, high, -1)
        beyond = first_of(range(guess, guess + PROBED), *double)
        if beyond is None:
            return high * multiple
        low, high = high, beyond
    for straight in cycle((True, False)):
        rise = known(high) - known(low)
        share = min(max(0.0, (target - known(low)) / rise), 1.0) if straight and rise else 0.5
        middle = low + int(share * (high - low))
        between = first_of(range(max(middle, low + 1), high), range(middle - 1, low, -1))
        if between is None:
            return multiple * min((low, high), key=lambda number: abs(known(number) - target))
        low, high = (between, high) if known(between) <= target else (low, between)


class _Solver:
    """Solves each cell once, after the cells that it is matched to."""

    def __init__(self, cells: Sequence[Cell], matches: list[list[Match]]):
        self._cells, self._matches = cells, matches
        self._done: dict[int, tuple[ConfigDict, tuple[dict, ...]]] = {}
        self._open: list[int] = []

    def solved(self, place: int) -> tuple[ConfigDict, tuple[dict, ...]]:
        """The config of a cell with its matches solved in the order written, and what came of each of them."""
        if place in self._open:
            circle = [*self._open[self._open.index(place) :], place]
            raise UserError(f"matches run in a circle: {' -> '.join(self._cells[i].name for i in circle)}")
        if place not in self._done:
            self._open.append(place)
            self._done[place] = self._solve(place)
            self._open.pop()
        return self._done[place]

    def _solve(self, place: int) -> tuple[ConfigDict, tuple[dict, ...]]:
        config = self._cells[place].config.copy_and_resolve_references()
        targets = []
        for match in self._matches[place]:
            other = find(self._cells, place, "to", match.to)
            targets.append((self._cells[other].name, QUANTITIES[match.on](self.solved(other)[0])))
            _set_nearest(config, match, self._cells[place].name, *targets[-1])
        rows = [  # of the finished config: a later match may have undone an earlier one
            _row(match, name, QUANTITIES[match.on](config), target, config)
            for match, (name, target) in zip(self._matches[place], targets, strict=True)
        ]
        return config, tuple(rows)


def find(cells: Sequence[Cell], place: int, what: str, to: str | tuple) -> int:
    """The one cell that `to` names: by its name, on the same rung; or by pairs (label, value) that it has instead of
    cell `place`'s.

    Raises UserError where there is none, and where a name is that of several.
    """
    if isinstance(to, str):
        found = [i for i, cell in enumerate(cells) if to in (cell.name, cell.given_name)]
        if not found:
            choose(
                f"{what} (a cell)", to, dict.fromkeys(n for cell in cells for n in (cell.given_name, cell.name) if n)
            )
        if len(found) > 1:
            found = [i for i in found if cells[i].labels.get(RUNG) == cells[place].labels.get(RUNG)] or found
    else:
        for label, _ in to:
            choose(f"{what} (a label)", label, cells[place].labels)
        wanted = cells[place].labels | dict(to)
        found = [i for i, cell in enumerate(cells) if cell.labels == wanted]
        if not found:
            choose(f"{what} (a cell)", ",".join(f"{k}={v}" for k, v in wanted.items()), [cell.name for cell in cells])
    if len(found) > 1:
        raise UserError(f"{what} = {to!r} names {len(found)} cells: {', '.join(cells[i].name for i in found[:4])}")
    return found[0]


def _matches(override: Override, config: ConfigDict) -> list[Match]:
    """The matches of an override, checked against what else it sets."""
    matches = [_match(value, config) for field, value in override if field == MATCH]
    fields = [field for field, _ in override if field not in PSEUDO]
    for i, match in enumerate(matches):
        if match.by in fields:
            raise UserError(f"a match is by {match.by}, which the same cell sets to {dict(override)[match.by]!r}")
        if match.by in [other.by for other in matches[:i]]:
            raise UserError(f"two matches of one cell are by {match.by}: they contradict each other")
    return matches


def _match(value, config: ConfigDict) -> Match:
    PAIRS.check("a match", value)
    given = dict(value)
    for key in given:
        choose("a key of a match", key, KEYS)
    for key in KEYS[:3]:
        if key not in given:
            raise UserError(f"a match has no {key!r}: {given}")
    match = Match(**given)
    TO.check("to (of a match)", match.to)
    choose("on (of a match)", match.on, QUANTITIES)
    integers = {f: v for f, v in leaves(config).items() if isinstance(v, int) and not isinstance(v, bool)}
    choose("by (of a match; an integer field)", match.by, integers)
    MULTIPLE.check("multiple (of a match)", match.multiple)
    return match


def _set_nearest(config: ConfigDict, match: Match, name: str, to: str, target: float) -> None:
    if not target:
        raise UserError(f"{name} is matched on {match.on} to {to}, which has none; match it on something else")

    refusals = []

    def quantity(value: int) -> float | None:
        set_field(config, match.by, value)
        try:
            return QUANTITIES[match.on](config)
        except UserError as refused:  # of a value that nobody has asked for
            refusals.append(refused)
            return None

    try:
        value = nearest_multiple(quantity, target, match.multiple)
    except LookupError:
        raise UserError(
            f"{name} is matched on {match.on} to {to} by {match.by}, and no multiple of {match.multiple} up to "
            f"{PROBED * match.multiple} is one that it can have: {refusals[0]}"
        ) from None
    if value is None:
        movers = ", ".join(("model.feedforward.width", "model.dim", "model.layers"))
        raise UserError(f"{name} is matched on {match.on} by {match.by}, which does not raise it; try {movers}")
    set_field(config, match.by, value)


def _row(match: Match, to: str, quantity: float, target: float, config: ConfigDict) -> dict:
    value = leaves(config)[match.by]
    return {"to": to, "on": match.on, "by": match.by, "value": value, "residual": quantity / target - 1}


def _lengths(study, cells: Sequence[Cell], overrides, configs: list[ConfigDict]) -> list[dict | None]:
    """Sets train.steps of every config, as study.length says."""
    amount = LENGTHS[choose("study.length", study.length, LENGTHS)]
    if amount is None:
        return [None] * len(cells)
    own = study.cells if study.baseline else overrides  # a baseline stands on the rung of what is compared with it
    if any(field == "train.steps" for override in own for field, _ in override):
        raise UserError(f"study.length = {study.length!r} decides how long cells train, and a cell sets train.steps")
    to = [find(cells, i, "study.baseline", study.baseline) if study.baseline else 0 for i in range(len(cells))]
    amounts = [amount(config) for config in configs]
    if not all(amounts):
        raise UserError(f"study.length = {study.length!r} decides how long cells train, and train.steps = 0")
    rows = []
    for config, before, other in zip(configs, amounts, to, strict=True):
        config.train.steps = max(1, round(amounts[other] / before * config.train.steps))
        residual = amount(config) / amounts[other] - 1
        rows.append(
            {"to": cells[other].name, "on": study.length, "by": "train.steps", "value": config.train.steps}
            | {"residual": residual}
        )
    return rows
