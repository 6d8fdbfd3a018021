"""The part of a report on stability: what run.log.instruments measured, loss spikes, and runs that failed."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np

from lab.study.define.contrasts import baselines, settings
from lab.study.judge import spikes
from lab.study.judge.residuals import percent, throughput
from lab.study.numbers import number
from lab.study.report import figures, live
from lab.study.report.layout import cell_label, few, lowest, run_label
from lab.study.report.page import Chart, Piece, Table, Text
from lab.study.results import Outcome, Results

GRADIENT = "gradient"
CAPTION = (
    f"Over all measured steps and layers, and over seeds, unless it is said otherwise. A spike is a step whose loss is "
    f"more than {spikes.TIMES:g} spreads (1.4826 median absolute deviations) above the median of the "
    f"{spikes.WINDOW} before it; all steps count, and the number is of one run. A run fails at the first step whose "
    "loss or gradient is not finite; what is lost without that shows by the training loss at the end, the mean over "
    "the last tenth of the steps. Step time: by how much a training step takes longer than the baseline's, with what "
    "is measured beside the loss, medians of runs. —: not measured."
)
SLOWER = "step time against the baseline"


def section(study: Results) -> list[Piece]:
    """What failed first, a row for each cell, and the gradient of each layer."""
    every = study.runs_by_cell.items()
    begun = {name: [run for run in runs if run.metrics or run.failure is not None] for name, runs in every}
    shown = [cell for cell in study.plan["cells"] if begun[cell["name"]]]
    if not shown:
        return [Text("No step has been logged yet.")]
    slower, rows = _slower(study), []
    for cell in shown:
        found = (show(begun[cell["name"]]) for show in COLUMNS.values())
        rows.append([*map(str, study.key(cell)), *found, slower[cell["name"]]])
    names = [*study.labels, *COLUMNS, SLOWER]
    kept = [i for i in range(len(names)) if i < len(study.labels) or any(row[i] != "—" for row in rows)]
    table = Table([names[i] for i in kept], [[row[i] for i in kept] for row in rows], CAPTION, sortable=True)
    return [*_failed_first(study), table, *_gradients(study, begun)]


def values(runs: Iterable[Outcome], name: str, of: Callable[[list], object] = lambda measured: measured) -> list[float]:
    """The finite numbers that an instrument gave at the steps that `of` picks of those measured, of all layers."""
    found = []
    for run in runs:
        picked = of([value for _, value in measured(run, name)])
        found += [x for value in picked for x in (value if isinstance(value, list) else [value]) if _is_finite(x)]
    return found


def measured(run: Outcome, name: str) -> list[tuple[int, object]]:
    """(step, what an instrument gave: a number, or one for each layer) wherever it was read, by step."""
    lines = [(line["step"], line.get("instruments")) for line in run.metrics]
    return [(step, found[name]) for step, found in lines if isinstance(found, Mapping) and name in found]


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _largest(name: str, digits: int) -> Callable[[Sequence[Outcome]], str]:
    return lambda runs: number(max(values(runs, name), default=None), digits)


def _at_the_end(name: str, digits: int) -> Callable[[Sequence[Outcome]], str]:
    """The mean over layers and seeds at the last measured step."""
    found = lambda runs: values(runs, name, lambda steps: steps[-1:])  # noqa: E731
    return lambda runs: number(fmean(found(runs)), digits) if found(runs) else "—"


def _rise(runs: Sequence[Outcome]) -> str:
    """The gradient of the last layer over that of the first, at the first measured step: the mean over seeds."""
    first = [layers for run in runs for _, layers in measured(run, GRADIENT)[:1]]
    found = [layers[-1] / layers[0] for layers in first if all(map(_is_finite, layers)) and layers[0]]
    return number(fmean(found), 2) if found else "—"


def _spikes(runs: Sequence[Outcome]) -> str:
    logged = [len(spikes.spikes([line["loss"] for line in run.metrics])) for run in runs if run.metrics]
    return number(fmean(logged), 1 if len(logged) > 1 else 0) if logged else "—"


def _failed(runs: Sequence[Outcome]) -> str:
    failed = [run for run in runs if run.status == "failed"]
    steps = sorted(run.failure["step"] for run in failed if _is_finite(run.failure.get("step")))
    first = f"at step {steps[0]}" if steps else "at a step that is not known"
    if len(runs) == 1:
        return first if failed else "no"
    return f"{len(failed)} of {len(runs)}, first {first}" if failed else "none"


def _loss_at_the_end(runs: Sequence[Outcome]) -> str:
    """Of training, the mean over the last tenth of the steps and over the runs that did not fail."""
    logged = [[line["loss"] for line in run.metrics] for run in runs if run.metrics and run.status != "failed"]
    found = [fmean(losses[-max(1, len(losses) // 10) :]) for losses in logged]
    return number(fmean(found), 3) if found else "—"


COLUMNS = {
    "training loss at the end": _loss_at_the_end,
    "largest attention score": _largest("attention_max", 1),
    "attention entropy at the end": _at_the_end("attention_entropy", 3),
    "largest log Z": _largest("log_z_max", 1),
    "largest activation": _largest("activation", 1),
    "gradient, last / first layer at the start": _rise,
    "largest update / weights": _largest("update", 4),
    "norm of a layer's weights at the end": _at_the_end("weight", 2),
    "spikes": _spikes,
    "failed": _failed,
}


def _slower(study: Results) -> dict[str, str]:
    """{cell: by how much its steps take longer than those of its baseline}; dashes where there is none, or no time."""
    cells, speeds = {cell["name"]: cell["labels"] for cell in study.plan["cells"]}, throughput(study)
    against = baselines(cells, settings(study.plan["config"].get("study", {})).baseline)
    return {name: percent(speeds[against[name]] / speeds[name] - 1) if name in against else "—" for name in cells}


def _failed_first(study: Results) -> list[Piece]:
    """Every run that failed at a step, in the order of these."""
    failed = [run for run in study.runs if run.status == "failed" and _is_finite(run.failure.get("step"))]
    ordered = sorted(failed, key=lambda run: run.failure["step"])
    told = "; ".join(f"{run_label(study, run)} at step {run.failure['step']}" for run in ordered)
    return [Text(f"**Failed first**: {told}.")] if ordered else []


def _gradients(study: Results, begun: Mapping[str, Sequence[Outcome]]) -> list[Piece]:
    """The gradient's norm by layer, at the first measured step and at the last: the mean over seeds."""
    found = {}
    for cell in study.plan["cells"]:
        steps = [measured(run, GRADIENT) for run in begun[cell["name"]]]
        ends = [[of[place][1] for of in steps if of] for place in (0, -1)]
        if ends[0]:
            found[study.key(cell)] = [np.mean(np.array(each, np.float64), axis=0) for each in ends]
    if not found:
        return []
    panels: dict = {"at the first step": {}, "at the last measured step": {}}
    for key, ends in lowest(study, found).items():
        for panel, norms in zip(panels.values(), ends, strict=True):
            known = {m: math.log10(norm) for m, norm in enumerate(norms.tolist()) if _is_finite(norm) and norm > 0}
            panel[", ".join(map(str, key)) or cell_label(study, key)] = known
    axes = "layer", "log10 of the norm of its gradient"
    caption = (
        "The norm of the gradient of each layer's parameters, before clipping, means over seeds. At the start it is "
        "known to rise with the layer where norms stand behind the residual sum, and not to where they stand before a "
        f"sublayer; initial output projections that shrink with the depth flatten the rise.{few(len(found))}"
    )
    image = figures.png(figures.by_label([panels], *axes))
    return [Chart("gradients_by_layer", image, caption, live.by_label([panels], *axes))]
