"""The numbers behind a report's tables, as plain dicts: losses by cell and condition, and what is read off them."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping

import pandas as pd

from lab.study.results import Results

Key = tuple  # the values of a cell's labels, in the study's order of labels
Losses = dict[Key, dict[int, float]]  # a curve for each cell: loss, in the measure of the study, by condition


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best cell under one criterion (lower is better); `runner_up` is None where only one cell qualifies."""

    key: Key
    value: float
    runner_up: Key | None
    margin: float | None  # by how much the runner-up is worse


def losses(study: Results) -> Losses:
    """Means over the seeds that are done; cells without one are left out."""
    return {
        key: {count: statistics.fmean(values) for count, values in curve.items()}
        for key, curve in _by_seed(study).items()
    }


def deviations(study: Results) -> Losses:
    """Sample standard deviations over seeds, where at least two are done."""
    return {
        key: {count: statistics.stdev(values) for count, values in curve.items() if len(values) > 1}
        for key, curve in _by_seed(study).items()
    }


def published(study: Results) -> Losses:
    """Published losses of the plan's cells; one of a file without a column for the condition holds for all conditions
    that we have. Empty where `published_rows` is."""
    found: Losses = {}
    every = list(dict.fromkeys(study.results[study.condition]))
    for key, rows in published_rows(study).items():
        for row in rows:
            conditions = [row[study.condition]] if study.condition in row else every
            found.setdefault(key, {}).update(dict.fromkeys(conditions, row["loss"]))
    return found


def published_rows(study: Results) -> dict[Key, list[dict]]:
    """The rows of the published file for each of the plan's cells, where they have a loss.

    Empty where no file is named, where one of the study's labels is none of its columns, and where it has several
    losses for one cell and condition: it then tells cells apart by something that the study lacks.
    """
    frame = study.published()
    if frame is None or not study.labels or not {*study.labels} <= {*frame.columns}:
        return {}
    frame = frame.dropna(subset="loss")
    if frame.duplicated([*study.labels, *({study.condition} & {*frame.columns})]).any():
        return {}
    planned = {study.key(cell) for cell in study.plan["cells"]}
    found: dict[Key, list[dict]] = {}
    for row in frame.to_dict("records"):
        key = tuple(row[label] for label in study.labels)
        if key in planned:
            found.setdefault(key, []).append(row)
    return found


def values(study: Results, label: str) -> list:
    """The values a label takes, in the order of the plan, finished or not."""
    return list(dict.fromkeys(cell["labels"].get(label, "") for cell in study.plan["cells"]))


def counts(curves: Losses) -> list[int]:
    """All conditions that any curve has."""
    return sorted({count for curve in curves.values() for count in curve})


def grid(study: Results, curves: Losses, count: int, rows: str, columns: str, where: Mapping) -> dict:
    """Losses at one condition as {value of rows: {value of columns: loss}} over the cells whose labels are `where`."""
    found: dict = {row: {} for row in values(study, rows)}
    for key, curve in curves.items():
        labels = dict(zip(study.labels, key, strict=True))
        if count in curve and labels[rows] in found and all(labels[name] == wanted for name, wanted in where.items()):
            found[labels[rows]][labels[columns]] = curve[count]
    return found


def best(row: Mapping) -> object | None:
    """The name of the smallest value; None of no values."""
    return min(row, key=row.get) if row else None


def spread(row: Mapping) -> float | None:
    """max - min of the values, None of fewer than two: over the counts of a curve it is the *fluctuation*."""
    return max(row.values()) - min(row.values()) if len(row) > 1 else None


def mean(curve: Mapping[int, float], wanted: Iterable[int]) -> float:
    """The mean loss over the wanted conditions."""
    return statistics.fmean(curve[count] for count in wanted)


def choose(scores: Mapping[Key, float]) -> Choice | None:
    """The key of the lowest score; None of no scores."""
    ranked = sorted(scores, key=scores.get)
    if not ranked:
        return None
    runner_up = ranked[1] if len(ranked) > 1 else None
    margin = scores[runner_up] - scores[ranked[0]] if len(ranked) > 1 else None
    return Choice(ranked[0], scores[ranked[0]], runner_up, margin)


def recommend(curves: Losses, low: int = 16, high: int = 64) -> dict[str, Choice]:
    """The best cells, of those that have every condition: "parallel" by the mean loss over the conditions in
    low..high, "single" by the loss at 1, "flattest" by the fluctuation. Criteria without a condition are left out."""
    every = counts(curves)
    complete = {key: curve for key, curve in curves.items() if len(curve) == len(every)}
    parallel = [count for count in every if low <= count <= high]
    choices = {
        "parallel": choose({key: mean(curve, parallel) for key, curve in complete.items()} if parallel else {}),
        "single": choose({key: curve[1] for key, curve in complete.items()} if 1 in every else {}),
        "flattest": choose({key: spread(curve) for key, curve in complete.items()} if len(every) > 1 else {}),
    }
    return {use: choice for use, choice in choices.items() if choice}


def rank_correlation(ours: Losses, theirs: Losses) -> tuple[float, int] | None:
    """Spearman's rank correlation over the (cell, condition) pairs in both, and their number; None below three."""
    shared = [(key, count) for key in ours if key in theirs for count in ours[key] if count in theirs[key]]
    if len(shared) < 3:
        return None
    left, right = (pd.Series([curves[key][count] for key, count in shared]).rank() for curves in (ours, theirs))
    return float(left.corr(right)), len(shared)


def _by_seed(study: Results) -> dict[Key, dict[int, list[float]]]:
    found: dict = {}
    for row, score in zip(study.results.to_dict("records"), study.scores, strict=True):
        key = tuple(row[label] for label in study.labels)
        found.setdefault(key, {}).setdefault(row[study.condition], []).append(score)
    return found
