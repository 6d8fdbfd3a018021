"""The part of a report on questions over passages: what each way to answer them gets right, and what it costs."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from lab.study.judge.evidence import UNKNOWN
from lab.study.judge.statistics import LEVEL, Estimate, estimate, holm
from lab.study.numbers import number
from lab.study.report.page import Piece, Table, Text
from lab.study.results import Results

NAME = "questions"  # in SECTIONS
AXIS = "decoding"  # of the asks that it tells of
PLAIN, BRANCHES = "one_by_one", "branches"
LEAST = 10  # passages that say anything

ByMethod = Mapping[str, Mapping[str, list]]  # {method: what is kept of every passage, for each seed}


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of a method less another, in the share of right answers, over the passages of both."""

    cell: dict
    method: str
    other: str
    estimate: Estimate
    adjusted: float | None = None

    @property
    def verdict(self) -> str:
        """better | worse | same | cannot tell"""
        if self.estimate.n < LEAST:
            return f"{UNKNOWN} ({self.estimate.n} passages)"
        if self.estimate.mean == 0 and not self.estimate.deviation:
            return "same"
        if self.adjusted is None or self.adjusted >= LEVEL:
            return UNKNOWN
        return "better" if self.estimate.mean > 0 else "worse"


def told(study: Results) -> list[str]:
    """The asks that the section tells of."""
    return [name for name, axis in study.further_asks.items() if axis == AXIS]


def section(study: Results) -> list[Piece]:
    """Of every such ask."""
    found = [piece for name in told(study) for piece in _of(study, name)]
    return found or [Text("No question has been asked yet.")]


def _of(study: Results, name: str) -> list[Piece]:
    frame = study.answers(name)
    if frame.empty:
        return []
    means = frame.groupby(["cell", AXIS]).mean(numeric_only=True)
    timed = study.timings[study.timings["phase"] == name].groupby(["cell", study.condition])["tokens_per_second"]
    speeds, methods = timed.mean(), list(dict.fromkeys(frame[AXIS]))
    rows, cells = [], [cell for cell in study.plan["cells"] if cell["name"] in set(frame["cell"])]
    for cell in cells:
        kept = kept_of(study, cell, name)
        for method in methods:
            row, place = means.loc[cell["name"], method], (cell["name"], method)
            plain = speeds.get((cell["name"], PLAIN))
            rows.append([
                *map(str, study.key(cell)), method, f"{row['accuracy']:.1%}", f"{row['f1']:.1%}", _same(kept, method),
                number(row["processed"] / row["questions"], 1), number(row["steps"] / row["questions"], 2),
                number(speeds[place], 0), "—" if plain is None else f"{speeds[place] / plain:.2f}",
            ])  # fmt: skip
    columns = ["decoding", "exact", "F1", "as one by one", "tokens a question", "steps a question", "tokens/s", "times"]
    count = frame["questions"].iloc[0]
    caption = (
        f"`{name}`, {count:g} questions, means over seeds. Exact, F1: of answers that are taken. As one by one: the "
        "share of them that are the same. Tokens, steps: that the model was given for a question, its share of the "
        "passage and every sample among them; the same on every machine. Tokens/s: generated, all samples, on this "
        "machine; times: by those of one by one."
    )
    pieces = [Table([*study.labels, *columns], rows, caption, sortable=True)]
    if compared := compare(study, name, cells):
        pieces.append(_compared(study, compared))
    return pieces


def kept_of(study: Results, cell: dict, name: str) -> ByMethod:
    """What is kept of the passages of a cell, by method."""
    found: dict = {}
    for run in study.runs_by_cell[cell["name"]]:
        for one in (run.asked[name] or {}).get("documents", ()) if run.rows(name) else ():
            of = found.setdefault(one[AXIS], {"exact": [], "answers": []})
            of["exact"].append([float(np.mean(right)) for right in one["exact"]])
            of["answers"].append([answer for given in one["answers"] for answer in given])
    return found


def _same(kept: ByMethod, method: str) -> str:
    if not {PLAIN, method} <= {*kept}:
        return "—"
    both = (np.array(kept[each]["answers"]) for each in (PLAIN, method))
    return f"{np.mean(np.equal(*both)):.1%}"


def compare(study: Results, name: str, cells: list[dict]) -> list[Difference]:
    """Branches less one by one, and several samples less one sample and less one greedy answer: one family of tests."""
    found = []
    for cell in cells:
        kept = kept_of(study, cell, name)
        pairs = [(method, other) for method in kept for other in _others(method) if other in kept]
        for method, other in pairs:
            share, less = (np.mean(kept[each]["exact"], axis=0) for each in (method, other))
            found.append(Difference(cell, method, other, estimate(share - less)))
    adjusted = holm([one.estimate.p for one in found])
    return [dataclasses.replace(one, adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def _others(method: str) -> list[str]:
    """What a method is compared with."""
    kind, _, times = method.rpartition("-")
    if method == BRANCHES:
        return [PLAIN]
    return ["vote-1", PLAIN] if kind and int(times) > 1 else []


def _compared(study: Results, compared: list[Difference]) -> Table:
    rows = []
    for one in compared:
        bounds = one.estimate.bootstrap_interval if one.estimate.values and one.estimate.n >= LEAST else None
        interval = f" [{bounds[0]:+.1%}, {bounds[1]:+.1%}]" if bounds else ""
        labels = map(str, study.key(one.cell))
        rows.append([*labels, f"{one.method} - {one.other}", f"{one.estimate.mean:+.1%}{interval}", one.verdict])
    caption = (
        "Do branches answer as well as one after the other, and do several samples help? Differences in exact answers, "
        "paired by passage (means over seeds); 95% by resampling passages; verdicts by paired t-tests, corrected over "
        "all of them (Holm)."
    )
    return Table([*study.labels, "difference", "exact", "verdict"], rows, caption)
