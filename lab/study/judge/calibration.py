"""A/A calibration: how often the judgement of a study finds a difference where there is none, and what it misses.

Pseudo-studies of the study's size are drawn from runs of one cell that have the same texts and other initial values.
Nothing differs between their cells, so that every verdict on them is false.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy

from lab.study.define.contrasts import SIGNS, settings
from lab.study.judge import evidence, pairing, statistics
from lab.study.judge.pairing import Differences, Score
from lab.study.judge.statistics import LEVEL, Interval
from lab.study.results import Results, outcomes

EACH, DRAWN = 4, 400  # pseudo-studies for each repeated run, as more share runs so much that no interval holds; in all

Pool = Mapping[int, Sequence[Score]]  # {data seed: runs that may be paired}


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What pseudo-studies of `comparisons` comparisons over `seeds` seeds have shown.

    studies: those that were judged, no two with the same differences. false: those of them with any verdict. deviation:
    of the difference between two runs of one data seed, in the measure of the study, pooled over the seeds.
    """

    seeds: int
    comparisons: int
    studies: int
    false: int
    deviation: float

    @property
    def share(self) -> float:
        return self.false / self.studies

    @property
    def interval(self) -> Interval:
        """Of the share of false verdicts: the exact binomial one (Clopper and Pearson 1934)."""
        found = scipy.stats.binomtest(self.false, self.studies).proportion_ci(1 - LEVEL, method="exact")
        return float(found.low), float(found.high)

    def detectable(self, seeds: int, comparisons: int = 1) -> float:
        """The difference that so many seeds find with probability POWER, if it is the smallest of so many
        comparisons."""
        return self.deviation * statistics.detectable(seeds, comparisons)


def pool(study: Results) -> Pool:
    """The finished runs of the cell that is calibrated, its own and the repeats, at every seed; those that may not be
    paired with the last repeat are left out."""
    repeats, asked = study.plan["calibration"], settings(study.plan["config"].get("study", {}))
    cells = [cell for cell in study.plan["cells"] if cell["name"] == repeats[0]["cell"]]
    runs = [run for run in study.runs if run.cell in cells] + outcomes(study.directory, repeats)
    every = dataclasses.replace(study, plan=study.plan | {"cells": cells + repeats}, runs=runs)
    scores, found = pairing.scores(every, asked.judged), {}
    for seed in repeats[0]["seeds"]:
        there = [by_seed[seed] for by_seed in scores.values() if seed in by_seed]
        found[seed] = [score for score in there if not pairing.mismatch(there[-1], score)]
    return found


def calibrate(pool: Pool, comparisons: int) -> Calibration | None:
    """Draws pseudo-studies and judges each as a study of so many comparisons is judged. The same pool gives the same
    answer. None where fewer than two seeds have two runs."""
    pool = {seed: runs for seed, runs in pool.items() if len(runs) > 1}
    if len(pool) < 2:
        return None
    generator = np.random.default_rng(0)
    count = min(DRAWN, EACH * sum(len(runs) - 1 for runs in pool.values()))
    drawn = [_drawn(pool, comparisons, generator) for _ in range(count)]
    studies = {_key(study): study for study in drawn}  # few runs make few studies, and a copy of one tells nothing
    false = sum(map(_has_verdict, studies.values()))
    losses = [[score.loss for score in runs] for runs in pool.values()]
    squares = sum(float(np.var(values)) * len(values) for values in losses)
    variance = squares / sum(len(values) - 1 for values in losses)
    return Calibration(len(pool), comparisons, len(studies), false, math.sqrt(2 * variance))


def _drawn(pool: Pool, comparisons: int, generator: np.random.Generator) -> list[Differences]:
    """A pseudo-study: at each seed one run is the baseline, and each comparison has one of the others."""
    own, others = {}, [{} for _ in range(comparisons)]
    for seed, runs in pool.items():
        first = generator.integers(len(runs))
        own[seed] = runs[first]
        for other, step in zip(others, generator.integers(1, len(runs), comparisons), strict=True):
            other[seed] = runs[(first + step) % len(runs)]
    return [pairing.differences([[other], [own]], SIGNS[2]) for other in others]


def _key(study: list[Differences]) -> tuple:
    """The same for studies that are judged alike: those whose comparisons are in another order, or turned round."""
    found = [tuple(one.kept.values()) for one in study]
    return tuple(sorted(max(values, tuple(-value for value in values)) for values in found))


def _has_verdict(study: list[Differences]) -> bool:
    made = [evidence.compare("calibration", "", "", differences, {}) for differences in study]
    return any(not one.verdict.startswith(evidence.UNKNOWN) for one in evidence.corrected(made))
