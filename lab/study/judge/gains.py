"""Compute-equivalent gain: how many times the compute its baseline would need to reach a variant's loss, over its own.

On the rungs of a ladder of sizes, by the baseline's own law of loss on compute; and whether the gain lasts with size.
R: rungs, S: seeds.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import scipy

from lab.errors import UserError
from lab.study.define.cells import RUNG
from lab.study.define.contrasts import SIGNS, baselines, settings
from lab.study.judge import pairing, scaling
from lab.study.judge.evidence import UNKNOWN
from lab.study.judge.pairing import Score, Scores
from lab.study.judge.residuals import COSTS
from lab.study.judge.scaling import Law
from lab.study.judge.statistics import LEVEL, Interval
from lab.study.results import Results

RUNGS = 3  # that a law of the baseline needs
RESAMPLES = 200  # of seeds
HOLDS, SHRINKS, REVERSES = "holds", "shrinks", "reverses"
STEPS, TIME = "steps", "time"  # what the two sides have alike: compute is training FLOPs, or measured seconds


@dataclasses.dataclass(frozen=True)
class Side:
    """Losses and compute of one cell on each rung, at the same seeds as the other side: [R, S] each."""

    losses: np.ndarray
    compute: np.ndarray

    def at(self, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of compute and losses [R], means over some of the seeds."""
        return np.log(self.compute[:, seeds].mean(axis=1)), self.losses[:, seeds].mean(axis=1)


@dataclasses.dataclass(frozen=True)
class Gain:
    """Gains [R] of a variant with their intervals, and the slope of log gain on log compute with its own; no intervals
    of one seed. beyond [R]: whether the baseline's law is used outside the losses that it was fitted on."""

    law: Law
    factors: list[float]
    intervals: list[Interval | None]
    slope: float
    slope_interval: Interval | None
    beyond: list[bool]

    @property
    def verdict(self) -> str:
        """holds | shrinks | reverses | cannot tell, from the smallest rung on; a gain that grows holds.

        shrinks: the slope leads towards no gain. reverses: the first and the last rung are told apart from no gain, on
        opposite sides. holds: both are, on one side, and it does not shrink.
        """
        first, last = _side(self.intervals[0]), _side(self.intervals[-1])
        if not first or self.slope_interval is None:
            return UNKNOWN
        if last == -first:
            return REVERSES
        if max(first * bound for bound in self.slope_interval) < 0:
            return SHRINKS
        return HOLDS if last == first else UNKNOWN


@dataclasses.dataclass(frozen=True)
class Climb:
    """A variant and its baseline over rungs, at the seeds by which they may be paired."""

    labels: dict[str, object]  # of the variant, but for the rung
    against: dict[str, object]  # of its baseline
    rungs: list[str]
    cells: list[tuple[str, str]]  # of each rung: the variant's and its baseline's
    seeds: list[int]


def climbs(study: Results, scores: Scores) -> list[Climb]:
    """Every variant with the rungs on which it and its baseline share seeds, in the order of the plan."""
    labels = {cell["name"]: cell["labels"] for cell in study.plan["cells"]}
    off_rung = lambda name: {label: value for label, value in labels[name].items() if label != RUNG}  # noqa: E731
    steps: dict[tuple, list[tuple[str, str]]] = {}
    for name, other in baselines(labels, settings(study.plan["config"].get("study", {})).baseline).items():
        steps.setdefault(tuple(off_rung(name).items()), []).append((name, other))
    found = []
    for pairs in steps.values():
        kept = {pair: pairing.differences([[scores[cell]] for cell in pair], SIGNS[2]).kept for pair in pairs}
        there = [pair for pair in pairs if kept[pair]]
        seeds = sorted(set.intersection(*({*kept[pair]} for pair in there))) if there else []
        of_both = map(off_rung, pairs[0])
        found.append(Climb(*of_both, [labels[name][RUNG] for name, _ in there], there, seeds))
    return found


def sides(study: Results, scores: Scores, climb: Climb, alike: str) -> tuple[Side, Side]:
    """A variant's and its baseline's. Raises UserError of too few rungs, and where compute is not known or not of one
    machine."""
    if len(climb.rungs) < RUNGS:
        done = f" ({', '.join(climb.rungs)})" * bool(climb.rungs)
        raise UserError(f"{len(climb.rungs)} rungs{done} have paired seeds, and a gain needs {RUNGS}")
    if not climb.seeds:
        raise UserError("no seed is paired on every rung")
    cells = [name for pair in climb.cells for name in pair]
    runs = [scores[name][seed] for name in cells for seed in climb.seeds]
    if alike == TIME and len(machines := {*map(_machine, runs)}) > 1:
        raise UserError(f"the runs were timed on {len(machines)} kinds of machine")
    planned = {cell["name"]: cell for cell in study.plan["cells"]}
    of = _seconds if alike == TIME else lambda score: COSTS["training FLOPs"].of(planned[score.run.cell["name"]])
    shape = len(climb.cells), 2, len(climb.seeds)
    compute, losses = (np.array(row, float).reshape(shape) for row in (list(map(of, runs)), [run.loss for run in runs]))
    if not (compute > 0).all():
        raise UserError("not every run was timed" if alike == TIME else "the plan does not say what training costs")
    return Side(losses[:, 0], compute[:, 0]), Side(losses[:, 1], compute[:, 1])


def measured(variant: Side, baseline: Side, rungs: Sequence[str]) -> Gain:
    """The gain on each rung, the smallest first. Raises UserError where the baseline's compute does not rise from rung
    to rung, or its loss does not fall.

    A gain is C(L_variant) / C(L_baseline) x C_baseline / C_variant with C the inverse of the baseline's law: its misfit
    at a rung cancels. Intervals: Student t on the standard error that resampled seeds show, the law fitted again each
    time, since percentiles of a few seeds promise too much.
    """
    every = np.arange(baseline.losses.shape[1])
    x, y = baseline.at(every)
    for place, (rise, fall) in enumerate(zip(np.diff(x), -np.diff(y), strict=True)):
        if rise <= 0 or fall <= 0:
            what = "compute does not rise" if rise <= 0 else "loss does not fall"
            raise UserError(f"the baseline's {what} from {rungs[place]} to {rungs[place + 1]}")
    law, draws, laws, places = _laws(*(tuple(map(tuple, of.tolist())) for of in (baseline.compute, baseline.losses)))
    logs = _logs(law, variant, baseline, every)
    if not np.isfinite(logs).all():
        raise UserError(f"the variant is below {law.floor:.4f}, which the baseline's law reaches with no compute")
    centred = x - x.mean()
    slope = lambda of: of @ centred / (centred @ centred)  # noqa: E731
    statistics = [_logs(one, variant, baseline, seeds) for one, seeds in zip(laws, draws, strict=True)]
    halves = _half_widths(np.array([[*of, slope(of)] for of in statistics])[places], len(every))
    around = [_around(m, h) for m, h in zip([*logs, slope(logs)], halves, strict=True)]
    with np.errstate(over="ignore"):  # of seeds whose losses do not fall, a gain may be any number
        intervals = [pair and tuple(np.exp(pair).tolist()) for pair in around[:-1]]
    own = variant.at(every)[1]
    beyond = ((own < y.min()) | (own > y.max())).tolist()
    return Gain(law, np.exp(logs).tolist(), intervals, float(slope(logs)), around[-1], beyond)


@functools.cache
def _laws(compute: tuple, losses: tuple) -> tuple[Law, np.ndarray, list[Law], np.ndarray]:
    """Of a baseline [R, S]: its law, the distinct resamples of seeds, the law of each, and which of them every resample
    is. Kept, since all variants share them."""
    baseline = Side(np.array(losses), np.array(compute))
    count = baseline.losses.shape[1]
    x, y = baseline.at(np.arange(count))
    law = scaling.minimised(x[None], y)
    drawn = np.sort(np.random.default_rng(0).integers(count, size=(RESAMPLES, count)), axis=1)
    distinct, places = np.unique(drawn, axis=0, return_inverse=True)
    laws = [scaling.minimised(x[None], y, law) for x, y in map(baseline.at, distinct)]
    return law, distinct, laws, places.reshape(-1)


def _logs(law: Law, variant: Side, baseline: Side, seeds: np.ndarray) -> np.ndarray:
    """Logarithms of gains [R], not finite where the law reaches a loss with no compute."""
    (x, y), (x_0, y_0) = variant.at(seeds), baseline.at(seeds)
    with np.errstate(invalid="ignore"):
        return law.compute(y) - law.compute(y_0) - (x - x_0)


def _half_widths(drawn: np.ndarray, seeds: int) -> np.ndarray:
    """Of resampled statistics [resamples, n]: half the intervals [n]; nan of one seed, and where one is not finite."""
    if seeds < 2:
        return np.full(drawn.shape[1], math.nan)
    with np.errstate(invalid="ignore"):
        error = drawn.std(axis=0) * math.sqrt(seeds / (seeds - 1))  # resamples of n spread by (n - 1) / n too little
    return scipy.stats.t.ppf(1 - LEVEL / 2, seeds - 1) * error


def _around(middle: float, half: float) -> Interval | None:
    return (float(middle - half), float(middle + half)) if math.isfinite(half) else None


def _seconds(score: Score) -> float:
    """Of the whole run, at the rate of the process that finished it: that of a resumed run has made a part alone."""
    rates = [entry.get("tokens_per_second") for entry in score.run.result["timings"] if entry.get("phase") == "train"]
    return score.run.result["tokens"] / rates[0] if rates and rates[0] else math.nan


def _machine(score: Score) -> tuple:
    return tuple(map(str, map(score.fact, ("platform", "device_kind", "devices", "implementation"))))


def _side(interval: Interval | None) -> int:
    """1 above no gain, -1 below, 0 if that cannot be told."""
    return 0 if interval is None else int(interval[0] > 1) - int(interval[1] < 1)
