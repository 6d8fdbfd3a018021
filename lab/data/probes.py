"""Probes: synthetic rows that ask a model for one ability, drawn from a generator of random numbers. NumPy only.

Ids are 0 blank, 1 the mark that asks, and 2, 3, ... the symbols. A label stands where the row so far determines it.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lab.data.packing import OF_ROWS
from lab.options import Option

BLANK, MARK, FIRST = 0, 1, 2  # FIRST: the id of symbol 0
_POWER = 0.01  # of the gaps between a pair and its query, as in the published task


OPTIONS = OF_ROWS | {
    "probe.difficulty": Option("2-8", "of training rows: fixedN or LOW-HIGH (pairs, symbols, moves or tokens)"),
}
SYMBOLS = {"probe.symbols": Option(32, "in the alphabet", least=2)}
OBJECTS = {"probe.objects": Option(5, "that the permutations move: 5 is S5, 2 parity", least=2, most=6)}


class RowSettings(NamedTuple):
    """length: tokens of a row; symbols: in the alphabet; objects: that the permutations of `state` move."""

    length: int
    symbols: int
    objects: int


class Probe(NamedTuple):
    """row(rng, difficulty, settings): tokens and labels, int [n] each, n <= settings.length, label -1 where none is.

    tokens(difficulty), symbols(difficulty): the least length of a row and the least alphabet.
    alphabet(settings): how many symbols its rows are made of.
    easiest: the least difficulty.
    """

    row: Callable[[np.random.Generator, int, RowSettings], tuple[np.ndarray, np.ndarray]]
    tokens: Callable[[int], int]
    symbols: Callable[[int], int]
    alphabet: Callable[[RowSettings], int] = lambda settings: settings.symbols
    easiest: int = 1
    options: Mapping[str, Option] = OPTIONS | SYMBOLS


def mqar(rng, difficulty: int, settings: RowSettings):
    """Multi-query associative recall (arXiv 2312.04927, appendix E): `difficulty` pairs of key and value, then every
    key once, among blanks, at gaps that follow a power law. Label of a key asked again: its value."""
    half = settings.symbols // 2
    keys = FIRST + rng.permutation(half)[:difficulty]
    values = FIRST + half + rng.permutation(half)[:difficulty]
    tokens = np.full(settings.length, BLANK)
    labels = np.full(settings.length, -1)
    tokens[: 2 * difficulty] = np.stack([keys, values], 1).ravel()
    places = (settings.length - 2 * difficulty) // 2
    weights = np.arange(1, places + 1) ** (_POWER - 1)
    asked = 2 * difficulty + 2 * rng.choice(places, difficulty, replace=False, p=weights / weights.sum())
    tokens[asked], labels[asked] = keys, values
    return tokens, labels


def copy(rng, difficulty: int, settings: RowSettings):
    """`difficulty` random symbols, a mark, and the symbols again, each the label of the token before it."""
    symbols = FIRST + rng.integers(settings.symbols, size=difficulty)
    return np.concatenate([symbols, [MARK], symbols[:-1]]), np.concatenate([np.full(difficulty, -1), symbols])


def induction(rng, difficulty: int, settings: RowSettings):
    """[A][B] ... [A] -> [B] (arXiv 2209.11895): `difficulty` different symbols, then all but the last in random order.

    Label of a symbol asked again: the one that followed it. In random order, so that places alone do not tell.
    """
    symbols = FIRST + rng.permutation(settings.symbols)[:difficulty]
    asked = rng.permutation(difficulty - 1)
    return np.concatenate([symbols, symbols[asked]]), np.concatenate([np.full(difficulty, -1), symbols[asked + 1]])


def state(rng, difficulty: int, settings: RowSettings):
    """The word problem of a symmetric group (arXiv 2404.08819): `difficulty` random permutations p1, p2, ...

    Label of the t-th: p1 p2 ... pt, where (p q)(i) = p(q(i)). Symbols number the permutations in lexicographic order;
    two objects make it parity.
    """
    permutations, number = symmetric_group(settings.objects)
    drawn = rng.integers(len(permutations), size=difficulty)
    products = itertools.accumulate(permutations[drawn], lambda p, q: p[q])
    return FIRST + drawn, FIRST + np.array([number[tuple(p)] for p in products])


def needle(rng, difficulty: int, settings: RowSettings):
    """One symbol of the second half of the alphabet among noise of the first; `difficulty` tokens later, a mark.

    Label of the mark: that symbol.
    """
    half = settings.symbols // 2
    tokens = FIRST + rng.integers(half, size=settings.length)
    labels = np.full(settings.length, -1)
    at = rng.integers(settings.length - difficulty)
    tokens[at] = FIRST + half + rng.integers(half)
    tokens[at + difficulty], labels[at + difficulty] = MARK, tokens[at]
    return tokens, labels


PROBES = {
    "mqar": Probe(mqar, tokens=lambda pairs: 4 * pairs, symbols=lambda pairs: 2 * pairs),
    "copy": Probe(copy, tokens=lambda copied: 2 * copied, symbols=lambda copied: 2),
    "induction": Probe(induction, tokens=lambda known: 2 * known - 1, symbols=lambda known: known, easiest=2),
    "state": Probe(
        state,
        tokens=lambda moves: moves,
        symbols=lambda moves: 2,
        alphabet=lambda settings: math.factorial(settings.objects),
        options=OPTIONS | OBJECTS,
    ),
    "needle": Probe(needle, tokens=lambda distance: distance + 1, symbols=lambda distance: 4),
}


@functools.cache
def symmetric_group(objects: int) -> tuple[np.ndarray, dict[tuple[int, ...], int]]:
    """All permutations of 0..objects-1, int [objects!, objects], and the row of each."""
    permutations = np.array(list(itertools.permutations(range(objects))))
    return permutations, {tuple(p): i for i, p in enumerate(permutations)}
