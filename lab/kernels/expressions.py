"""Integer expressions of query and key coordinates: numbers (`Term`) and truth values (`Rule`).

The same expression is evaluated on arrays (the dense mask, the mask inside a kernel, the index of a bias, a mapped
time) and on ranges of coordinates (which tiles are empty, full or partial). A range answer may be too wide, but never
wrong: a truth value may say maybe too often, but never a wrong never or always.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lab.coordinates import Coordinates

LEAVES = ("constant", "coordinate", "limit")
HIDDEN, ENDLESS = -2, 2**30  # the least and the largest limit: nothing of a node is seen, and all that it ever has


class Range(NamedTuple):
    """Every value lies in low..high, both included. For truth values: low is certainly, high is possibly."""

    low: Any
    high: Any


def _floordiv(a: Range, b: Range) -> Range:
    return Range(a.low // b.low, a.high // b.low)


def _modulo(a: Range, b: Range) -> Range:
    period, within = b.low, a.low // b.low == a.high // b.low  # within: no multiple of the period lies between
    return Range((a.low % period) * within, period - 1 - (period - 1 - a.high % period) * within)


def _multiple(a: Range, b: Range, period: int):
    """Whether some difference of the two may be a multiple of the period."""
    difference = _OPERATORS["-"][True](a, b)
    return _modulo(difference, Range(period, period)).low == 0


def _equal(a: Range, b: Range) -> Range:
    return Range((a.low == a.high) & (b.low == b.high) & (a.low == b.low), (a.low <= b.high) & (b.low <= a.high))


def _times(a: Range, b: Range) -> Range:
    ends = a.low * b.low, a.high * b.low
    return Range(*(ends if b.low >= 0 else ends[::-1]))


def _of_arrays(name: str):
    """numpy's function of this name for numbers and arrays of the host, else that of jax.numpy."""
    return lambda a, b: getattr(jnp if isinstance(a, jax.Array) or isinstance(b, jax.Array) else np, name)(a, b)


_minimum, _maximum = _of_arrays("minimum"), _of_arrays("maximum")


def _reached(value, thresholds: tuple[int, ...]):
    return sum((value >= threshold) + 0 for threshold in thresholds)


# name -> (on arrays, on ranges). // and % take a positive constant on the right, * any constant, reached a tuple.
_OPERATORS = {
    "+": (operator.add, lambda a, b: Range(a.low + b.low, a.high + b.high)),
    "-": (operator.sub, lambda a, b: Range(a.low - b.high, a.high - b.low)),
    "*": (operator.mul, _times),
    "//": (operator.floordiv, _floordiv),
    "%": (operator.mod, _modulo),
    "minimum": (_minimum, lambda a, b: Range(_minimum(a.low, b.low), _minimum(a.high, b.high))),
    "maximum": (_maximum, lambda a, b: Range(_maximum(a.low, b.low), _maximum(a.high, b.high))),
    "reached": (_reached, lambda a, b: Range(_reached(a.low, b.low), _reached(a.high, b.low))),
    "<": (operator.lt, lambda a, b: Range(a.high < b.low, a.low < b.high)),
    "<=": (operator.le, lambda a, b: Range(a.high <= b.low, a.low <= b.high)),
    "==": (operator.eq, _equal),
    "&": (operator.and_, lambda a, b: Range(a.low & b.low, a.high & b.high)),
    "|": (operator.or_, lambda a, b: Range(a.low | b.low, a.high | b.high)),
}


def _at(limits, q_node, k_node):
    """limits[..., q_node, k_node] of tables [*, L, M] and nodes [*, T, S] that broadcast; of none, a node far off.

    A kernel has a function that looks up in its place.
    """
    if callable(limits):
        return limits(q_node, k_node)
    M = limits.shape[-1]
    index, batch = jnp.asarray(q_node * M + k_node), limits.shape[:-2]
    flat = jnp.asarray(limits).reshape(*batch, -1)
    return jnp.take_along_axis(flat, index.reshape(*batch, -1), axis=-1, mode="clip").reshape(index.shape)


def _limit(q: Coordinates, k: Coordinates, on_ranges: bool, limits):
    """What the table says of two nodes; of ranges of them, whether it shows something, something as the query's own
    past, and all of that. None without a table."""
    if limits is None:
        return None
    if not on_ranges:
        return _at(limits, q.node, k.node)
    single = (q.node.low == q.node.high) & (k.node.low == k.node.high)
    found = _at(limits, q.node.low, k.node.low)
    shown, own = (_any(limits > least, q.node, k.node) for least in (HIDDEN, -1))
    least = jnp.where(_any(limits < ENDLESS, q.node, k.node), HIDDEN, ENDLESS)
    most = jnp.where(own, ENDLESS, jnp.where(shown, -1, HIDDEN))
    return Range(jnp.where(single, found, least), jnp.where(single, found, most))


def _any(table, q_node: Range, k_node: Range):
    """Whether a table bool [*, M, M] has a true entry for nodes of ranges [*, n, 1] and [*, 1, m], clipped to it.

    By products: counts that are not exact are no zeros. Sums along the table take a CPU ten times as long.
    """
    M = table.shape[-1]
    node_M = np.arange(M)
    within = lambda low, high: (jnp.clip(low, 0, M - 1) <= node_M) & (node_M <= jnp.clip(high, 0, M - 1))  # noqa: E731
    rows_nM = within(q_node.low, q_node.high).astype(jnp.float32)
    columns_mM = within(k_node.low.swapaxes(-1, -2), k_node.high.swapaxes(-1, -2)).astype(jnp.float32)
    return rows_nM @ table.astype(jnp.float32) @ columns_mM.swapaxes(-1, -2) > 0


Known = Mapping[tuple, Range]  # of some numbers, by their trees: ranges that are narrower than those of coordinates


def _evaluate(tree: tuple, q: Coordinates, k: Coordinates, known: Known | None = None, limit=None):
    """On arrays; on ranges if any are `known`, be it none of them. limit: what the table says of q and k, looked up
    once however often the tree has it."""
    kind, *rest = tree
    on_ranges = known is not None
    if on_ranges and tree in known:
        return known[tree]
    if kind == "constant":
        return Range(rest[0], rest[0]) if on_ranges else rest[0]
    if kind == "coordinate":
        side, name = rest
        return getattr(q if side == "q" else k, name)
    if kind == "limit":
        return limit
    found = _OPERATORS[kind][on_ranges](*(_evaluate(operand, q, k, known, limit) for operand in rest))
    if on_ranges and kind == "==" and (period := _common_period(*rest)):
        a, b = (_evaluate(operand[1], q, k, known, limit) for operand in rest)
        return Range(found.low, found.high & _multiple(a, b, period))
    return found


def _common_period(a: tuple, b: tuple) -> int | None:
    """Of two remainders by one constant: equal remainders are differences that are a multiple of it."""
    return a[2][1] if a[0] == b[0] == "%" and a[2] == b[2] else None


@dataclasses.dataclass(frozen=True)
class Rule:
    """A truth value of a query and a key. Compared and hashed by what it says."""

    tree: tuple

    def __and__(self, other: "Rule") -> "Rule":
        return Rule(("&", self.tree, other.tree))

    def __or__(self, other: "Rule") -> "Rule":
        return Rule(("|", self.tree, other.tree))

    def __bool__(self) -> bool:
        # Python would read `a < b < c`, `!=`, `not`, `and` and `or` as half of what was meant.
        raise TypeError("a rule is neither true nor false: join comparisons with & and |; no chains, no !=")

    def visible(self, q: Coordinates, k: Coordinates, limits=None):
        """Truth values for arrays of coordinates that broadcast against each other, q [..., T, 1] and k [..., 1, S].

        limits: int32 [..., M, M], the table that `limit` looks up, of a rule that has it.
        """
        return _evaluate(self.tree, q, k, limit=_limit(q, k, False, limits))

    def visible_range(self, q: Coordinates, k: Coordinates, known: Known | None = None, limits=None) -> Range:
        """The same on coordinates whose fields are `Range`s: certainly visible, possibly visible.

        known: ranges of `remainders`, by their trees, where they are known from more than coordinates' ranges.
        """
        return _evaluate(self.tree, q, k, known or {}, _limit(q, k, True, limits))

    def replaced(self, old: tuple, new: tuple) -> "Rule":
        """The rule with another part in place of each that is `old`; both are trees."""
        return Rule(_replaced(self.tree, old, new))

    def remainders(self) -> list["Term"]:
        """Its numbers x % n of one side's coordinates: a range of x says little of them where it passes n often."""
        found = (tree for tree in _parts(self.tree) if tree[0] == "%" and len(_sides(tree)) == 1)
        return [Term(tree) for tree in dict.fromkeys(found)]

    def periods(self) -> list[int]:
        """What its numbers of time are divided by for a remainder, each once."""
        found = (tree for tree in _parts(self.tree) if tree[0] == "%" and "time" in _fields(tree))
        return sorted({tree[2][1] for tree in found})


class Term:
    """A number made of coordinates and constants; comparing two makes a Rule. What it says is its `tree`."""

    __hash__ = None

    def __init__(self, tree: tuple):
        self.tree = tree

    def _number(self, name: str, other: "Term | int") -> "Term":
        return Term((name, self.tree, term(other).tree))

    def _rule(self, name: str, other: "Term | int") -> Rule:
        return Rule((name, self.tree, term(other).tree))

    def __add__(self, other):
        return self._number("+", other)

    def __sub__(self, other):
        return self._number("-", other)

    def __mul__(self, other: int):
        if type(other) is not int:
            raise ValueError(f"a term is multiplied by {other!r}; * takes a constant, a whole number")
        return self._number("*", other)

    def __floordiv__(self, other: int):
        return self._number("//", _positive(other))

    def __mod__(self, other: int):
        return self._number("%", _positive(other))

    def __lt__(self, other):
        return self._rule("<", other)

    def __le__(self, other):
        return self._rule("<=", other)

    def __gt__(self, other):
        return term(other)._rule("<", self)

    def __ge__(self, other):
        return term(other)._rule("<=", self)

    def __eq__(self, other):
        return self._rule("==", other)

    def reached(self, thresholds: Sequence[int]) -> "Term":
        """How many of the rising thresholds the number has reached: buckets of any widths, monotone, without a log."""
        thresholds = tuple(int(t) for t in thresholds)
        if not thresholds or any(a >= b for a, b in itertools.pairwise(thresholds)):
            raise ValueError(f"thresholds {thresholds} do not rise; give at least one, each above the one before")
        return Term(("reached", self.tree, ("constant", thresholds)))

    def values(self, q: Coordinates, k: Coordinates):
        """The numbers, for arrays of coordinates that broadcast against each other; a constant stays one number."""
        return _evaluate(self.tree, q, k)

    def value_range(self, q: Coordinates, k: Coordinates) -> Range:
        """The same on coordinates whose fields are `Range`s: no value lies outside."""
        return _evaluate(self.tree, q, k, {})

    def sides(self) -> set[str]:
        """Which coordinates it reads: those of "q", of "k", of both or of none."""
        return _sides(self.tree)


def _parts(tree: tuple) -> Iterator[tuple]:
    """An expression and all that it is made of."""
    yield tree
    if tree[0] not in LEAVES:
        for operand in tree[1:]:
            yield from _parts(operand)


def _replaced(tree: tuple, old: tuple, new: tuple) -> tuple:
    if tree == old or tree[0] in LEAVES:
        return new if tree == old else tree
    return (tree[0], *(_replaced(operand, old, new) for operand in tree[1:]))


def _sides(tree: tuple) -> set[str]:
    found = {part[1] for part in _parts(tree) if part[0] == "coordinate"}
    return {"q", "k"} if any(part[0] == "limit" for part in _parts(tree)) else found


def _fields(tree: tuple) -> set[str]:
    return {part[2] for part in _parts(tree) if part[0] == "coordinate"}


def minimum(a: Term | int, b: Term | int) -> Term:
    """The smaller of two numbers."""
    return Term(("minimum", term(a).tree, term(b).tree))


def maximum(a: Term | int, b: Term | int) -> Term:
    """The larger of two numbers."""
    return Term(("maximum", term(a).tree, term(b).tree))


def term(value: Term | int) -> Term:
    """A number as a term; itself if it is one."""
    return value if isinstance(value, Term) else Term(("constant", int(value)))


def _positive(value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"a rule divides by {value!r}; // and % take a constant of at least 1")
    return value


q = Coordinates(*(Term(("coordinate", "q", f.name)) for f in dataclasses.fields(Coordinates)))
k = Coordinates(*(Term(("coordinate", "k", f.name)) for f in dataclasses.fields(Coordinates)))
limit = Term(("limit",))  # of the nodes of a query and a key: HIDDEN, -1, or the last time that is seen as its own
