"""Scaling laws of loss: L = E + A / N^a + B / D^b of parameters and tokens, and L = E + K / C^g of compute.

As Hoffmann et al. 2022 (arXiv 2203.15556, approach 3): Huber loss of log L, the terms joined by log-sum-exp, minimised
by BFGS from a grid of starts. The Huber losses of the runs are summed, and taken in units of delta squared: a mean of
such small numbers stops it too early (Besiroglu et al. 2024, arXiv 2404.10102).
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import scipy

from lab.errors import UserError
from lab.study.judge.statistics import LEVEL, Interval

DELTA = 1e-3  # in log L: a run that is further off than a thousandth counts less
RESAMPLES = 200  # of runs, for intervals
REFINED = 4  # of the starts, the best so many are minimised from
FLOORS, SPLITS, EXPONENTS = (0.05, 0.3, 0.6, 0.85), (0.2, 0.5, 0.8), (0.1, 0.3, 0.6, 1.2)  # the grid of starts
LEAST = 0.01  # exponent, and share of the lowest loss for the floor, that a resample begins from: 0 is never left
SIZES, PAIRS = 3, 6  # distinct N, and distinct D, that a law of both needs; pairs of them, for its five constants
RUNS = 6  # that intervals need: of fewer, one resample is like another
POINTS = 3  # distinct C that a law of compute needs, for its three constants
APART = 0.05  # in log D, from what N alone says: amounts nearer than 5% are one ratio of tokens to parameters
# As few constants need no limited memory, and scipy's L-BFGS-B wakes threads of BLAS at every step: ten times the time.
METHOD, OPTIONS = "BFGS", {"gtol": 1e-4, "maxiter": 500}
DRAWS = 50  # resamples tried for each that can be told

NAMES = {2: ("E", "A", "a", "B", "b"), 1: ("E", "K", "g")}  # of the constants, by the number of terms that fall
PUBLISHED = {  # of models that count embeddings among N, on their authors' texts
    "Hoffmann et al. 2022": (1.69, 406.4, 0.34, 410.7, 0.28),
    "Besiroglu et al. 2024": (1.8172, 482.01, 0.3478, 2085.43, 0.3658),
}


@dataclasses.dataclass(frozen=True)
class Law:
    """L = E + sum_t coefficient_t / size_t^exponent_t, in nats per token. Coefficients are kept as logarithms at
    `centre`, logarithms of sizes in the middle of the runs, where they are well determined."""

    floor: float  # E
    logs: tuple[float, ...]
    exponents: tuple[float, ...]
    centre: tuple[float, ...]

    @property
    def constants(self) -> tuple[float, ...]:
        """In the order of NAMES."""
        pairs = zip(self.logs, self.exponents, self.centre, strict=True)
        with np.errstate(over="ignore"):
            return self.floor, *itertools.chain(*((float(np.exp(log + b * at)), b) for log, b, at in pairs))

    def loss(self, *sizes: np.ndarray) -> np.ndarray:
        """Of sizes [...] each: [...]."""
        terms = zip(self.logs, self.exponents, self.centre, sizes, strict=True)
        return self.floor + sum(np.exp(log - b * (np.log(size) - at)) for log, b, at, size in terms)

    def compute(self, losses: np.ndarray) -> np.ndarray:
        """Of a law of compute alone, its inverse: losses [...] to the logarithm of compute [...]; inf of a loss that no
        compute brings."""
        above = np.maximum(np.asarray(losses, float) - self.floor, 0.0)
        with np.errstate(divide="ignore"):
            return self.centre[0] + (self.logs[0] - np.log(above)) / self.exponents[0]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law and the percentile intervals of its constants over resampled runs, by name; None of fewer than RUNS runs,
    and where too few resamples can be told. residual: root mean square of log L."""

    law: Law
    intervals: dict[str, Interval | None]
    residual: float

    @property
    def constants(self) -> dict[str, float]:
        return dict(zip(NAMES[len(self.law.logs)], self.law.constants, strict=True))


def of_parameters_and_tokens(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> Fit:
    """L = E + A / N^a + B / D^b of runs [n] each. Raises UserError where these runs cannot tell it."""
    return _checked((tuple(parameters), tuple(tokens)), losses)


def of_compute(compute: Sequence[float], losses: Sequence[float]) -> Fit:
    """L = E + K / C^g of runs [n] each. Raises UserError of fewer than POINTS amounts of compute."""
    return _checked((tuple(compute),), losses)


def formula(terms: int) -> str:
    return {2: "L = E + A / N^a + B / D^b", 1: "L = E + K / C^g"}[terms]


def untold(*sizes: Sequence[float], pairs: int = PAIRS) -> str:
    """Why runs of such compute [n], or parameters [n] and tokens [n], cannot tell their law; "" if they can."""
    distinct = [len({*of}) for of in sizes]
    if len(sizes) == 1:
        return f"there are {distinct[0]} amounts of compute C, and it needs {POINTS}" if distinct[0] < POINTS else ""
    both = len({*zip(*sizes, strict=True)})
    there = f"there are {distinct[0]} sizes N, {distinct[1]} amounts of tokens D and {both} pairs of both"
    missing = f"{there}, and it needs {SIZES}, {SIZES} and {pairs}"
    if min(distinct) < SIZES:
        return missing
    log_n, log_d = np.log(sizes)
    line = np.polynomial.Polynomial.fit(log_n, log_d, 1)
    if np.abs(log_d - line(log_n)).max() < APART:
        return "N decides D, as where D / N is constant, so that a and b cannot be told apart; vary D at each N"
    return missing if both < pairs else ""


def _checked(sizes: tuple[tuple[float, ...], ...], losses: Sequence[float]) -> Fit:
    if reason := untold(*sizes):
        raise UserError(f"{formula(len(sizes))} cannot be fitted: {reason}")
    return _fitted(sizes, tuple(losses))


def minimised(sizes: np.ndarray, losses: np.ndarray, first: Law | None = None) -> Law:
    """The law nearest to runs: logarithms of sizes [terms, n], losses [n]. first: of a resample, the law of all runs,
    from which alone it is minimised then."""
    centre, terms = sizes.mean(axis=1), len(sizes)
    at, logs = sizes - centre[:, None], np.log(losses)
    if first is None:
        starts = _starts(terms, float(np.mean(logs)))
        starts = starts[np.argsort(_values(starts, at, logs))[:REFINED]]
    else:
        moved = np.array(first.logs) - np.array(first.exponents) * (centre - np.array(first.centre))
        floor = max(first.floor, LEAST * losses.min())
        starts = [np.array([np.log(floor), *moved, *np.log(np.maximum(first.exponents, LEAST))])]
    with np.errstate(over="ignore", invalid="ignore"):  # of steps that are tried
        found = [
            scipy.optimize.minimize(_objective, start, (at, logs), METHOD, jac=True, options=OPTIONS)
            for start in starts
        ]
        best = min(found, key=lambda one: np.nan_to_num(one.fun, nan=np.inf)).x
    coefficients, exponents = best[1 : 1 + terms], np.exp(best[1 + terms :])
    return Law(float(np.exp(best[0])), *(tuple(of.tolist()) for of in (coefficients, exponents, centre)))


def _objective(theta: np.ndarray, sizes: np.ndarray, logs: np.ndarray) -> tuple[float, np.ndarray]:
    """The summed Huber loss in units of DELTA^2, and its gradient. theta: logarithms of E, of the terms at the centre
    and of their exponents, all of which so are positive."""
    parts = _parts(theta, sizes)
    predicted = np.logaddexp.reduce(parts)
    value, pull = _huber((predicted - logs) / DELTA)
    shares = np.exp(parts - predicted) * (pull / DELTA)
    steeper = -(shares[1:] * sizes).sum(axis=1) * np.exp(theta[1 + len(sizes) :])
    return value, np.concatenate([shares.sum(axis=1), steeper])


def _values(thetas: np.ndarray, sizes: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """The objective of many [starts, parameters]: [starts]."""
    return _huber((np.logaddexp.reduce(_parts(thetas.T, sizes[:, None])) - logs) / DELTA)[0]


def _huber(off: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum over runs [..., n] -> [...], and derivative [..., n], of the Huber loss of delta 1."""
    pull = np.clip(off, -1.0, 1.0)
    return (pull * (off - pull / 2)).sum(axis=-1), pull


def _parts(theta: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Logarithms of the terms [1 + terms, ..., n], the floor first."""
    terms = len(sizes)
    falling = theta[1 : 1 + terms, ..., None] - np.exp(theta[1 + terms :, ..., None]) * sizes
    return np.concatenate([np.broadcast_to(theta[:1, ..., None], (1, *falling.shape[1:])), falling])


@functools.cache
def _grid(terms: int) -> np.ndarray:
    """[starts, 1 + 2 terms], of a mean loss of 1."""
    splits = [(1.0,)] if terms == 1 else [(one, 1 - one) for one in SPLITS]
    return np.array([
        np.log([floor, *((1 - floor) * np.array(split)), *exponents])
        for floor, split, exponents in itertools.product(
            FLOORS, splits, itertools.product(EXPONENTS, repeat=terms)
        )
    ])  # fmt: skip


def _starts(terms: int, mean: float) -> np.ndarray:
    found = _grid(terms).copy()
    found[:, : 1 + terms] += mean
    return found


@functools.cache
def _fitted(sizes: tuple[tuple[float, ...], ...], losses: tuple[float, ...]) -> Fit:
    """Kept, since a report is made again whenever runs end."""
    logs, values = np.log(np.array(sizes, float)), np.array(losses, float)
    law = minimised(logs, values)
    generator, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES if len(values) >= RUNS else 0):
        if (chosen := _resample(sizes, generator)) is not None:
            drawn.append(minimised(logs[:, chosen], values[chosen], law).constants)
    drawn = [constants for constants in drawn if np.isfinite(constants).all()]
    names = NAMES[len(sizes)]
    if not drawn or len(drawn) < RESAMPLES:
        intervals: dict = dict.fromkeys(names)
    else:
        low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2], axis=0)
        intervals = {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}
    off = np.log(law.loss(*np.exp(logs))) - np.log(values)
    return Fit(law, intervals, float(np.sqrt(np.mean(off**2))))


def _resample(sizes: tuple[tuple[float, ...], ...], generator: np.random.Generator) -> np.ndarray | None:
    """Places of runs drawn with replacement, by which the law can be told; None if DRAWS draws have none."""
    count = len(sizes[0])
    for _ in range(DRAWS):
        chosen = generator.integers(count, size=count)
        drawn = [[of[place] for place in chosen] for of in sizes]
        if not untold(*drawn, pairs=PAIRS - 1):
            return chosen
    return None
