"""The published claims of compressed positions, and what long documents say of them."""

import math
from typing import NamedTuple

from lab.study.judge.documents import Paired, best_cf, between, cf, hybrids
from lab.study.judge.evidence import UNKNOWN, overall
from lab.study.judge.statistics import LEVEL, holm
from lab.study.results import Results

OVERHEAD = 0.05  # share of the seconds from which there is one


class Claim(NamedTuple):
    claim: str
    outcome: str  # supported | contradicted | cannot tell
    told: str


def claims(study: Results, L: int, paired: list[Paired]) -> list[Claim]:
    """Of the first cell; none where the study has no plain hybrid."""
    every, cell = hybrids(study), study.plan["cells"][0]["name"]
    if len(every) < 2:
        return []
    beyond = [length for length in sorted(every[0].lengths) if length > L]
    found = [_two_is_best(study, cell, beyond), _grows(study, cell, beyond)]
    return [*found, _no_harm(study, cell, paired), _no_overhead(study, cell, max(every[0].lengths))]


def _two_is_best(study: Results, cell: str, beyond: list[int]) -> Claim:
    """Of all cf at every length: supported where 2 is better than each other one, contradicted where one is better."""
    others = [one for one in hybrids(study) if cf(one) != 2]
    two = next((one for one in hybrids(study) if cf(one) == 2), None)
    outcomes, told = [], []
    for length in beyond if two else ():
        tests = [between(study, (cell, two.name), (cell, one.name), length, "all") for one in others]
        ps = holm([one.estimate.p for one in tests])
        wins = [p is not None and p < LEVEL and one.estimate.mean < 0 for one, p in zip(tests, ps, strict=True)]
        loses = [p is not None and p < LEVEL and one.estimate.mean > 0 for one, p in zip(tests, ps, strict=True)]
        outcomes.append("supported" if all(wins) else "contradicted" if any(loses) else UNKNOWN)
        better = [f"{cf(one):g}" for one, lost in zip(others, loses, strict=True) if lost]
        told.append(f"{length}: {'better than 2: cf ' + ', '.join(better) if better else 'none is better than 2'}")
    return Claim("cf 2 is best", overall(outcomes) if outcomes else UNKNOWN, "; ".join(told))


def _grows(study: Results, cell: str, beyond: list[int]) -> Claim:
    best = {length: found for length in beyond if (found := best_cf(study, cell, length))}
    told = ", ".join(f"{length}: {cf(found):g}" for length, found in best.items())
    claim, outcome = "the best cf grows with the stretch", UNKNOWN
    if len(best) > 1:
        first, last, longest = best[min(best)], best[max(best)], max(best)
        one = between(study, (cell, last.name), (cell, first.name), longest, "all")
        chosen = len(hybrids(study)) - 1  # the best of so many, on the documents that judge it
        if one.estimate.p is not None and one.estimate.p * chosen < LEVEL and one.estimate.mean < 0:
            outcome = "supported" if cf(last) > cf(first) else "contradicted"
    return Claim(claim, outcome, f"best cf by length: {told}" if told else "")


def _no_harm(study: Results, cell: str, paired: list[Paired]) -> Claim:
    names = {one.name for one in hybrids(study)[1:]}
    found = [one for one in paired if one.arm[0] == cell and one.arm[1] in names and one.part == "within"]
    verdicts = [one.verdict for one in found]
    harmed = sorted({one.arm[1] for one in found if one.verdict == "worse"})
    outcome = "supported" if verdicts and {*verdicts} <= {"same", "better"} else "contradicted" if harmed else UNKNOWN
    return Claim(
        "no harm within L",
        outcome,
        f"worse: {', '.join(harmed)}" if harmed else "of every hybrid, against the plain model",
    )


def _no_overhead(study: Results, cell: str, longest: int) -> Claim:
    frame = study.timings
    frame = frame[(frame["cell"] == cell) & (frame[study.condition] == longest)]
    seconds = frame.groupby("phase")["seconds"].mean().to_dict()
    plain, *others = [seconds.get(one.name, math.nan) for one in hybrids(study)]
    more = [each / plain - 1 for each in others if math.isfinite(each / plain)]
    if not more:
        return Claim("no overhead", UNKNOWN, "no time was measured")
    most = max(more)
    told = (
        f"seconds at {longest} tokens, less those of the plain model: {min(more):+.1%} to {most:+.1%} (single timings)"
    )
    outcome = "contradicted" if min(more) > OVERHEAD else "supported" if max(map(abs, more)) <= OVERHEAD else UNKNOWN
    return Claim("no overhead", outcome, told)
