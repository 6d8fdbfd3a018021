"""The part of a report that shows how cells were tuned: each cell's loss over the grid, and what tuning gained it."""

import math

from lab.options import leaves
from lab.study import evaluations
from lab.study.evaluations import LOSS
from lab.study.judge import residuals
from lab.study.numbers import number
from lab.study.report import costs, figures, live
from lab.study.report.layout import arrange, describe, line_label, lowest
from lab.study.report.page import Chart, Piece, Table, Text
from lab.study.results import Results, judged_loss


def section(study: Results) -> list[Piece]:
    """Nothing for a study that tunes nothing."""
    trials = study.plan.get("tuning", [])
    if not trials:
        return []
    seed = trials[0]["seed"]
    blocks: list[Piece] = [
        Text(
            f"Every cell was tried at every point of one grid, with the same budget, on seed {seed}; it is judged on "
            "other seeds, at its best point. A best point on the edge of the grid may lie beyond it."
        )
    ]
    fields = list(trials[0]["values"])
    if len(fields) == 1:
        curves = {study.key(cell): _curve(study, _of(trials, cell), fields[0]) for cell in study.plan["cells"]}
        if drawn := {key: curve for key, curve in curves.items() if curve}:
            panels = arrange(study, lowest(study, drawn), line_label(study))
            axes = fields[0], study.measure.title
            image = figures.png(figures.by_label(panels, *axes))
            caption = f"Judged loss of each cell against {fields[0]}, seed {seed}."
            blocks.append(Chart("tuning", image, caption, live.by_label(panels, *axes)))
    beside = residuals.beside(study)
    rows = [
        [*_row(study, cell, _of(trials, cell), fields), *beside.cells[study.key(cell)]] for cell in study.plan["cells"]
    ]
    heading = study.measure.heading
    columns = [*study.labels, "best", "edge of the grid", f"{heading} tuned", f"{heading} untuned", "gain"]
    columns += beside.columns
    caption = f"On seed {seed}. Untuned: the config's own values, where the grid has them."
    return [*blocks, costs.common(study), Table(columns, rows, caption, sortable=True)]


def _of(trials: list[dict], cell: dict) -> list[dict]:
    return [trial for trial in trials if trial["cell"] == cell["name"]]


def _loss(study: Results, trial: dict) -> float:
    """The judged loss of a trial; nan where it failed or is still to be made."""
    place = study.directory / trial["directory"] / f"seed-{trial['seed']}"
    rows = evaluations.rows(evaluations.find(place, LOSS, trial["asks"][LOSS]))
    loss = judged_loss(rows, study.condition, study.plan["config"]["study"]["judged"], study.measure.column)
    return math.nan if loss is None else loss


def _curve(study: Results, trials: list[dict], field: str) -> dict:
    losses = {trial["values"][field]: _loss(study, trial) for trial in trials}
    return {value: loss for value, loss in losses.items() if math.isfinite(loss)}


def _row(study: Results, cell: dict, trials: list[dict], fields: list[str]) -> list[str]:
    losses = [(loss, trial["values"]) for trial in trials if math.isfinite(loss := _loss(study, trial))]
    labels = list(map(str, study.key(cell)))
    if not losses:
        return [*labels, *["—"] * 5]
    tuned, values = min(losses, key=lambda pair: pair[0])
    own = {field: leaves(study.plan["config"])[field] for field in fields}
    untuned = next((loss for loss, tried in losses if tried == own), math.nan)
    edges = [field for field in fields if _on_edge(values[field], [trial["values"][field] for trial in trials])]
    return [
        *labels,
        describe(values),
        f"**{', '.join(edges)}**" if edges else "no",
        number(tuned, 4),
        number(untuned, 4),
        number(untuned - tuned, 4),
    ]


def _on_edge(value, tried: list) -> bool:
    """Whether a number is the smallest or the largest that was tried; names have no edge."""
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in tried)
    return numeric and value in (min(tried), max(tried))
