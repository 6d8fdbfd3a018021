"""The report on a published series: our losses and the published ones side by side, and which published signs hold."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from lab.study.define.contrasts import SIGNS, select, settings
from lab.study.judge import pairing
from lab.study.judge.evidence import UNKNOWN, Comparison, Findings, find
from lab.study.judge.residuals import BETWEEN, COSTS, MEANINGS, relative, shown
from lab.study.judge.statistics import half_widths
from lab.study.numbers import number, short, whole
from lab.study.report import tables
from lab.study.report.page import Heading, Piece, Table, Text
from lab.study.report.verdicts import JUDGED, interval, judged, signed
from lab.study.results import Results

CAVEAT = (
    "Published losses are one number each, without an error bar, of another model on other data: compare signs, not "
    "levels. A sign replicates where our verdict has it, does not where our verdict has the other, and cannot be told "
    "where we have no verdict or the published losses are equal."
)
THEIRS = {  # what a published file may say of a variant besides its loss
    "parameters_millions": ("published parameters", lambda value: f"{value:g} M"),
    "cache_per_token_per_layer": ("published cache", whole),
}
Published = Mapping[str, float]  # {name of a cell: its published loss, in the unit of the study}


def section(study: Results) -> list[Piece]:
    """For studies whose published numbers are by its labels: one loss for each variant, or one by condition."""
    if study.results.empty:
        return [Text("No cell has finished yet.")]
    findings, theirs = find(study), published(study)
    told = "" if theirs else " **The study names no published losses of its cells.**"
    blocks = [Text(CAVEAT + told), _table(study, findings, theirs)]
    return [*blocks, *_replications(study, findings, theirs)] if findings else blocks


def published(study: Results) -> Published:
    """Mean published loss over the judged conditions, of the cells for which they are all published."""
    judged, curves = _judged(study) or set(study.results[study.condition]), tables.published(study)
    found = {cell["name"]: curves.get(study.key(cell), {}) for cell in study.plan["cells"]}
    return {name: tables.mean(curve, judged) for name, curve in found.items() if {*judged} <= {*curve}}


def published_difference(sides: Sequence[Sequence[str]], theirs: Published) -> float | None:
    """Of the mean losses of 2 or 4 sides, as contrasts take it; None where a cell of a side is not published."""
    if any(name not in theirs for side in sides for name in side):
        return None
    means = [statistics.fmean(theirs[name] for name in side) for side in sides]
    return round(sum(sign * mean for sign, mean in zip(SIGNS[len(sides)], means, strict=True)), 9) + 0.0


def replicates(comparison: Comparison, difference: float) -> str:
    """yes | no | cannot tell: whether our verdict has the sign of a published difference."""
    found = {"better": -1, "worse": 1}.get(comparison.verdict, 0)
    if not found or not difference:
        return UNKNOWN
    return "yes" if found == np.sign(difference) else "no"


def _judged(study: Results) -> tuple:
    return settings(study.plan["config"].get("study", {})).judged


def _table(study: Results, findings: Findings | None, theirs: Published) -> Table:
    scores = findings.scores if findings else pairing.scores(study, _judged(study))
    against = {one.name: one for one in findings.of_kind("baseline")} if findings else {}
    said = {key: found[0] for key, found in tables.published_rows(study).items()}
    besides = [field for field in THEIRS if any(field in row for row in said.values())]
    rows = []
    for cell in study.plan["cells"]:
        name, row = cell["name"], said.get(study.key(cell), {})
        costs = shown(cell) | {"training FLOPs": short(cell["train_flops_per_token"])}
        rows.append([
            *map(str, study.key(cell)),
            _loss([score.loss for score in scores[name].values()]),
            number(theirs.get(name), 4),
            *_difference(name, against, theirs),
            *costs.values(),
            *(THEIRS[field][1](row[field]) if field in row else "—" for field in besides),
        ])  # fmt: skip
    columns = [
        *study.labels, "loss ± 95%", "published loss",
        *JUDGED, "published difference", "sign replicates",
        *("FLOPs per token" if name == "training FLOPs" else name for name in COSTS),
        *(THEIRS[field][0] for field in besides),
    ]  # fmt: skip
    caption = (
        f"Ours beside the published. Loss: mean over seeds of the judged loss, {study.measure.unit}, ± half its 95% "
        "interval (Student t). Difference from the baseline: paired over seeds, so its interval is narrower than those "
        f"of the losses. {MEANINGS} FLOPs per token: of a training step."
    )
    return Table(columns, rows, caption, sortable=True)


def _loss(losses: Sequence[float]) -> str:
    mean = number(statistics.fmean(losses) if losses else None, 4)
    return f"{mean} ± {float(half_widths(np.array(losses))):.4f}" if len(losses) > 1 else mean


def _difference(name: str, against: Mapping[str, Comparison], theirs: Published) -> list[str]:
    """Ours and theirs, and whether the one has the sign of the other; dashes of a cell that has no baseline."""
    if name not in against:
        mark = "baseline" if name in {one.against for one in against.values()} else "—"
        return [mark, *["—"] * (len(JUDGED) + 1)]
    one = against[name]
    difference = published_difference([[name], [one.against]], theirs)
    return [*judged(one), signed(difference), "—" if difference is None else replicates(one, difference)]


def _replications(study: Results, findings: Findings, theirs: Published) -> list[Piece]:
    """A line for each contrast: published on all sides, does its sign replicate?"""
    cells = {cell["name"]: cell["labels"] for cell in study.plan["cells"]}
    answers, lines, missing = [], [], []
    for contrast, one in zip(findings.settings.contrasts, findings.of_kind("contrast"), strict=True):
        difference = published_difference([select(cells, side) for side in contrast.sides], theirs)
        if difference is None:
            missing.append(one.name)
        else:
            answers.append(replicates(one, difference))
            lines.append(Text(_line(one, difference, answers[-1])))
    if not lines:
        return []
    counted = ", ".join(f"{answer} {answers.count(answer)}" for answer in ("yes", "no", UNKNOWN))
    notes = [Text(f"Not published on every side: {', '.join(missing)}.")] if missing else []
    total = f"Of {len(lines)} contrasts with published losses on every side: {counted}."
    return [Heading("Does the published sign replicate?"), Text(f"{total} {BETWEEN}"), *lines, *notes]


def _line(one: Comparison, difference: float, answer: str) -> str:
    """**deeper**, (layers 4) - (layers 2): **yes**. Published -0.0300, ours -0.0210 [-0.0300, -0.0120], better. ..."""
    known, tie = one.estimate, "" if difference else ", a tie"
    ours = f"{signed(known.mean)} {interval(known.t_interval)}, {one.verdict}" if known.n else "no pair yet"
    costs = ", ".join(f"{name} {by}" for name, by in zip(COSTS, relative(one.residuals), strict=True) if by != "—")
    return (
        f"**{one.name}**, {one.against}: **{answer}**. Published {signed(difference)}{tie}; ours {ours}. "
        f"Residuals: {costs}."
    )
