"""Probes: synthetic rows that ask a model for one ability, drawn from a generator of random numbers. NumPy only.

Ids are 0 blank, 1 the mark that asks or ends, and 2, 3, ... the symbols. A label stands where the row so far determines
it. A row is a single text, but for `passage`, whose questions are branches.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lab.data.packing import OF_ROWS, Row, interleave
from lab.options import Option

BLANK, MARK, FIRST = 0, 1, 2  # FIRST: the id of symbol 0
_POWER = 0.01  # of the gaps between a pair and its query, as in the published task


OPTIONS = OF_ROWS | {
    "probe.difficulty": Option("2-8", "of training rows: fixedN or LOW-HIGH (pairs, symbols, moves or tokens)"),
}
SYMBOLS = {"probe.symbols": Option(32, "in the alphabet", least=2)}
OBJECTS = {"probe.objects": Option(5, "that the permutations move: 5 is S5, 2 parity", least=2, most=6)}
QUESTIONS = {"probe.questions": Option(8, "of a passage at most, each a branch of its own", least=1, most=2**10)}
WIDEST = 3  # symbols of the value of a fact


class RowSettings(NamedTuple):
    """length: tokens of a row; symbols: in the alphabet; objects: that the permutations of `state` move; questions: of
    a `passage` at most, 0 of another probe."""

    length: int
    symbols: int
    objects: int
    questions: int = 0


class Probe(NamedTuple):
    """row(rng, difficulty, settings): tokens and labels, int [n] each, n <= settings.length, label -1 where none is; of
    a row in branches a whole Row.

    tokens(difficulty, settings), symbols(difficulty): the least length of a row and the least alphabet.
    alphabet(settings): how many symbols its rows are made of.
    easiest: the least difficulty.
    """

    row: Callable[[np.random.Generator, int, RowSettings], tuple[np.ndarray, np.ndarray] | Row]
    tokens: Callable[[int, RowSettings], int]
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


def facts(rng, difficulty: int, settings: RowSettings) -> list[np.ndarray]:
    """`difficulty` facts, int [3 to 2 + WIDEST] each: a name, its value of 1 to WIDEST symbols, and the mark that ends
    it. Names are of the first quarter of the alphabet, values of the rest; no symbol stands in two places."""
    quarter = settings.symbols // 4
    names = FIRST + rng.permutation(quarter)[:difficulty]
    symbols = FIRST + quarter + rng.permutation(settings.symbols - quarter)[: WIDEST * difficulty]
    widths = rng.integers(1, WIDEST + 1, size=difficulty)
    values = np.split(symbols[: widths.sum()], np.cumsum(widths)[:-1])
    return [np.array([name, *value, MARK]) for name, value in zip(names, values, strict=True)]


def told(found: list[np.ndarray], length: int) -> np.ndarray:
    """The passage of these facts, int [length]: behind as many blanks as it leaves."""
    text = np.concatenate(found)
    return np.pad(text, (length - len(text), 0), constant_values=BLANK)


def passage(rng, difficulty: int, settings: RowSettings) -> Row:
    """Many questions over one shared passage: `difficulty` facts, the prompt of 1 to settings.questions branches, each
    of which is one of the facts again.

    Label of a name in a branch: the first symbol of its value, and so on to the mark. Which facts are asked, and how
    many, is drawn: a branch has a question of its own.
    """
    found = facts(rng, difficulty, settings)
    count = rng.integers(1, min(settings.questions, difficulty) + 1)
    asked = [found[i] for i in rng.permutation(difficulty)[:count]]
    texts = [told(found, settings.length - sum(map(len, asked))), *asked]
    offsets, numbers = np.zeros(count + 1, int), np.arange(count + 1)
    row = interleave(texts, [count + 1], settings.length, offsets, numbers, align="left", prompt="first")
    return row._replace(labels=np.where(row.coordinates.branch == 0, np.int32(-1), row.labels))


PROBES = {
    "mqar": Probe(mqar, tokens=lambda pairs, settings: 4 * pairs, symbols=lambda pairs: 2 * pairs),
    "copy": Probe(copy, tokens=lambda copied, settings: 2 * copied, symbols=lambda copied: 2),
    "induction": Probe(induction, tokens=lambda known, settings: 2 * known - 1, symbols=lambda known: known, easiest=2),
    "state": Probe(
        state,
        tokens=lambda moves, settings: moves,
        symbols=lambda moves: 2,
        alphabet=lambda settings: math.factorial(settings.objects),
        options=OPTIONS | OBJECTS,
    ),
    "needle": Probe(needle, tokens=lambda distance, settings: distance + 1, symbols=lambda distance: 4),
    "passage": Probe(
        passage,
        tokens=lambda told, settings: (told + min(told, settings.questions)) * (2 + WIDEST),
        symbols=lambda told: 4 * told,
        options=OPTIONS | SYMBOLS | QUESTIONS,
    ),
}


@functools.cache
def symmetric_group(objects: int) -> tuple[np.ndarray, dict[tuple[int, ...], int]]:
    """All permutations of 0..objects-1, int [objects!, objects], and the row of each."""
    permutations = np.array(list(itertools.permutations(range(objects))))
    return permutations, {tuple(p): i for i, p in enumerate(permutations)}
