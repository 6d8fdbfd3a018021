"""The report on scale: the law of losses over sizes, what a variant is worth in compute, and whether that lasts."""

import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lab.errors import UserError
from lab.study.define.cells import RUNG
from lab.study.define.contrasts import select, settings
from lab.study.judge import gains, pairing
from lab.study.judge import scaling as laws
from lab.study.judge.evidence import UNKNOWN
from lab.study.judge.gains import STEPS, TIME, Climb, Gain
from lab.study.judge.pairing import Score
from lab.study.judge.residuals import COSTS
from lab.study.judge.scaling import Fit
from lab.study.judge.statistics import Interval
from lab.study.numbers import short
from lab.study.report import costs, figures, live
from lab.study.report.layout import describe
from lab.study.report.page import Chart, Heading, Piece, Table, Text
from lab.study.results import Results

NAME = "scaling"  # in SECTIONS
COUNTS = {"parameters_non_embedding": "not embedding", "parameters": "all parameters"}  # two ways of counting N
AXES = {STEPS: "training FLOPs", TIME: "seconds of training"}
DRAWN = 60  # points of a line
NOTE = (
    "Constants with 95% percentile intervals over resampled runs; loss in {unit}, N parameters, D training tokens as "
    "planned, were every text full. N is counted without embeddings and with them: the plan has both. Published "
    "constants are of other texts and tokens, with embeddings: compare exponents, not levels."
)
GAINS = (
    "How many times its own compute the baseline would need to reach a variant's loss, by the baseline's law of loss "
    "on compute, with 95% intervals over paired seeds. Compute: at equal steps training FLOPs, at equal time measured "
    "seconds of training. †: outside the losses of the baseline's rungs, so extrapolated. Slope: of log gain on log "
    "compute. With size, from the smallest rung to the largest, a gain **holds** (on one side of 1 at both, and no "
    "slope towards 1; it may grow), **shrinks**, **reverses**, or one cannot tell. Not corrected for being many."
)
Panels = dict[str, tuple[figures.Curves, figures.Curves]]  # see figures.ladder


def has_rungs(study: Results) -> bool:
    return any(field == RUNG for field, _ in study.plan["labels"])


def answer(study: Results) -> str:
    """What a ladder of one model found, for a study that names the section and compares nothing; "" without a law."""
    if NAME not in study.plan["sections"] or has_rungs(study):
        return ""
    scores = pairing.scores(study, settings(study.plan["config"].get("study", {})).judged)
    runs = [score for by_seed in scores.values() for score in by_seed.values() if 0 < score.loss < np.inf]
    count = next(iter(COUNTS))
    try:
        fit = laws.of_parameters_and_tokens(*(_planned(study, runs, name) for name in (count, "tokens")), _losses(runs))
    except UserError:
        return ""
    told = {name: _around(fit.constants[name], fit.intervals[name], ".2f") for name in ("E", "a", "b")}
    return (
        f"**The loss falls as N^-a and D^-b** with parameters N ({COUNTS[count]}) and training tokens D: "
        f"a {told['a']}, b {told['b']}, towards {told['E']} {study.measure.unit}"
    )


def section(study: Results) -> list[Piece]:
    """For a study over rungs, or any whose baseline was made at several sizes."""
    scores = pairing.scores(study, settings(study.plan["config"].get("study", {})).judged)
    if not any(scores.values()):
        return [Text("No cell has finished yet.")]
    blocks, panels = [], {}
    for title, names in _ladders(study).items():
        runs = [score for name in names for score in scores[name].values() if 0 < score.loss < np.inf]
        told, drawn = _fit(study, runs)
        blocks += [*[Heading(title)] * bool(title), *told]
        panels |= {f"{title}: {axis}" if title else axis: panel for axis, panel in drawn.items()}
    caption = "The fitted law (lines) and the runs (points, means over seeds)."
    blocks += _chart(study, "scaling_fit", panels, caption)
    if has_rungs(study):
        blocks += [Heading("Compute-equivalent gain"), *_gains(study, scores)]
    return [*blocks, *costs.overview(study)]


def _ladders(study: Results) -> dict[str, list[str]]:
    """{title: cells} by which laws are fitted: of each baseline, or where none is named, of every variant."""
    cells = {cell["name"]: cell["labels"] for cell in study.plan["cells"]}
    chosen = select(cells, settings(study.plan["config"].get("study", {})).baseline)
    found: dict[str, list[str]] = {}
    for name in chosen:
        title = describe(_without_rung(cells[name])) if has_rungs(study) else ""
        found.setdefault(title, []).append(name)
    return found


def _fit(study: Results, runs: Sequence[Score]) -> tuple[list[Piece], Panels]:
    """The law of parameters and tokens for both counts of N; else why there is none, and the law of compute."""
    of, losses = functools.partial(_planned, study, runs), _losses(runs)
    tokens = of("tokens")
    try:
        fits = {told: laws.of_parameters_and_tokens(of(count), tokens, losses) for count, told in COUNTS.items()}
    except UserError as error:
        cells = {cell["name"]: cell for cell in study.plan["cells"]}
        compute = [COSTS["training FLOPs"].of(cells[score.run.cell["name"]]) for score in runs]
        told, panels = _fit_of_compute(compute, losses)
        return [Text(f"**{error}**."), *told], panels
    rows = [[told, *_constants(fit), str(len(runs)), f"{fit.residual:.2%}"] for told, fit in fits.items()]
    rows += [[name, *(f"{value:.4g}" for value in values), "—", "—"] for name, values in laws.PUBLISHED.items()]
    count, told = next(iter(COUNTS.items()))
    sizes, points, lines = of(count), {}, {}
    for size in sorted({*sizes}):
        chosen = [(d, loss) for n, d, loss in zip(sizes, tokens, losses, strict=True) if n == size]
        points[f"N {short(size)}"] = _means(chosen)
        lines[f"N {short(size)}"] = _line(lambda d, n=size: fits[told].law.loss(n, d), tokens)
    table = Table(
        ["N", *laws.NAMES[2], "runs", "misfit"], rows, f"**{laws.formula(2)}**. {NOTE.format(unit=study.measure.unit)}"
    )
    return [table], {f"training tokens, by N {told}": (points, lines)}


def _planned(study: Results, runs: Sequence[Score], quantity: str) -> list[float]:
    """What the plan says of the cell of each run."""
    cells = {cell["name"]: cell for cell in study.plan["cells"]}
    return [float(cells[score.run.cell["name"]].get(quantity, np.nan)) for score in runs]


def _losses(runs: Sequence[Score]) -> list[float]:
    return [score.loss for score in runs]


def _fit_of_compute(compute: Sequence[float], losses: Sequence[float]) -> tuple[list[Piece], Panels]:
    try:
        fit = laws.of_compute(compute, losses)
    except UserError as error:
        return [Text(f"**{error}**.")], {}
    caption = f"**{laws.formula(1)}**, of training FLOPs C, with 95% percentile intervals over resampled runs."
    row = [*_constants(fit), str(len(losses)), f"{fit.residual:.2%}"]
    panel = {"runs": _means(zip(compute, losses, strict=True))}, {"runs": _line(fit.law.loss, compute)}
    return [Table([*laws.NAMES[1], "runs", "misfit"], [row], caption)], {AXES[STEPS]: panel}


def _gains(study: Results, scores: pairing.Scores) -> list[Piece]:
    rungs = list(dict.fromkeys(cell["labels"][RUNG] for cell in study.plan["cells"]))
    found = gains.climbs(study, scores)
    if missing := _missing(study, rungs, found):
        return [Text(missing)]
    rows, panels = [], {}
    for alike, axis in AXES.items():
        points, lines = {}, {}
        for climb in found:
            try:
                variant, baseline = gains.sides(study, scores, climb, alike)
                gain = gains.measured(variant, baseline, climb.rungs)
            except UserError as error:
                cells = [*["—"] * (len(rungs) + 1), f"{UNKNOWN}: {error}", str(len(climb.seeds))]
            else:
                cells, against = _row(gain, climb, rungs), describe(climb.against)
                points |= {against: _points(baseline)} | points | {describe(climb.labels): _points(variant)}
                lines[against] = _line(gain.law.loss, baseline.compute.ravel())
            rows.append([*map(str, climb.labels.values()), alike, *cells])
        if points:
            panels[axis] = points, lines
    columns = [*found[0].labels, "at equal", *rungs, "slope", "with size", "seeds"]
    caption = "The baseline's law of loss on compute (line), and where the rungs of each variant lie (points)."
    return [Table(columns, rows, GAINS), *_chart(study, "scaling_gains", panels, caption)]


def _missing(study: Results, rungs: Sequence[str], found: Sequence[Climb]) -> str:
    """What a study lacks for gains, in a sentence; "" if nothing."""
    if len(rungs) < gains.RUNGS:
        told = f"the study has {len(rungs)} ({', '.join(rungs)}): add to study.rungs"
        return f"**A gain needs {gains.RUNGS} rungs**, and {told}."
    if not settings(study.plan["config"].get("study", {})).baseline:
        return "**A gain is against a baseline**, and the study names none: set study.baseline."
    return "" if found else "**No variant has a baseline**: study.cells has the baseline alone."


def _row(gain: Gain, climb: Climb, rungs: Sequence[str]) -> list[str]:
    shown = dict.fromkeys(rungs, "—")
    for rung, factor, interval, beyond in zip(climb.rungs, gain.factors, gain.intervals, gain.beyond, strict=True):
        shown[rung] = _around(factor, interval, ".2f") + "†" * beyond
    verdict = f"**{gain.verdict}**" if len(climb.seeds) > 1 else f"{UNKNOWN} (one seed)"
    if ends := [rung for rung in (rungs[0], rungs[-1]) if rung not in climb.rungs]:
        verdict = f"{UNKNOWN}: no pair at {' and '.join(ends)}"
    return [*shown.values(), _around(gain.slope, gain.slope_interval, "+.3f"), verdict, str(len(climb.seeds))]


def _points(side: gains.Side) -> dict[float, float]:
    return dict(zip(side.compute.mean(axis=1).tolist(), side.losses.mean(axis=1).tolist(), strict=True))


def _line(law, sizes: Sequence[float]) -> dict[float, float]:
    places = np.geomspace(min(sizes), max(sizes), DRAWN)
    return dict(zip(places.tolist(), law(places).tolist(), strict=True))


def _means(points: Iterable[tuple[float, float]]) -> dict[float, float]:
    """{x: mean loss}, the smallest x first."""
    found: dict[float, list[float]] = {}
    for x, loss in sorted(points):
        found.setdefault(x, []).append(loss)
    return {x: float(np.mean(losses)) for x, losses in found.items()}


def _without_rung(labels: Mapping) -> dict:
    return {label: value for label, value in labels.items() if label != RUNG}


def _chart(study: Results, name: str, panels: Panels, caption: str) -> list[Piece]:
    drawn = panels, study.measure.title
    return [Chart(name, figures.png(figures.ladder(*drawn)), caption, live.ladder(*drawn))] if panels else []


def _constants(fit: Fit) -> list[str]:
    return [_around(value, fit.intervals[name], ".4g") for name, value in fit.constants.items()]


def _around(value: float, interval: Interval | None, digits: str) -> str:
    return f"{value:{digits}}" + (f" [{interval[0]:{digits}}, {interval[1]:{digits}}]" if interval else "")
