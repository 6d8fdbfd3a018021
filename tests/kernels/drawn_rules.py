"""Random rules for hypothesis, each beside the same expression of plain numbers."""

import operator
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from packs import FIELDS

from lab.kernels import rules


class Drawn(NamedTuple):
    """A Term or a Rule, and a function of (q, k) that says the same of numbers."""

    made: object
    plain: object


def _read(side: str, field: str) -> Drawn:
    return Drawn(getattr(getattr(rules, side), field), lambda q, k: getattr(q if side == "q" else k, field))


def _join(operation, a: Drawn, b: Drawn) -> Drawn:
    return Drawn(operation(a.made, b.made), lambda q, k: operation(a.plain(q, k), b.plain(q, k)))


def _constant(value: int) -> Drawn:
    return Drawn(value, lambda q, k: value)


_coordinates = st.sampled_from([_read(side, field) for side in "qk" for field in FIELDS])
_constants = st.integers(-20, 20).map(_constant)
_divisors = st.integers(1, 9).map(_constant)
_factors = st.integers(-4, 4).map(_constant)


def _bound(name: str, a: Drawn, b: Drawn) -> Drawn:
    made, plain = getattr(rules, name), getattr(np, name)
    return Drawn(made(a.made, b.made), lambda q, k: plain(a.plain(q, k), b.plain(q, k)))


def _bucket(a: Drawn, thresholds: set[int]) -> Drawn:
    rising = sorted(thresholds)
    return Drawn(a.made.reached(rising), lambda q, k: np.searchsorted(rising, a.plain(q, k), side="right"))


def _arithmetic(terms):
    sums = st.builds(_join, st.sampled_from([operator.add, operator.sub]), terms, terms | _constants)
    bounds = st.builds(_bound, st.sampled_from(["minimum", "maximum"]), terms, terms | _constants)
    return (
        sums
        | bounds
        | st.builds(_join, st.sampled_from([operator.floordiv, operator.mod]), terms, _divisors)
        | st.builds(_join, st.just(operator.mul), terms, _factors)
        | st.builds(_bucket, terms, st.sets(st.integers(-30, 60), min_size=1, max_size=5))
    )


terms = st.recursive(_coordinates, _arithmetic, max_leaves=4)
_COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq]
comparisons = st.builds(_join, st.sampled_from(_COMPARISONS), terms, terms | _constants)
drawn_rules = st.recursive(
    comparisons,
    lambda made: st.builds(_join, st.sampled_from([operator.and_, operator.or_]), made, made),
    max_leaves=4,
)
