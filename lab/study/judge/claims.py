"""The published claims of compressed positions, and what long documents say of them."""

import itertools
from typing import NamedTuple

import numpy as np
import scipy

from lab.study.judge.documents import Paired, best_cf, between, cf, hybrids, methods, phase
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
    """By the seconds that reading the longest documents took: of the hybrids, and of the asks that run the program of
    the plain model, whose spread is what single timings are worth. An interval of the ratio judges, not one timing."""
    names = {one.name for one in hybrids(study)[1:]}
    taken = _column(study, cell, longest, "seconds")
    ours, theirs = ([taken[name] for name in group if name in taken] for group in (names, _alike(study, cell) - names))
    if not ours or not theirs:
        return Claim("no overhead", UNKNOWN, "no time was measured")
    logs = [np.log(group) for group in (ours, theirs)]
    mean = float(np.exp(logs[0].mean() - logs[1].mean())) - 1
    told = f"seconds at {longest} tokens of {len(ours)} hybrids over those of {len(theirs)} asks of the plain program: "
    if min(map(len, logs)) < 2 or max(map(np.ptp, logs)) == 0:
        return Claim("no overhead", UNKNOWN, f"{told}{mean:+.1%}, and no spread that tells what a timing is worth")
    low, high = np.exp(scipy.stats.ttest_ind(*logs, equal_var=False).confidence_interval(1 - LEVEL)) - 1
    outcome = "contradicted" if low > OVERHEAD else "supported" if high <= OVERHEAD else UNKNOWN
    return Claim("no overhead", outcome, f"{told}{mean:+.1%} [{low:+.1%}, {high:+.1%}]")


def _alike(study: Results, cell: str) -> set[str]:
    """The asks of text that run the program of the plain model, itself among them."""
    plain = methods(study)[0].name
    programs = {
        one.name: found["parts"]["program"][:1]
        for one in methods(study)
        for run in study.runs_by_cell[cell]
        if (found := run.asked.get(one.name))
    }
    return {name for name, program in programs.items() if program == programs.get(plain)}


def _memory(study: Results, cell: str, longest: int) -> Claim:
    """By the peak memory of the program that reads them, which is no timing; the source had a leak."""
    taken = _column(study, cell, longest, "peak_bytes")
    peaks = {cf(one): taken[one.name] for one in hybrids(study) if one.name in taken}
    if not {1.0, 2.0} <= {*peaks}:
        return Claim("cf 2 takes more memory", UNKNOWN, "no memory of it was measured")
    more, ran = peaks[2] / peaks[1] - 1, max(peaks)
    told = f"peak at {longest} tokens, less that of the plain model: {more:+.1%}; up to cf {ran:g} none ran out of it"
    return Claim("cf 2 takes more memory", "supported" if more > OVERHEAD else "contradicted", told)


def _column(study: Results, cell: str, length: int, name: str) -> dict[str, float]:
    """{ask: number} of a column of timings.csv at one length, the mean over seeds."""
    frame = study.timings
    frame = frame[(frame["cell"] == cell) & (frame[study.condition] == length)]
    found = frame.astype({name: float}).groupby("phase")[name].mean().to_dict()
    return {one.name: found[phase(one.name)] for one in methods(study) if found.get(phase(one.name), 0) > 0}
