"""Loss against what a cell costs, by condition, and what each cell changes of its baseline."""

import math
from collections.abc import Mapping

from lab.study.judge.evidence import Findings
from lab.study.judge.residuals import COSTS, MEANINGS, beside
from lab.study.numbers import number, short, whole
from lab.study.report import figures, live, tables
from lab.study.report.layout import arrange, cell_label, differences, few, line_label, lowest
from lab.study.report.page import Chart, Heading, Piece, Table, Text
from lab.study.report.tables import Losses
from lab.study.results import Results

NOISE = 1.1  # evaluation times that differ by less are the same


def pareto(study: Results, findings: Findings) -> list[Piece]:
    """Judged loss against the costs of the plan and evaluation time, where the cells differ in them."""
    found = {name: [score.loss for score in by_seed.values()] for name, by_seed in findings.scores.items() if by_seed}
    losses = {name: sum(values) / len(values) for name, values in found.items()}
    numbers = {name: str(place) for place, name in enumerate(losses, 1)}
    panels = {}
    for title, costs in _costs(study, findings).items():
        points = {name: (costs[name], loss) for name, loss in losses.items() if math.isfinite(costs[name] + loss)}
        known = [cost for cost, _ in points.values()]
        if known and max(known) > min(known) * (NOISE if "seconds" in title else 1):
            panels[title] = points
    if not panels:
        return []
    drawn = {title: {numbers[name]: point for name, point in points.items()} for title, points in panels.items()}
    rows = [
        [numbers[name], name, number(loss, 4), *(_cost(title, points, name) for title, points in panels.items())]
        for name, loss in losses.items()
    ]
    caption = "Judged loss against what a cell costs, by the number of the cell; joined: the cells not beaten in both."
    columns = ["point", "cell", study.measure.heading, *panels]
    table = Table(columns, rows, "Bold: no cell is better in one of the two and no worse in the other")
    image = figures.png(figures.pareto(drawn, study.measure))
    chart = Chart("pareto", image, caption, live.pareto(panels, numbers, study.measure))
    return [chart, table, common(study)]


def common(study: Results) -> Text:
    """What all cells cost alike, and what costs are, for a section whose tables show the costs that differ."""
    return Text(f"{beside(study).common} {MEANINGS}".strip())


def overview(study: Results) -> list[Piece]:
    """What the cells cost, for a part of the report whose tables are not by cell."""
    costs = beside(study)
    rows = [[*map(str, key), *shown] for key, shown in costs.cells.items()]
    table = [Table([*study.labels, *costs.columns], rows)] if costs.columns else []
    return [Heading("What the cells cost"), common(study), *table]


def moved(study: Results) -> list[Piece]:
    """What memory has to carry by the plan: bytes of the cache, and operations for each number moved; none of a plan
    that does not say. Beside it how fast was decoded, where an ask reads its texts one token at a time."""
    cells = [cell for cell in study.plan["cells"] if "intensity_decoding" in cell]
    if not cells:
        return []
    decoded, measured = list(cells[0]["intensity_decoding"]), _decoded(study)
    rows = []
    for cell in cells:
        found = cell["intensity_training"], *(cell["intensity_decoding"][count] for count in decoded)
        speeds = (number(by_cell.get(cell["name"]), 0) for by_cell in measured.values())
        shown = whole(cell["cache_bytes_per_token"]), *(number(x, 1) for x in found), *speeds
        rows.append([*map(str, study.key(cell)), *shown])
    columns = (
        "cache bytes per token",
        "intensity of training",
        *(f"of decoding {count}" for count in decoded),
        *measured,
    )
    caption = (
        "What memory carries. Bytes: of all layers. Arithmetic intensity: operations of attention for each number read "
        "or written, in orders of growth, of training on the study's batch and of decoding so many rows to the length "
        "of a training row (—: a layer keeps a state)."
    )
    if measured:
        caption += " Decoded: texts through the cache, one token of each row at a time, medians over seeds."
    return [Table([*study.labels, *columns], rows, caption, folded=True)]


def _decoded(study: Results) -> dict[str, dict[str, float]]:
    """{column: {cell: tokens per second, the median over its runs}} of the asks that score one token at a time."""
    asked, frame, found = study.plan["config"].get("evaluate", {}), study.timings, {}
    for name in study.further_asks:
        timed = frame[frame["phase"] == name]
        if asked.get(name, {}).get("chunk") == 1 and not timed.empty:
            speeds = timed["tokens_per_second"].astype(float).groupby(timed["cell"]).median()
            found[f"decoded tokens/s, {asked[name]['rows']} rows"] = speeds.to_dict()
    return found


def _cost(title: str, points: Mapping[str, tuple[float, float]], name: str) -> str:
    if name not in points:
        return "—"
    shown = COSTS[title].show(points[name][0]) if title in COSTS else short(points[name][0])
    return shown if figures.beaten(*points[name], points.values()) else f"**{shown}**"


def by_condition(study: Results) -> list[Piece]:
    """Mean losses with their deviations over seeds, the published ones beside them, and the same as a figure."""
    ours, errors, theirs = tables.losses(study), tables.deviations(study), tables.published(study)
    every = list(dict.fromkeys(condition for curve in ours.values() for condition in curve))
    if not every:
        return []
    best = {count: min(curve[count] for curve in ours.values() if count in curve) for count in every}
    costs, rows = beside(study), []
    for key, curve in ours.items():
        shown = [_loss(curve.get(count), errors[key].get(count), best[count]) for count in every]
        rows.append([*map(str, key), "ours", *shown, *costs.cells[key]])
        if key in theirs:
            known = [number(theirs[key].get(count), 4) for count in every]
            rows.append([*map(str, key), "published", *known, *["—"] * len(costs.columns)])
    told = "mean ± standard deviation over seeds; bold: the best of ours."
    caption = f"Loss ({study.measure.unit}) by {study.condition}: {told}"
    table = Table([*study.labels, "source", *map(str, every), *costs.columns], rows, caption)
    return [*_condition_figure(study, ours, errors, every), table, common(study)]


def config_differences(study: Results, findings: Findings) -> list[Piece]:
    """The fields of each cell that its baseline has otherwise; those of the layout of texts among them by name."""
    configs = {cell["name"]: study.config(cell) for cell in study.plan["cells"]}
    rows = []
    for name, other in findings.baselines.items():
        changed = differences(configs[name], configs[other])
        layout = ", ".join(field for field in changed if field.startswith("data."))
        shown = "; ".join(f"{field}: {theirs} -> {ours}" for field, (ours, theirs) in changed.items())
        rows.append([name, shown or "nothing", layout or "no"])
    caption = (
        "What a cell changes of its baseline's config. Pairs may differ in the layout of texts, never in the texts."
    )
    return [Table(["cell", "changes", "differs in layout"], rows, caption, folded=True)] if rows else []


def _costs(study: Results, findings: Findings) -> dict[str, dict[str, float]]:
    """{what it costs: {cell: how much}}."""
    cells = study.plan["cells"]
    frame = study.timings[study.timings["phase"] == "eval"]
    if findings.settings.judged:
        frame = frame[frame[study.condition].isin(findings.settings.judged)]
    seconds = frame.assign(seconds=frame["seconds"].astype(float)).groupby(["cell", "seed"])["seconds"].sum()
    each = {
        cell["name"]: float(seconds.get(cell["name"]).mean()) if cell["name"] in seconds else math.nan for cell in cells
    }
    planned = {title: {cell["name"]: cost.of(cell) for cell in cells} for title, cost in COSTS.items()}
    return planned | {"evaluation seconds": each}


def _condition_figure(study: Results, ours: Losses, errors: Losses, every: list) -> list[Piece]:
    if len(every) < 2 or not all(isinstance(count, (int, float)) and count > 0 for count in every):
        return []
    line = line_label(study)
    rows = arrange(study, lowest(study, ours), line)
    bars = {title: panel for row in arrange(study, lowest(study, errors), line) for title, panel in row.items()}
    drawn = rows, bars, study.condition, {}, study.measure
    caption = (
        f"Loss by {study.condition}, one line for each {line or cell_label(study, next(iter(ours)))}.{few(len(ours))}"
    )
    image = figures.png(figures.by_condition(*drawn))
    return [Chart("loss_by_condition", image, caption, live.by_condition(*drawn))]


def _loss(loss: float | None, deviation: float | None, best: float) -> str:
    text = number(loss, 4) + (f" ± {deviation:.4f}" if deviation is not None else "")
    return f"**{text}**" if loss == best else text
