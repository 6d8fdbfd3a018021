"""What a page opens with: the answer in one sentence, how sure it is, and which cell is best where.

Nothing here knows a study by name: a sentence names cells by their labels, and says what cannot be told, and why, where
a number would claim more than the runs show.
"""

import math
import re
from collections.abc import Sequence
from statistics import fmean, median

import numpy as np

from lab.study.define.contrasts import settings
from lab.study.judge import pairing
from lab.study.judge.evidence import UNKNOWN, Comparison, Findings, overall
from lab.study.judge.pairing import Scores
from lab.study.judge.residuals import COSTS, beside, relative
from lab.study.judge.statistics import detectable, half_widths
from lab.study.numbers import number
from lab.study.report import costs, scaling
from lab.study.report.layout import describe
from lab.study.report.page import Piece, Section, Table, Text
from lab.study.results import Results

MOST = 24  # conditions that a table has a row for
SAME = re.compile(r"—|[+-]0\.0%")  # a cost in which the sides do not differ
TWO_SIDES = re.compile(r"\(([^()]*)\) - \(([^()]*)\)")  # of a contrast that has no more
KEPT = "`--config.study.seeds={}` adds seeds, and keeps the runs that are done"


def section(study: Results, findings: Findings | None, figure: Sequence[Piece] = ()) -> Section:
    """The question, the answer, how much of it is there and how sure it is; the headline `figure` follows, and without
    a comparison that the study names, the best cell under each condition."""
    told = [Text(study.plan["question"]), Text(answer(study, findings), strong=True), Text(progress(study))]
    told += [Text(note) for note in (claims(findings), certainty(study, findings)) if note]
    return Section("Answer", [*told, *figure, *([] if findings else best_by_condition(study))])


def answer(study: Results, findings: Findings | None) -> str:
    """One sentence: the best verdict with its interval, or the law of a ladder, or which cell has the lowest loss; else
    what cannot be told and why."""
    scores = _scores(study, findings)
    if not any(scores.values()):
        return _nothing(study)
    pending = any(run.status == "pending" for run in study.runs)
    said = _verdict(study, findings) if findings else scaling.answer(study) or _lowest(study, scores)
    failed = sum(run.status == "failed" and not run.rows() for run in study.runs)
    lost = f"; {failed} failed run{'s' * (failed > 1)} count{'s' * (failed == 1)} in nothing" if failed else ""
    return f"{'So far: ' if pending else ''}{said}{lost}."


def progress(study: Results) -> str:
    """**8 of 10 cells done**, 1 failed, 1 pending."""
    states = [run.status for run in study.runs]
    runs = "cell" if all(len(cell["seeds"]) == 1 for cell in study.plan["cells"]) else "run"
    counted = "".join(f", {states.count(state)} {state}" for state in ("failed", "pending") if state in states)
    return f"**{states.count('done')} of {len(states)} {runs}s done**{counted}."


def claims(findings: Findings | None) -> str:
    """How many hypotheses are supported, in a line; "" without any."""
    if not findings or not findings.evidence:
        return ""
    by_claim: dict = {}
    for one in findings.evidence:
        by_claim.setdefault(one.claim, []).append(one.outcome)
    found = [overall(outcomes) for outcomes in by_claim.values()]
    counted = ", ".join(f"{found.count(each)} {each}" for each in ("supported", "contradicted"))
    rest = sum(each not in ("supported", "contradicted") for each in found)
    return f"Of {len(found)} claim{'s' * (len(found) > 1)} {counted}, {rest} cannot be told."


def certainty(study: Results, findings: Findings | None) -> str:
    """The smallest difference that these seeds find, and what more of them would; why there is none of one seed."""
    scores = _scores(study, findings)
    counts = [len(by_seed) for by_seed in scores.values() if by_seed]
    if not counts or len(scores) < 2:
        return ""
    spread = _deviations(scores, findings)
    if max(counts) < 2:
        return f"**Noise floor: unknown with one seed**, so no difference has an interval: {KEPT.format(3)}."
    if not spread:
        return "**Noise floor: unknown**: no two cells share two seeds in which their difference varies."
    n, deviation = round(median(n for n, _ in spread)), median(deviation for _, deviation in spread)
    more = ", ".join(f"{detectable(k) * deviation:.4f} with {k}" for k in (2 * n, 4 * n))
    untested = " The study names no baseline, so nothing is tested: the lowest of many is lucky too."
    return (
        f"**Noise floor**: {n} seeds find a difference of {detectable(n) * deviation:.4f} {study.measure.unit} 4 times "
        f"in 5 (median over pairs of cells, uncorrected); it would be {more} ({KEPT.format(2 * n)})."
        f"{'' if findings else untested}"
    )


def best_by_condition(study: Results) -> list[Piece]:
    """For each value of the condition the cell of the lowest mean loss, and by how much the next is worse."""
    conditions = list(dict.fromkeys(study.results[study.condition]))
    if not 1 < len(conditions) <= MOST or study.results["cell"].nunique() < 2:
        return []
    cells, shown, rows = {cell["name"]: cell for cell in study.plan["cells"]}, beside(study), []
    for value in conditions:
        scores = pairing.scores(study, (value,))
        ranked = _ranked(scores)
        if not ranked:
            continue
        key = study.key(cells[ranked[0]])
        behind = _gap(scores, ranked) if len(ranked) > 1 else (None, None)
        said = _bounds(*behind)
        rows.append([
            str(value), *map(str, key), number(_mean(scores, ranked[0]), 4), number(behind[0], 4), said or "—",
            _apart(*behind), *shown.cells[key],
        ])  # fmt: skip
    gaps = ["next is worse by", "95% interval", "told apart"]
    columns = [study.condition, *study.labels, study.measure.heading, *gaps, *shown.columns]
    caption = (
        f"**The best cell at each {study.condition}**: mean loss over seeds in {study.measure.unit}, and how much "
        "worse the next best is, seed by seed. An interval stands by itself, for a choice made after looking."
    )
    return [Table(columns, rows, caption), costs.common(study)] if rows else []


def _nothing(study: Results) -> str:
    failed, pending = (sum(run.status == state for run in study.runs) for state in ("failed", "pending"))
    if not pending:
        return f"**Nothing can be told**: {'the only run' if failed == 1 else f'all {failed} runs'} failed."
    return f"**Nothing can be told yet**: no run is done{f', and {failed} failed' if failed else ''}."


def _verdict(study: Results, findings: Findings) -> str:
    """Of the comparisons with a baseline, else of the contrasts."""
    told = findings.of_kind("baseline") or findings.of_kind("contrast")
    paired = [one for one in told if one.estimate.n]
    if not paired:
        refused = any(one.differences.refused for one in told)
        why = "their runs were not made alike (refused pairs, below)" if refused else "no two have finished a seed both"
        return f"**Nothing can be told yet**: {why}"
    by_mean = sorted(paired, key=lambda one: one.estimate.mean)
    found = {said: [one for one in by_mean if one.verdict == said] for said in ("better", "worse")}
    rest = len(told) - len(found["better"]) - len(found["worse"])
    counted = f"{len(found['better'])} better, {len(found['worse'])} worse, {rest} cannot be told"
    tally = f"of {len(told)} comparisons {counted}"
    if found["better"]:
        one = found["better"][0]
        return f"**{_sides(study, one, 'better')}** by {_size(one)}, {_price(one)}; {tally}"
    if found["worse"]:
        one = found["worse"][-1]
        return (
            "**Nothing is better than what it is compared with**; "
            f"{_sides(study, one, 'worse')} by {_size(one)}; {tally}"
        )
    one = by_mean[0]
    if max(other.estimate.n for other in paired) < 2:
        return (
            f"**One seed cannot tell**: the lowest difference is {one.estimate.mean:+.4f} {study.measure.unit}, of "
            f"{_named(study, one)}, {_price(one)}, and how far a loss moves by chance shows only between seeds"
        )
    return f"**No difference can be told from noise**: the lowest is of {_named(study, one)}, {_signed(one)}; {tally}"


def _lowest(study: Results, scores: Scores) -> str:
    ranked, cells = _ranked(scores), study.plan["cells"]
    if not ranked:
        return "**Nothing can be told**: no finished run has a finite loss"
    best = ranked[0]
    seeds = len(scores[best])
    loss = f"{_mean(scores, best):.4f} {study.measure.unit} ({_where(study, scores[best])}{_seeds(seeds)})"
    if len(cells) == 1:
        return f"**There is one cell, so nothing is compared**: its loss is {loss}"
    if len(ranked) == 1:
        return f"**Only {_label(study, best)} is done, so nothing is compared**: its loss is {loss}"
    mean, half = _gap(scores, ranked)
    start, second = f"**{_label(study, best)} has the lowest loss**, {loss}", _label(study, ranked[1])
    if mean is None:
        return f"{start}; the next, {second}, has no seed that was made like it, so the two cannot be compared"
    if mean < 0:
        return (
            f"**Nothing can be told**: over all seeds {_label(study, best)} is ahead, {loss}, but at those of both "
            f"{second} is lower by {-mean:.4f}"
        )
    if half is None:
        shared = scores[best].keys() & scores[ranked[1]].keys()
        why = (
            "one seed cannot tell that from noise"
            if len(shared) < 2
            else "their seeds do not vary, so nothing is tested"
        )
        return f"{start}, {mean:.4f} below the next, {second}: {why}"
    if mean - half > 0:
        return f"{start}, {mean:.4f} {_bounds(mean, half)} below the next, {second}: more than noise of its seeds"
    behind = f"{mean:.4f} {_bounds(mean, half)}"
    return f"{start}, but the next, {second}, is only {behind} above: these seeds cannot tell them apart"


def _scores(study: Results, findings: Findings | None) -> Scores:
    if findings:
        return findings.scores
    return pairing.scores(study, settings(study.plan["config"].get("study", {})).judged)


def _ranked(scores: Scores) -> list[str]:
    """The cells that have a finite mean loss, the lowest first. None is better for want of a hard seed: of cells with
    unlike seeds, a number for each cell and one for each seed are fitted to the losses (least squares)."""
    means = {name: _mean(scores, name) for name, by_seed in scores.items() if by_seed}
    names = [name for name, mean in means.items() if math.isfinite(mean)]
    if len({frozenset(scores[name]) for name in names}) > 1:
        seeds = sorted(set().union(*(scores[name] for name in names)))
        found = [(name, seed, score.loss) for name in names for seed, score in scores[name].items()]
        design = np.zeros((len(found), len(names) + len(seeds)))
        for row, (name, seed, _) in enumerate(found):
            design[row, [names.index(name), len(names) + seeds.index(seed)]] = 1
        losses = np.array([loss for *_, loss in found])
        fitted = np.linalg.lstsq(design, losses - losses.mean(), rcond=None)[0]
        means = dict(zip(names, fitted, strict=False))
    return sorted(names, key=means.get)


def _mean(scores: Scores, name: str) -> float:
    return fmean(score.loss for score in scores[name].values())


def _gap(scores: Scores, ranked: Sequence[str]) -> tuple[float | None, float | None]:
    """By how much the second is worse than the first over the seeds that both have, and half the 95% interval."""
    found = pairing.differences([[scores[ranked[1]]], [scores[ranked[0]]]], (1, -1))
    values = np.array(list(found.kept.values()))
    if not len(values):
        return None, None
    vary = len(values) > 1 and values.std(ddof=1) > found.resolution
    return float(values.mean()), float(half_widths(values)) if vary else None


def _deviations(scores: Scores, findings: Findings | None) -> list[tuple[int, float]]:
    """(seeds, deviation) of the differences: of those that the study names, else of each cell from the best."""
    if findings:
        known = [one.estimate for one in findings.comparisons if one.estimate.detectable is not None]
        return [(one.n, one.deviation) for one in known]
    ranked, found = _ranked(scores), []
    for name in ranked[1:]:
        pair = pairing.differences([[scores[name]], [scores[ranked[0]]]], (1, -1))
        values = np.array(list(pair.kept.values()))
        if len(values) > 1 and values.std(ddof=1) > pair.resolution:
            found.append((len(values), float(values.std(ddof=1))))
    return found


def _apart(mean: float | None, half: float | None) -> str:
    if mean is None:
        return "—"
    return "yes" if half is not None and mean - half > 0 else UNKNOWN


def _bounds(mean: float | None, half: float | None) -> str:
    return "" if half is None else f"[{mean - half:+.4f}, {mean + half:+.4f}]"


def _label(study: Results, name: str) -> str:
    """A cell by its labels; what is no cell keeps its name."""
    found = next((cell for cell in study.plan["cells"] if cell["name"] == name), None)
    return (found and describe(found["labels"])) or name


def _sides(study: Results, one: Comparison, verdict: str) -> str:
    if one.kind == "baseline":
        return f"{_label(study, one.name)} is {verdict} than {_label(study, one.against)}"
    if two := TWO_SIDES.fullmatch(one.against):
        return f"{two[1]} is {verdict} than {two[2]}"
    return f"{one.name}: {one.against} is {verdict}"


def _named(study: Results, one: Comparison) -> str:
    if one.kind == "baseline":
        return f"{_label(study, one.name)} less {_label(study, one.against)}"
    return f"{one.name}, {one.against}"


def _size(one: Comparison) -> str:
    low, high = sorted(abs(bound) for bound in one.estimate.t_interval)
    return f"{abs(one.estimate.mean):.4f} {one.differences.measure.unit}, 95% interval [{low:.4f}, {high:.4f}]"


def _signed(one: Comparison) -> str:
    known = one.estimate
    bounds = f" [{known.t_interval[0]:+.4f}, {known.t_interval[1]:+.4f}]" if known.t_interval else ""
    return f"{known.mean:+.4f}{bounds} {one.differences.measure.unit}"


def _price(one: Comparison) -> str:
    """What the first side costs more: at training FLOPs +12.0%."""
    more = {name: text for name, text in zip(COSTS, relative(one.residuals), strict=True) if not SAME.fullmatch(text)}
    return f"at {', '.join(f'{name} {text}' for name, text in more.items())}" if more else "at the same cost"


def _where(study: Results, by_seed: dict) -> str:
    conditions = next(iter(by_seed.values())).conditions
    named = ", ".join(map(str, conditions)) if len(conditions) < 4 else f"{conditions[0]} to {conditions[-1]}"
    return f"{'at' if len(conditions) == 1 else 'mean over'} {study.condition} {named}"


def _seeds(count: int) -> str:
    return f", {count} seeds" if count > 1 else ", one seed"
