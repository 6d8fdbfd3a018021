"""The parts of a report by name. A new study adds a function here or in a module of its own, and a row of SECTIONS."""

import inspect
import math
import shlex
from collections.abc import Callable, Sequence

from lab.errors import UserError, choose
from lab.storage import told
from lab.study.judge.evidence import Findings
from lab.study.measure import NATS
from lab.study.numbers import number, short, whole
from lab.study.report import (
    accuracy,
    answers,
    branches,
    calibration,
    costs,
    decoding,
    differences,
    figures,
    headline,
    lengths,
    live,
    mixing,
    questions,
    scaling,
    series,
    stability,
    trials,
    verdicts,
)
from lab.study.report.layout import arrange, few, grouped, line_label, links, lowest, run_label, words_without
from lab.study.report.page import Chart, Code, Piece, Section, Table, Text
from lab.study.results import Results

MEBIBYTE = 2**20
HEADLINES = (
    "loss_by_position",
    "effects",
    "loss_by_branches",
    "loss_by_condition",
    "learning_curves",
)  # figures that a page may open with


def runs(study: Results) -> list[Piece]:
    """What each cell is and cost, what failed, where it ran and how to do it again."""
    about = _cells(study), costs.moved(study), _failures(study), _evaluation_speed(study), _environment(study)
    return [*(piece for pieces in about for piece in pieces), *_attention(study), *_commands(study)]


def curves(study: Results) -> list[Piece]:
    """Learning curves: a colour for each value of one label, a panel for each combination of the others, or for each
    group of study.groups in it."""
    found: dict = {}
    for run in study.runs:
        if run.metrics:
            points = {line["step"]: line[study.measure.column] for line in run.metrics}
            found.setdefault(study.key(run.cell), []).append(points)
    if not found:
        return [Text("No step has been logged yet.")]
    name = line_label(study)
    right = "; in the picture on the right, its perplexity" if study.measure is NATS else ""
    caption = (
        f"Training loss, one line for each {name or 'run'}: the centred mean of 1/25 of the logged values; "
        f"faint, the values themselves, or the range of these means over seeds{right}. The first tenth of the steps "
        f"may rise above the panel.{few(len(found))}"
    )
    groups = study.plan["config"].get("study", {}).get("groups", ())
    rows = grouped(arrange(study, lowest(study, found), name), groups)
    image = figures.png(figures.learning_curves(rows, study.measure))
    return [Chart("learning_curves", image, caption, live.learning_curves(rows, study.measure))]


SECTIONS = {
    "accuracy": ("Accuracy", lambda: accuracy.section),
    "branches": ("Branches", branches.section),
    "curves": ("Learning curves", lambda: curves),
    decoding.NAME: ("Decoded branches", decoding.section),
    "differences": ("Differences by condition", lambda: differences.section),
    lengths.NAME: ("Lengths", lambda: lengths.section),
    "mixing": ("Mixing weights", lambda: mixing.section),
    questions.NAME: ("Questions", lambda: questions.section),
    "stability": ("Stability", lambda: stability.section),
    "scaling": ("Scaling", lambda: scaling.section),
    "series": ("The published series", lambda: series.section),
}  # title, and a function of the study's labels that the section needs to the section: a function of the results


def parts(entries: Sequence, labels: Sequence[str]) -> dict[str, tuple[str, Callable[[Results], list[Piece]]]]:
    """{name: (title, section)} of study.sections: names, or tuples (name, label, ...) where a section needs labels.

    Raises UserError for an unknown section, too few or too many labels, and one that the study (`labels`) lacks.
    """
    found = {}
    for entry in entries:
        name, *given = (entry,) if isinstance(entry, str) else entry or ("",)
        title, factory = SECTIONS[choose("study.sections", name, SECTIONS)]
        parameters = inspect.signature(factory).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty]
        if not len(needed) <= len(given) <= len(parameters):
            shape = ", ".join([repr(name), *(p.name if p.default is p.empty else f"[{p.name}]" for p in parameters)])
            raise UserError(
                f"study.sections: {entry!r} must be ({shape}), each by a label of the study: {', '.join(labels)}"
                if parameters
                else f"study.sections: {entry!r} must be {name!r}: the section takes no labels"
            )
        for label in given:
            choose(f"a label of the section {name!r}", label, labels)
        found[name] = title, factory(*given)
    return found


def make(study: Results, findings: Findings | None) -> list[Section]:
    """The parts of the report, those that the plan names among them. The answer comes first, with the first figure of
    what follows; `findings` of a study that compares its cells put the verdicts next. Raises what `parts` does."""
    entries = study.plan["sections"]
    entries = [*entries, *["scaling"] * (scaling.has_rungs(study) and "scaling" not in entries)]
    wanted, further = parts(entries, study.labels), answers.sections(study)
    named = [Section(title, function(study)) for name, (title, function) in wanted.items() if name != "curves"]
    by_condition = Section("Loss by condition", [] if "branches" in wanted else costs.by_condition(study))
    learning, about = curves(study) if findings or "curves" in wanted else [], runs(study)
    found = [*named, by_condition]
    if findings:
        learning += verdicts.through_training(study, findings)
        about += costs.config_differences(study, findings)
        found = [
            Section("Verdicts", verdicts.verdicts(study, findings)),
            Section("Evidence", verdicts.evidence(findings) if findings.evidence else []),
            Section("Published directions", verdicts.directions(findings)),
            by_condition,
            Section("Loss by cost", costs.pareto(study, findings)),
            *named,
        ]
    found += [*further, Section("Calibration", calibration.section(study, findings))]
    found += [Section("Learning curves", learning), Section("Tuning", trials.section(study))]
    figure, rest = _headline_figure([*found, Section("Runs", about)])
    answered = lengths.answer(study) if lengths.NAME in wanted else []
    return [headline.section(study, findings, [*answered, *figure]), *(section for section in rest if section.blocks)]


def _headline_figure(sections: list[Section]) -> tuple[list[Chart], list[Section]]:
    """The first of HEADLINES that was drawn, and the sections without it."""
    drawn = {block.name: block for section in sections for block in section.blocks if isinstance(block, Chart)}
    first = next((drawn[name] for name in HEADLINES if name in drawn), None)
    rest = [Section(one.title, [block for block in one.blocks if block is not first]) for one in sections]
    return ([first] if first else []), rest


def _cells(study: Results) -> list[Piece]:
    planned = {
        "parameters": lambda cell: f"{cell['parameters']:,}",
        "parameters trained": lambda cell: f"{cell.get('parameters_trained', cell['parameters']):,}",
        "parameters besides embeddings": lambda cell: f"{cell['parameters_non_embedding']:,}",
        "FLOPs/token": lambda cell: short(cell["train_flops_per_token"]),
        "cache per token and layer": lambda cell: whole(cell["cache_per_token_per_layer"]),
        "attention work": lambda cell: whole(cell.get("attention_work", math.nan)),
        "state per row and layer": lambda cell: whole(cell.get("state_per_layer", 0)),
        "training tokens": lambda cell: f"{cell['tokens']:,}",
    }
    cells = study.plan["cells"]
    if not any(cell.get("state_per_layer") for cell in cells):
        del planned["state per row and layer"]
    if all(cell.get("parameters_trained", cell["parameters"]) == cell["parameters"] for cell in cells):
        del planned["parameters trained"]
    common = {name: show(cells[0]) for name, show in planned.items() if len({show(cell) for cell in cells}) == 1}
    differing = {name: show for name, show in planned.items() if name not in common}
    measured, training = ("train s", "tokens/s", "outside the step", "peak MiB"), _training_costs(study)
    rows = [
        [
            *map(str, study.key(cell)),
            _status(study, cell),
            *(show(cell) for show in differing.values()),
            *training[cell["name"]],
        ]
        for cell in cells
    ]
    caption = "Cells; times are means over seeds. Each leads to its own page: curves, losses, config, and its command."
    columns = [*study.labels, "status", *differing, *measured]
    table = Table(columns, rows, caption, sortable=True, links=links(study))
    return [*([Text(_shared(common))] if common else []), table]


def _shared(common: dict[str, str]) -> str:
    return "The same for every cell: " + "; ".join(f"{name}: {value}" for name, value in common.items()) + "."


def _status(study: Results, cell: dict) -> str:
    runs = study.runs_by_cell[cell["name"]]
    if len(runs) > 1:
        return f"{sum(run.status == 'done' for run in runs)} of {len(runs)} done"
    if runs[0].status == "pending" and runs[0].result:
        return "trained"
    started = runs[0].status == "pending" and runs[0].metrics
    return f"at step {runs[0].metrics[-1]['step']}" if started else runs[0].status


def _training_costs(study: Results) -> dict[str, list[str]]:
    """What training each cell took, means over its seeds; dashes of cells that have no time yet."""
    names = ["seconds", "tokens_per_second", "overhead_share", "peak_bytes"]
    train = study.timings[study.timings["phase"] == "train"].set_index("cell")[names].astype(float)
    means = train.groupby(level="cell").mean().reindex([cell["name"] for cell in study.plan["cells"]])
    found = {}
    for name, seconds, speed, outside, peak in means.itertuples():
        share = "—" if math.isnan(outside) else f"{100 * outside:.1f}%"
        found[name] = [number(seconds, 1), number(speed, 0), share, number(peak / MEBIBYTE, 0)]
    return found


def _failures(study: Results) -> list[Piece]:
    rows = [
        [run_label(study, run), str(run.failure.get("step", "—")), str(run.failure.get("reason", "—"))]
        for run in study.runs
        if run.status == "failed"
    ]
    return [Table(["run", "step", "reason"], rows, "**Failed.** `--retry-failed` runs these again.")] * bool(rows)


def _evaluation_speed(study: Results) -> list[Piece]:
    frame = study.timings[study.timings["phase"] == "eval"]
    if frame.empty:
        return []
    measured = ["seconds", "tokens_per_second", "peak_bytes"]
    means = frame[[study.condition, *measured]].astype(float).groupby(study.condition).mean()
    rows = [
        [
            f"{count:g}",
            number(row["seconds"], 2),
            number(row["tokens_per_second"], 0),
            number(row["peak_bytes"] / MEBIBYTE, 0),
        ]
        for count, row in means.iterrows()
    ]
    caption = "Evaluation cost by condition, mean over runs; each cell's own is in timings.csv"
    return [Table([study.condition, "seconds", "tokens/s", "peak MiB"], rows, caption, folded=True)]


def _environment(study: Results) -> list[Piece]:
    results = [run.result for run in study.runs if run.result]
    environments = _distinct([result["environment"] for result in results])
    if not environments:
        return []
    fields = list(dict.fromkeys(field for environment in environments for field in environment))
    rows = [[field, *(str(environment.get(field, "—")) for environment in environments)] for field in fields]
    columns = [
        "environment",
        *(["value"] if len(environments) == 1 else [str(i + 1) for i in range(len(environments))]),
    ]
    mixed = "**The runs were made in different environments**, so their losses may differ by more than the variants do."
    notes = [Text(mixed)] if len(environments) > 1 else []
    return [*notes, Text(_texts(study)), Table(columns, rows, "Environment", folded=len(environments) == 1)]


def _attention(study: Results) -> list[Piece]:
    """What trials of attention found on the machine of the study, where there were any."""
    chosen = study.plan.get("attention")
    if not chosen:
        return []
    rows = []
    for one in chosen["tried"]:
        times = " ".join(number(1e3 * seconds, 3) for seconds in one["seconds"])
        verdict = "taken" if one["name"] == chosen["name"] else one["refused"] or "right"
        rows.append([one["name"], times or "—", "yes" if one["same"] else "no", verdict])
    columns = ["attention", "ms of a call, by problem", "same bits twice", "verdict"]
    notes = [Text(f"Attention: {chosen['warning']}.")] if chosen["warning"] else []
    return [*notes, Table(columns, rows, "Implementations of attention, tried before the study began", folded=True)]


def _texts(study: Results) -> str:
    """Cells are comparable where they read the same texts in the same order, seed by seed."""
    hashes: dict = {}
    for run in study.runs:
        if run.result:
            data = "" if study.measure is not NATS else run.result.get("data", "")
            hashes.setdefault(run.seed, set()).add((run.result["text_hash"], data))
    if any(len(found) > 1 for found in hashes.values()):
        return "**Cells of one seed read different training texts**: their losses are not paired."
    shown = ", ".join(f"`{found[:12]}`" for found in _distinct([next(iter(found))[0] for found in hashes.values()]))
    return f"All finished cells of a seed read the same training texts in the same order (hash {shown})."


def _commands(study: Results) -> list[Piece]:
    place = shlex.quote(told(study.directory))
    every = shlex.join(words_without(study, ("--cells",)))  # not those of one job of several
    lines = [every, f"python -m lab.report {place}", f"launch/tensorboard.sh {place}"]
    return [Text("To run it, to rebuild this page, and to follow the curves:"), Code("\n".join(lines))]


def _distinct(items: Sequence) -> list:
    return [item for place, item in enumerate(items) if item not in items[:place]]
