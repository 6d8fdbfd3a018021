"""The published claims of compressed positions, and what long documents say of them."""

import itertools
import math
from typing import NamedTuple

from lab.study.judge.documents import Paired, best_cf, between, cf, hybrids, phase
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
    found += [_plain_is_better(study, cell, beyond[:1], paired), _no_harm(study, cell, paired)]
    return [*found, _no_overhead(study, cell, max(every[0].lengths)), _memory(study, cell, max(every[0].lengths))]


def _two_is_best(study: Results, cell: str, beyond: list[int]) -> Claim:
    """Of all cf at every length: supported where 2 is better than each other one, contradicted where one is better.
    The tests of all lengths are one family."""
    others = [one for one in hybrids(study) if cf(one) != 2]
    two = next((one for one in hybrids(study) if cf(one) == 2), None)
    outcomes, told, lengths = [], [], beyond if two else []
    every = [[between(study, (cell, two.name), (cell, one.name), n, "all") for one in others] for n in lengths]
    adjusted = iter(holm([one.estimate.p for tests in every for one in tests]))
    for length, tests in zip(lengths, every, strict=True):
        ps = list(itertools.islice(adjusted, len(tests)))
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


def _plain_is_better(study: Results, cell: str, shortest: list[int], paired: list[Paired]) -> Claim:
    """At the first length beyond L, against every hybrid."""
    names = {one.name for one in hybrids(study)[1:]}
    found = [p for p in paired if p.arm[0] == cell and p.arm[1] in names and p.part == "all" and p.length in shortest]
    better = sorted(one.arm[1] for one in found if one.verdict == "better")
    verdicts = {one.verdict for one in found}
    outcome = "supported" if verdicts == {"worse"} else "contradicted" if better else UNKNOWN
    told = f"better than it: {', '.join(better)}" if better else "against every hybrid"
    at = f"{shortest[0]} tokens: " if shortest else ""
    return Claim("within a modest stretch the plain model is better", outcome, at + told)


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
    """By the seconds that reading the longest documents took."""
    plain, others = _measured(study, cell, longest, "seconds")
    more = [each / plain - 1 for each in others.values() if math.isfinite(each / plain)]
    if not more:
        return Claim("no overhead", UNKNOWN, "no time was measured")
    most = max(more)
    told = (
        f"seconds at {longest} tokens, less those of the plain model: {min(more):+.1%} to {most:+.1%} (single timings)"
    )
    outcome = "contradicted" if min(more) > OVERHEAD else "supported" if max(map(abs, more)) <= OVERHEAD else UNKNOWN
    return Claim("no overhead", outcome, told)


def _memory(study: Results, cell: str, longest: int) -> Claim:
    """By the peak memory of the program that reads them, which is no timing; the source had a leak."""
    plain, others = _measured(study, cell, longest, "peak_bytes")
    more = others.get(2, math.nan) / plain - 1
    if not math.isfinite(more):
        return Claim("cf 2 takes more memory", UNKNOWN, "no memory of it was measured")
    ran = max(each for each, peak in others.items() if math.isfinite(peak))
    told = f"peak at {longest} tokens, less that of the plain model: {more:+.1%}; up to cf {ran:g} none ran out of it"
    return Claim("cf 2 takes more memory", "supported" if more > OVERHEAD else "contradicted", told)


def _measured(study: Results, cell: str, length: int, name: str) -> tuple[float, dict[float, float]]:
    """A column of timings.csv at one length: of the plain model, and by cf; the mean over seeds."""
    frame = study.timings
    frame = frame[(frame["cell"] == cell) & (frame[study.condition] == length)]
    found = frame.astype({name: float}).groupby("phase")[name].mean().to_dict()
    plain, *others = hybrids(study)
    return found.get(phase(plain.name), math.nan), {cf(one): found.get(one.name, math.nan) for one in others}
