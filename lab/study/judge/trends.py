"""Paired differences of the training loss against tokens seen: does an ordering hold all along, or only at the end?"""

import dataclasses

import numpy as np

from lab.study.judge.evidence import Comparison, Findings
from lab.study.judge.statistics import half_widths, resolution
from lab.study.measure import NATS, Measure
from lab.study.numbers import short
from lab.study.results import Outcome

BINS = 40
EARLY, LATE = 0.2, 0.9  # shares of training: an ordering that stands from before, or only from after
END = 0.1  # the share of training over which the last word is averaged


@dataclasses.dataclass(frozen=True)
class Trend:
    """Binned differences of every seed, at the tokens seen by the end of each bin."""

    tokens: np.ndarray  # [bins]
    values: np.ndarray  # [seeds, bins]
    resolution: float = 0.0  # the step between neighbouring losses
    measure: Measure = NATS  # of the differences

    @property
    def mean(self) -> np.ndarray:
        return self.values.mean(axis=0)

    @property
    def half(self) -> np.ndarray | None:
        """Half the pointwise 95% interval [bins]; None of one seed."""
        return half_widths(self.values) if len(self.values) > 1 else None


def trend(findings: Findings, comparison: Comparison) -> Trend | None:
    """Of a comparison with a baseline, over the seeds that are paired; None if they have logged nothing in common."""
    tokens, curves, largest = [], [], 0.0
    score = comparison.differences.measure.column
    for seed in comparison.differences.kept:
        runs = [findings.scores[name][seed].run for name in (comparison.name, comparison.against)]
        steps = _shared_steps(*runs)
        if not steps:
            return None
        own, other = ({line["step"]: line for line in run.metrics} for run in runs)
        seen = dict(zip(own, np.cumsum([line.get("tokens", 0) for line in own.values()]), strict=True))
        parts = np.array_split(steps, min(BINS, len(steps)))
        curves.append([np.mean([own[step][score] - other[step][score] for step in part]) for part in parts])
        tokens.append([seen[part[-1]] for part in parts])
        largest = max(largest, *(abs(lines[step][score]) for lines in (own, other) for step in steps))
    if not curves or len(set(map(len, curves))) > 1:
        return None
    return Trend(np.mean(tokens, axis=0), np.array(curves), resolution(largest), comparison.differences.measure)


def reading(trend: Trend) -> str:
    """What the curve shows, in words: at the end, and since when the mean has been on that side."""
    if len(trend.values) < 2:
        return "one seed: no band, so nothing can be told"
    bins = trend.values.shape[1]
    ends = trend.values[:, -max(1, round(END * bins)) :].mean(axis=1)
    if ends.std(ddof=1) <= trend.resolution:
        return "cannot tell: the seeds do not differ"
    if not abs(ends.mean()) > half_widths(ends):
        return "cannot tell: the interval of the end holds 0"
    side = "lower" if ends.mean() < 0 else "higher"
    others = np.flatnonzero(np.sign(trend.mean) != np.sign(ends.mean()))
    begun = others[-1] + 1 if len(others) else 0
    share = min(begun, bins - 1) / bins
    if share <= EARLY:
        return f"{side} through training" if not share else f"{side} from the first {100 * share:.0f}% of training on"
    when = f"{short(float(trend.tokens[min(begun, bins - 1)]))} tokens"
    return f"{side} only at the end, from {when} on" if share >= LATE else f"{side} from {when} on"


def _shared_steps(one: Outcome, other: Outcome) -> list[int]:
    there = {line["step"] for line in other.metrics}
    return [line["step"] for line in one.metrics if line["step"] in there]
