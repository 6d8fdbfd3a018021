"""The parts of a report that judge: verdicts with intervals, evidence for hypotheses, differences through training."""

from collections.abc import Iterable, Mapping

from lab.study.judge.evidence import UNKNOWN, Comparison, Evidence, Findings, overall
from lab.study.judge.residuals import AGAINST, BETWEEN, COSTS, MEANINGS, percent, relative, shown
from lab.study.judge.statistics import LEAST_RESAMPLED, Interval
from lab.study.judge.trends import EARLY, END, reading, trend
from lab.study.measure import BITS
from lab.study.numbers import number
from lab.study.report import figures, live
from lab.study.report.layout import describe, links, panel_rows, run_label
from lab.study.report.page import Chart, Piece, Table, Text
from lab.study.results import Results

JUDGED = ["verdict", "difference", "95% interval", "noise", "detectable", "tokens/s"]
DETAILS = ["p (Holm)", "bootstrap 95%", "differs in"]  # last, so that costs are seen without scrolling
OF_CONTRAST = ["contrast", "expected", "difference", "95% interval", *COSTS]
AGREES = {"supported": "agrees", "contradicted": "disagrees"}  # with what was published
NONE = ["—"] * len(OF_CONTRAST)  # where a row is about several contrasts
MOST_TRENDS, MOST_EFFECTS = 24, 40  # in a figure
EXPLAINED = (
    "Difference: mean over seeds of the paired differences, in {unit}; below 0 is better. 95% interval: "
    "Student t; bootstrap: studentised; both of one comparison by itself; none where differences over seeds spread by "
    "less than float32 tells losses apart. p: paired t-test, corrected (Holm) over all comparisons of the study, each "
    "once; below 0.05 there is a verdict, so that an interval without 0 may still tell nothing. Noise: the standard "
    "deviation of the paired differences over seeds. Detectable: the difference that this many "
    "seeds of this noise find 4 times in 5, uncorrected: what is smaller is mostly missed. Tokens/s: by how much the "
    "median throughput of training is higher (+) or lower (-), as it was measured."
)


DIFFERS = (
    "Differs in: fields that both sides read and that have not the same values on them; options of one side's entries "
    "alone go with the entry's name."
)


def verdicts(study: Results, findings: Findings) -> list[Piece]:
    """Every cell against its baseline, every contrast, and what limits them."""
    blocks: list[Piece] = [Text(note) for note in _notes(study, findings)]
    against = {one.name: one for one in findings.of_kind("baseline")}
    rows = [
        [
            *map(str, study.key(cell)),
            _loss(findings, cell["name"]),
            *_judged(findings, cell["name"], against),
            *_costs(cell, against),
            str(len(findings.scores[cell["name"]])),
            *(details(against[cell["name"]]) if cell["name"] in against else ["—"] * len(DETAILS)),
        ]
        for cell in study.plan["cells"]
    ]
    if against:
        columns = [*study.labels, study.measure.heading, *JUDGED, *COSTS, "seeds", *DETAILS]
        caption = (
            f"Every cell against the one with {describe(dict(findings.settings.baseline))} and otherwise its labels. "
            f"{AGAINST} {DIFFERS}"
        )
        blocks.append(Table(columns, rows, caption, sortable=True, links=links(study)))
    if contrasts := findings.of_kind("contrast"):
        rows = [
            [
                one.name,
                *judged(one),
                *relative(one.residuals),
                str(one.estimate.n),
                *details(one),
                one.against,
            ]
            for one in contrasts
        ]
        columns = ["contrast", *JUDGED, *COSTS, "seeds", *DETAILS, "compares"]
        blocks.append(Table(columns, rows, f"Contrasts. {BETWEEN}{f' {DIFFERS}' * (not against)}", sortable=True))
    told = Text(EXPLAINED.format(unit=study.measure.unit)), Text(MEANINGS)
    return [*blocks, *told, *_effects(study, findings), *refusals(findings.comparisons)]


def judged(comparison: Comparison) -> list[str]:
    """The cells of the columns JUDGED."""
    known, verdict = comparison.estimate, comparison.verdict
    strong = verdict if verdict.startswith(UNKNOWN) else f"**{verdict}**"
    floor = number(known.deviation, 4), number(known.detectable, 4)
    return [strong, signed(known.mean), interval(known.t_interval), *floor, percent(comparison.speed)]


def details(comparison: Comparison) -> list[str]:
    """The cells of the columns DETAILS."""
    known = comparison.estimate
    return [_p(comparison.adjusted), interval(known.bootstrap_interval), differing(comparison)]


def differing(comparison: Comparison) -> str:
    """The fields in which the sides of a comparison differ, with their values from the last side to the first."""
    found = comparison.differing.items()
    return "; ".join(f"{field}: {' / '.join(dict.fromkeys(values[::-1]))}" for field, values in found) or "—"


def evidence(findings: Findings) -> list[Piece]:
    """One row for each claim and layer, and for each contrast that bears on it."""
    rows = []
    for claim, found in _grouped(findings.evidence, lambda one: one.claim).items():
        rows.append([f"**{claim}**", f"**{overall(one.outcome for one in found)}**", "all", *NONE])
        layers = _grouped(found, lambda one: one.layer)
        for layer, ones in layers.items():
            if len(ones) > 1 and len(layers) > 1:
                rows.append(["", overall(one.outcome for one in ones), layer, *NONE])
            rows += [["", one.outcome, one.told_layer, *_contrast(one)] for one in ones]
    caption = (
        "A contrast supports a claim if it has the expected sign and a Holm-corrected p below 0.05, and contradicts it "
        "if it has the other sign. A claim is supported where all of its contrasts support it, contradicted where one "
        f"contradicts it and none supports it. {BETWEEN}"
    )
    return [Table(["claim", "evidence", "layer", *OF_CONTRAST], rows, caption)]


def directions(findings: Findings) -> list[Piece]:
    """What was published of a comparison beside our difference: agrees | disagrees | cannot tell; none of a study whose
    claims are its own."""
    rows = []
    for one in (one for one in findings.evidence if one.published):
        there, known = "lower" if one.sign < 0 else "higher", one.comparison.estimate
        ours = signed(known.mean), interval(known.t_interval), number(known.detectable, 4)
        says = AGREES.get(one.outcome, one.comparison.verdict)
        costs = relative(one.comparison.residuals)
        rows.append([one.claim, one.published, one.comparison.name, there, *ours, f"**{says}**", *costs])
    columns = ["published", "how large, and where", "compares", "loss there", "ours", "95% interval", "detectable"]
    caption = (
        "The direction that was published beside our difference: of larger models and more data, mostly one run each: "
        "only the sign compares. Agrees: ours has that sign, and a Holm-corrected p below 0.05; disagrees: it has "
        f"the other; else these seeds cannot tell: a difference of `detectable` they find 4 times in 5. {BETWEEN}"
    )
    return [Table([*columns, "ours says", *COSTS], rows, caption)] if rows else []


def through_training(study: Results, findings: Findings) -> list[Piece]:
    """Paired differences of the training loss against tokens seen."""
    labels = {cell["name"]: describe(cell["labels"]) for cell in study.plan["cells"]}
    found = {one.name: trend(findings, one) for one in findings.of_kind("baseline")}
    found = {labels[name]: curve for name, curve in found.items() if curve}
    if not found:
        return []
    read = [[name, reading(curve)] for name, curve in found.items()]
    caption = (
        "Training loss less the baseline's at the same step, mean over seeds, with a pointwise 95% interval (Student "
        "t, each point by itself): below 0 is better."
    )
    note = (
        f"Told if the mean over the last {100 * END:.0f}% of training has an interval without 0, and since when the "
        f"mean has stayed on that side: within the first {100 * EARLY:.0f}% is through training."
    )
    rows = panel_rows(dict(list(found.items())[:MOST_TRENDS]))
    if len(found) > MOST_TRENDS:
        caption += f" The first {MOST_TRENDS} of {len(found)} cells are drawn."
    chart = Chart("paired_differences", figures.png(figures.trends(rows)), caption, live.trends(rows))
    return [chart, Table(["cell", "training loss against its baseline"], read, note)]


def refusals(comparisons: Iterable[Comparison]) -> list[Piece]:
    """The pairs that were not made, and the field in which their runs differ."""
    rows = [
        [one.name, one.against, str(seed), reason]
        for one in comparisons
        for seed, reason in one.differences.refused.items()
    ]
    caption = "**Refused pairs**: these runs differ in more than what is studied, and count in no difference above."
    return [Table(["compared", "with", "seed", "differs in"], rows, caption)] if rows else []


def signed(value: float | None) -> str:
    return "—" if value is None else f"{value:+.4f}"


def interval(bounds: Interval | None) -> str:
    return "—" if bounds is None else f"[{signed(bounds[0])}, {signed(bounds[1])}]"


def _notes(study: Results, findings: Findings) -> Iterable[str]:
    judged = findings.settings.judged
    which = f"{study.condition} {', '.join(map(str, judged))}" if judged else f"all values of {study.condition}"
    yield f"A cell is judged by its mean loss over {which}."
    if study.measure is BITS:
        yield (
            "Its loss is in bits per byte: tokenizers differ, so that a token, also one of tokens/s, is not as much "
            "text for one as for another."
        )
    looks = [look["seeds"] for look in study.plan.get("looks", [])]
    if len(set(looks)) > 1:
        shown = ", then ".join(map(str, dict.fromkeys(looks)))
        yield f"**The number of seeds changed after a look at results** ({shown}): no p-value is corrected for that."
    if open_runs := sum(run.status != "done" for run in study.runs):
        yield f"**Provisional**: {open_runs} of {len(study.runs)} runs are not done."
    failed = [run_label(study, run) for run in study.runs if run.status == "failed" and not run.rows()]
    if failed:
        yield f"**Failed runs are in no difference**, which flatters their cells: {'; '.join(failed)}."
    counts = {one.estimate.n for one in findings.comparisons}
    if 1 in counts:
        yield (
            "**One seed gives no interval**: how far a loss moves by chance shows only between seeds. Ask for more "
            "with `--config.study.seeds=5`; runs that are done are kept."
        )
    if any(1 < n < LEAST_RESAMPLED for n in counts):
        yield f"A bootstrap interval needs {LEAST_RESAMPLED} seeds: fewer have resamples without any spread."
    alone = [
        cell["name"]
        for cell in study.plan["cells"]
        if findings.baselines and cell["name"] not in {*findings.baselines, *findings.baselines.values()}
    ]
    if alone:
        yield f"Without a baseline, and so not compared: {', '.join(alone)}."


def _loss(findings: Findings, name: str) -> str:
    losses = [score.loss for score in findings.scores[name].values()]
    return number(sum(losses) / len(losses) if losses else None, 4)


def _judged(findings: Findings, cell: str, against: Mapping[str, Comparison]) -> list[str]:
    if cell in against:
        return judged(against[cell])
    return ["baseline" if cell in findings.baselines.values() else "—", *["—"] * (len(JUDGED) - 1)]


def _costs(cell: Mapping, against: Mapping[str, Comparison]) -> list[str]:
    """What a cell costs, and where it is compared how much more that is."""
    if cell["name"] not in against:
        return list(shown(cell).values())
    more = relative(against[cell["name"]].residuals)
    return [text if text == "—" else f"{text} ({by})" for text, by in zip(shown(cell).values(), more, strict=True)]


def _effects(study: Results, findings: Findings) -> list[Piece]:
    labels = {cell["name"]: describe(cell["labels"]) for cell in study.plan["cells"]}
    named = [(labels.get(one.name) or one.name, one) for one in findings.comparisons if one.estimate.n]
    if not named:
        return []
    caption = "Differences with their 95% intervals (Student t): blue is better, orange worse, grey cannot be told."
    if len(named) > MOST_EFFECTS:
        caption += f" Of {len(named)} differences the {MOST_EFFECTS} lowest are drawn."
        named = sorted(named, key=lambda pair: pair[1].estimate.mean)[:MOST_EFFECTS]
    return [Chart("effects", figures.png(figures.effects(named)), caption, live.effects(named))]


def _contrast(one: Evidence) -> list[str]:
    known = one.comparison.estimate
    expected = "below 0" if one.sign < 0 else "above 0"
    costs = relative(one.comparison.residuals)
    return [one.comparison.name, expected, signed(known.mean), interval(known.t_interval), *costs]


def _grouped(ones: Iterable[Evidence], key) -> dict[str, list[Evidence]]:
    groups: dict = {}
    for one in ones:
        groups.setdefault(key(one), []).append(one)
    return groups


def _p(value: float | None) -> str:
    return "—" if value is None else "<0.0001" if value < 1e-4 else f"{value:.4f}"
