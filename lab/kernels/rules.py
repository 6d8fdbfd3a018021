"""Who may see whom, written once as comparisons of query and key coordinates.

The same expression is evaluated on arrays (the dense mask, the mask inside a kernel) and on ranges of coordinates
(which tiles are empty, full or partial). A range answer may say maybe too often, but never a wrong never or always.

`attend` itself adds that query and key share a segment that is not padding; rules speak of the rest.
"""

import dataclasses
import operator
import re
from typing import Any, NamedTuple

import numpy as np

from lab.coordinates import Coordinates
from lab.errors import UserError, choose


class Range(NamedTuple):
    """Every value lies in low..high, both included. For truth values: low is certainly, high is possibly."""

    low: Any
    high: Any


def _floordiv(a: Range, b: Range) -> Range:
    return Range(a.low // b.low, a.high // b.low)


def _modulo(a: Range, b: Range) -> Range:
    period, within = b.low, a.low // b.low == a.high // b.low  # within: no multiple of the period lies between
    return Range((a.low % period) * within, period - 1 - (period - 1 - a.high % period) * within)


def _equal(a: Range, b: Range) -> Range:
    return Range((a.low == a.high) & (b.low == b.high) & (a.low == b.low), (a.low <= b.high) & (b.low <= a.high))


# name -> (on arrays, on ranges). // and % take a positive constant on the right.
_OPERATORS = {
    "+": (operator.add, lambda a, b: Range(a.low + b.low, a.high + b.high)),
    "-": (operator.sub, lambda a, b: Range(a.low - b.high, a.high - b.low)),
    "//": (operator.floordiv, _floordiv),
    "%": (operator.mod, _modulo),
    "<": (operator.lt, lambda a, b: Range(a.high < b.low, a.low < b.high)),
    "<=": (operator.le, lambda a, b: Range(a.high <= b.low, a.low <= b.high)),
    "==": (operator.eq, _equal),
    "&": (operator.and_, lambda a, b: Range(a.low & b.low, a.high & b.high)),
    "|": (operator.or_, lambda a, b: Range(a.low | b.low, a.high | b.high)),
}


def _evaluate(tree: tuple, q: Coordinates, k: Coordinates, on_ranges: bool):
    kind, *rest = tree
    if kind == "constant":
        return Range(rest[0], rest[0]) if on_ranges else rest[0]
    if kind == "coordinate":
        side, name = rest
        return getattr(q if side == "q" else k, name)
    return _OPERATORS[kind][on_ranges](*(_evaluate(operand, q, k, on_ranges) for operand in rest))


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

    def visible(self, q: Coordinates, k: Coordinates):
        """Truth values for arrays of coordinates that broadcast against each other, q [..., T, 1] and k [..., 1, S]."""
        return _evaluate(self.tree, q, k, on_ranges=False)

    def visible_range(self, q: Coordinates, k: Coordinates) -> Range:
        """The same on coordinates whose fields are `Range`s: certainly visible, possibly visible."""
        return _evaluate(self.tree, q, k, on_ranges=True)


class Term:
    """A number made of coordinates and constants; comparing two makes a Rule."""

    __hash__ = None

    def __init__(self, tree: tuple):
        self.tree = tree

    def _number(self, name: str, other: "Term | int") -> "Term":
        return Term((name, self.tree, _term(other).tree))

    def _rule(self, name: str, other: "Term | int") -> Rule:
        return Rule((name, self.tree, _term(other).tree))

    def __add__(self, other):
        return self._number("+", other)

    def __sub__(self, other):
        return self._number("-", other)

    def __floordiv__(self, other: int):
        return self._number("//", _positive(other))

    def __mod__(self, other: int):
        return self._number("%", _positive(other))

    def __lt__(self, other):
        return self._rule("<", other)

    def __le__(self, other):
        return self._rule("<=", other)

    def __gt__(self, other):
        return _term(other)._rule("<", self)

    def __ge__(self, other):
        return _term(other)._rule("<=", self)

    def __eq__(self, other):
        return self._rule("==", other)


def _term(value: Term | int) -> Term:
    return value if isinstance(value, Term) else Term(("constant", int(value)))


def _positive(value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"a rule divides by {value!r}; // and % take a constant of at least 1")
    return value


q = Coordinates(*(Term(("coordinate", "q", f.name)) for f in dataclasses.fields(Coordinates)))
k = Coordinates(*(Term(("coordinate", "k", f.name)) for f in dataclasses.fields(Coordinates)))

causal = k.index <= q.index
all_branches = (k.time < q.time) | (k.index == q.index)  # every branch, strictly earlier; and the token itself
own_branch = ((k.branch == 0) | (k.branch == q.branch)) & (k.time <= q.time)  # the prompt and the token's own branch


def window(n: int) -> Rule:
    """Keys less than n time steps before the query."""
    if n < 1:
        raise UserError(f"window({n}) sees nothing; choose a length of at least 1")
    return q.time - k.time < n


RULES = {"causal": causal, "all_branches": all_branches, "own_branch": own_branch}


def parse(text: str) -> Rule:
    """The rule that a config spells, such as "own_branch & window(128)"."""
    rules = []
    for part in (part.strip() for part in text.split("&")):
        sized = re.fullmatch(r"window\((\d+)\)", part)
        if not sized:
            choose("model.rule", part, [*RULES, "window(n)"])
        if part == "window(n)":
            raise UserError("model.rule = 'window(n)' needs a number, as in window(128)")
        rules.append(window(int(sized[1])) if sized else RULES[part])
    rule = rules[0]
    for other in rules[1:]:
        rule = rule & other
    return rule


def visible(rule: Rule, q: Coordinates, k: Coordinates):
    """What `attend` lets pass, bool [..., T, S] for q [..., T], k [..., S]: same segment, no padding, and the rule."""
    return pairs_visible(rule, q.map(lambda x: x[..., :, None]), k.map(lambda x: x[..., None, :]))


def pairs_visible(rule: Rule, q: Coordinates, k: Coordinates):
    """`visible` of coordinates that broadcast against each other."""
    return (q.segment == k.segment) & (q.segment >= 0) & rule.visible(q, k)


def mean_visible_keys(rule: Rule, coordinates: Coordinates, block: int = 1024) -> float:
    """Mean number of keys that a token which is not padding sees, counted exactly; numpy coordinates [B, T]."""
    seen = tokens = 0
    for row in range(coordinates.shape[0]):
        keys = coordinates.map(lambda x, row=row: x[row])
        for start in range(0, coordinates.shape[1], block):
            queries = keys.map(lambda x, start=start: x[start : start + block])
            seen += int(np.sum(visible(rule, queries, keys)))
            tokens += int(np.sum(queries.segment >= 0))
    return seen / max(tokens, 1)
