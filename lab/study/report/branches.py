"""The report on parallel branches: the published tables rebuilt from our cells, and what to use for what."""

import functools
import itertools
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from lab.options import leaves
from lab.study.define.cells import ASIDE
from lab.study.numbers import number
from lab.study.report import costs, figures, live, tables
from lab.study.report.layout import arrange, cell_label, describe
from lab.study.report.page import Chart, Code, Heading, Piece, Table, Text
from lab.study.report.tables import Choice, Losses
from lab.study.results import Results

CAVEAT = "Published losses come from another model on other data: compare orderings, not levels."
USES = {
    "parallel": "16 to 64 branches",
    "single": "one branch",
    "flattest": "flattest",
}


class Names(NamedTuple):
    """The study's labels for the share of rotary pairs, the draw of branches, and the shape of a head ("": none)."""

    ratio: str
    draw: str
    head: str = ""


def section(ratio: str, draw: str, head: str = "") -> Callable[[Results], list[Piece]]:
    """The section of a study with these labels, evaluated by branch count."""
    return functools.partial(_section, Names(ratio, draw, head))


def _section(names: Names, study: Results) -> list[Piece]:
    ours, theirs = tables.losses(study), tables.published(study)
    if not ours:
        return [Text("No cell has finished yet."), *_configurations(names, study), *_all_published(study)]
    return [
        *_recommendation(names, study, ours, theirs),
        *_figures(names, study, ours),
        *_at_counts(names, study, ours, theirs),
        *_scaling(names, study, ours, theirs),
        *_fixed(names, study, ours, theirs),
        *costs.overview(study),
        *_configurations(names, study),
        *_everything(study, ours),
        *_all_published(study),
    ]


def _recommendation(names: Names, study: Results, ours: Losses, theirs: Losses) -> list[Piece]:
    choices, published = tables.recommend(ours), tables.recommend(theirs)
    many = [count for count in tables.counts(ours) if 16 <= count <= 64]
    headings = ["use", *study.labels, "loss at 1", "mean 16-64", "fluctuation", "runner-up", "published"]
    rows = []
    for use, choice in choices.items():
        curve = ours[choice.key]
        rows.append(
            [
                USES[use],
                *map(str, choice.key),
                number(curve.get(1), 4),
                number(tables.mean(curve, many) if many else None, 4),
                number(tables.spread(curve), 4),
                f"{_listed(choice.runner_up)} (+{choice.margin:.4f})" if choice.runner_up else "—",
                _listed(published[use].key) if use in published else "—",
            ]
        )
    caption = (
        f"Chosen by the mean loss over {_listed(many) or 'no'} branches, by the loss at 1, and by the fluctuation "
        f"(largest - smallest loss over the counts), in {study.measure.unit}; in brackets, by how much the runner-up "
        "is worse."
    )
    notes = [_certainty(study), _price_of_branches(names, study, ours), _agreement(ours, theirs)]
    table = Table(headings, rows, caption)
    paste = Text("To paste, as overrides of a config that does not vary these fields itself:")
    return [Heading("Recommendation"), table, *(Text(note) for note in notes if note), paste, _snippet(study, choices)]


def _snippet(study: Results, choices: Mapping[str, Choice]) -> Code:
    """Each cell chosen, once, under what it is chosen for."""
    uses: dict = {}
    for use, choice in choices.items():
        uses.setdefault(choice.key, []).append(USES[use])
    return Code("\n".join(f"# {', '.join(names)}\n{_flags(study, key)}" for key, names in uses.items()))


def _certainty(study: Results) -> str:
    open_runs = sum(run.status != "done" for run in study.runs)
    waiting = f"**Provisional**: {open_runs} of {len(study.runs)} runs are not done. " if open_runs else ""
    variances = [deviation**2 for curve in tables.deviations(study).values() for deviation in curve.values()]
    if not variances:
        return waiting + "**One seed, no error bars**: a margin of a few hundredths of a nat may be chance."
    pooled = (sum(variances) / len(variances)) ** 0.5
    return (
        waiting
        + "Losses are means over seeds; their standard deviation, pooled over cells and counts, is "
        + f"{pooled:.4f} {study.measure.unit.split()[0]}."
    )


def _price_of_branches(names: Names, study: Results, ours: Losses) -> str:
    """What training on several branches costs at one."""
    place = study.labels.index(names.draw)
    alone = tables.choose({key: curve[1] for key, curve in ours.items() if 1 in curve and key[place] == "fixed1"})
    several = tables.choose({key: curve[1] for key, curve in ours.items() if 1 in curve and key[place] != "fixed1"})
    if not alone or not several:
        return ""
    return (
        f"At one branch the best of those trained on several is {cell_label(study, several.key)}, with "
        f"{several.value:.4f}; the best trained on one has {alone.value:.4f}: a price of "
        f"{several.value - alone.value:.4f} {study.measure.unit.split()[0]}."
    )


def _agreement(ours: Losses, theirs: Losses) -> str:
    found = tables.rank_correlation(ours, theirs)
    if not found:
        return ""
    return f"{CAVEAT} The rank correlation of ours with theirs over {found[1]} shared losses is {found[0]:.2f}."


def _flags(study: Results, key: tuple) -> str:
    """The command-line overrides that make a cell of the base config: its labels, and whatever else it changes."""
    cell = next(cell for cell in study.plan["cells"] if study.key(cell) == key)
    base, resolved = leaves(study.plan["config"]), leaves(study.config(cell))
    labelled = [field for field, _ in study.plan["labels"] if field in resolved]
    changed = [field for field, value in resolved.items() if field in base and base[field] != value]
    fields = dict.fromkeys(labelled + [field for field in changed if field.split(".")[0] not in ASIDE])
    return " ".join(shlex.quote(f"--config.{field}={resolved[field]}") for field in fields)


def _figures(names: Names, study: Results, ours: Losses) -> list[Piece]:
    rows, errors = (
        arrange(study, curves, names.ratio, rows_by=names.draw) for curves in (ours, tables.deviations(study))
    )
    bars = {title: panel for row in errors for title, panel in row.items()}
    trained = {title: known for row in rows for title in row if (known := _trained(names.draw, title))}
    turned = [{title: _transpose(panel) for title, panel in row.items()} for row in rows]
    charts = [
        Chart(
            "loss_by_branches",
            figures.png(figures.by_condition(rows, bars, study.condition, trained, study.measure)),
            f"Loss against the number of branches, one line for each {names.ratio}; grey: the counts trained on. "
            "Vertical scales differ between draws.",
            live.by_condition(rows, bars, study.condition, trained, study.measure),
        ),
        Chart(
            "loss_by_ratio",
            figures.png(figures.by_label(turned, names.ratio, study.measure.title)),
            f"Loss against {names.ratio}, one line for each number of branches.",
            live.by_label(turned, names.ratio, study.measure.title),
        ),
        Chart(
            "heat_map",
            figures.png(figures.heat_maps(rows, names.ratio, study.condition)),
            f"The same losses in {study.measure.unit}; dark is better, one scale for all panels.",
            live.heat_maps(rows, names.ratio, study.condition),
        ),
    ]
    return [Heading("Loss by ratio and number of branches"), *charts]


def _trained(draw: str, title: str) -> tuple[int, int] | None:
    found = re.search(rf"{re.escape(draw)} (?:fixed(\d+)|(\d+)-(\d+))\b", title)
    return found and (int(found[1] or found[2]), int(found[1] or found[3]))


def _transpose(panel: Mapping) -> dict:
    counts = sorted({count for curve in panel.values() for count in curve})
    return {count: {name: curve[count] for name, curve in panel.items() if count in curve} for count in counts}


def _at_counts(names: Names, study: Results, ours: Losses, theirs: Losses) -> list[Piece]:
    """Ratio x head, or ratio x draw, at one branch, at the largest count, and at the largest published too."""
    every = tables.counts(ours)
    shared = [count for count in every if count in tables.counts(theirs)]
    columns = names.head or names.draw
    found = [
        _at_count(names, study, ours, theirs, count, columns, where)
        for where in _combinations(study, [name for name in study.labels if name not in (names.ratio, columns)])
        for count in sorted({every[0], every[-1], *shared[-1:]})
    ]
    note = f"Bold: the best {names.ratio} of a column." + f" {CAVEAT}" * bool(theirs)
    return [Heading(f"Loss by {names.ratio} and {columns}"), Text(note), *(table for table in found if table)]


def _at_count(
    names: Names, study: Results, ours: Losses, theirs: Losses, count: int, columns: str, where: Mapping
) -> Table | None:
    grids = [tables.grid(study, curves, count, names.ratio, columns, where) for curves in (ours, theirs)]
    if not any(grids[0].values()):
        return None
    shown = tables.values(study, columns)
    headings, rows = [names.ratio], [[str(ratio)] for ratio in grids[0]]
    for grid, mark in zip(grids, ("", "published "), strict=True):
        if not any(grid.values()):
            continue
        headings += [*(f"{mark}{name}" for name in shown), f"{mark}best"]
        least = {name: min((row[name] for row in grid.values() if name in row), default=None) for name in shown}
        for cells, row in zip(rows, grid.values(), strict=True):
            cells += [_marked(row.get(name), 4, row.get(name) == least[name]) for name in shown]
            cells.append(str(tables.best(row)) if len(row) == len(shown) else "—")
    return Table(headings, rows, describe(where | {study.condition: count}))


def _scaling(names: Names, study: Results, ours: Losses, theirs: Losses) -> list[Piece]:
    every, place = tables.counts(ours), study.labels.index(names.draw)
    headings = [*(label for label in study.labels if label != names.draw), "source", *map(str, every), "fluctuation"]
    found = []
    for draw in tables.values(study, names.draw):
        keys = [key for key in ours if key[place] == draw]
        flattest = min((tables.spread(ours[key]) or 0 for key in keys), default=None)
        rows = []
        for key in keys:
            labels = [str(value) for value in (*key[:place], *key[place + 1 :])]
            rows.append([*labels, "ours", *_curve(ours[key], every, flattest)])
            if known := {count: loss for count, loss in theirs.get(key, {}).items() if count in every}:
                rows.append([*labels, "published", *_curve(known, every, None)])
        if keys:
            found.append(Table(headings, rows, f"{describe({names.draw: draw})}; columns: {study.condition}"))
    note = (
        "Fluctuation is the largest - the smallest loss over the counts; of published rows, over the counts that were "
        "published. Bold: the flattest of ours."
    )
    return [Heading("Scaling with the number of branches"), Text(note), *found]


def _curve(curve: Mapping[int, float], every: list[int], flattest: float | None) -> list[str]:
    fluctuation = tables.spread(curve)
    cells = [number(curve.get(count), 3) for count in every]
    return [*cells, _marked(fluctuation, 3, fluctuation is not None and fluctuation == flattest)]


def _fixed(names: Names, study: Results, ours: Losses, theirs: Losses) -> list[Piece]:
    """What is left between cells that train and decode the same fixed number of branches."""
    blocks: list[Piece] = []
    for draw in tables.values(study, names.draw):
        trained = re.fullmatch(r"fixed(\d+)", str(draw))
        if trained and int(trained[1]) in tables.counts(ours):
            blocks.append(_fixed_table(names, study, ours, theirs, draw, int(trained[1])))
    heading = Heading("Spread of the models trained on a fixed number of branches")
    return [heading, *blocks] if blocks else []


def _fixed_table(names: Names, study: Results, ours: Losses, theirs: Losses, draw: str, count: int) -> Table:
    rows_by, columns_by = (names.ratio, names.head) if names.head else (names.draw, names.ratio)
    shown, rows = tables.values(study, columns_by), []
    for curves, source in ((ours, "ours"), (theirs, "published")):
        for value, row in tables.grid(study, curves, count, rows_by, columns_by, {names.draw: draw}).items():
            if row:
                cells = [_marked(row.get(name), 4, name == tables.best(row)) for name in shown]
                rows.append(
                    [str(value), source, *cells, number(tables.spread(row) if len(row) == len(shown) else None, 3)]
                )
    headings = [rows_by, "source", *(f"{columns_by} {name}" for name in shown), "spread"]
    return Table(
        headings,
        rows,
        f"{describe({names.draw: draw, study.condition: count})}; spread over {columns_by}, best in bold",
    )


def _configurations(names: Names, study: Results) -> list[Piece]:
    """Frequency pairs of a head and what rotates them."""
    labels = [label for label in study.labels if label != names.draw]
    rows = {}
    for cell in study.plan["cells"]:
        if "pairs_branch" in cell:
            pairs = [cell[f"pairs_{axis}"] for axis in ("branch", "time", "index")]
            known = [cell["labels"].get(label, "") for label in labels]
            rows[tuple(known)] = [str(item) for item in (*known, cell["head_dim"], sum(pairs), *pairs)]
    headings = [*labels, "head_dim", "frequency pairs", "carry branch", "carry time", "carry index"]
    caption = (
        "What rotates the frequency pairs of a head. Selected pairs alternate between branch and time; what the "
        "published note calls branch pairs are all selected pairs, the sum of the two."
    )
    table = Table(headings, list(rows.values()), caption, folded=True)
    return [Heading("Frequency pairs of a head"), table] if rows else []


def _everything(study: Results, ours: Losses) -> list[Piece]:
    every = tables.counts(ours)
    perplexity = {
        key: frame.groupby(study.condition)["ppl"].mean().to_dict()
        for key, frame in study.results.groupby(study.labels, sort=False)
    }
    rows = [
        [*(str(value) for value in key), *(_pair(curve.get(count), perplexity[key].get(count)) for count in every)]
        for key, curve in ours.items()
    ]
    return [
        Heading("Complete tables"),
        Table([*study.labels, *map(str, every)], rows, "Ours: loss (perplexity) by number of branches", folded=True),
    ]


def _all_published(study: Results) -> list[Piece]:
    frame = study.published()
    if frame is None or study.condition not in frame.columns:
        return []
    keys = [name for name in frame.columns if name not in (study.condition, "loss", "ppl")]
    every = sorted(set(frame[study.condition]))
    curves: dict = {}
    for row in frame.to_dict("records"):
        curves.setdefault(tuple(row[name] for name in keys), {})[row[study.condition]] = _pair(
            row["loss"], row.get("ppl")
        )
    rows = [
        [*(str(value) for value in key), *(curve.get(count, "—") for count in every)] for key, curve in curves.items()
    ]
    caption = f"Published: loss (perplexity) by number of branches, from {study.plan['published']}"
    return [Table([*keys, *map(str, every)], rows, caption, folded=True)]


def _combinations(study: Results, labels: list[str]) -> list[dict]:
    return [
        dict(zip(labels, found, strict=True))
        for found in itertools.product(*(tables.values(study, name) for name in labels))
    ]


def _pair(loss: float | None, perplexity: float | None) -> str:
    shown = number(perplexity, 2)
    return number(loss, 4) if shown == "—" else f"{number(loss, 4)} ({shown})"


def _marked(value: float | None, digits: int, strong: bool) -> str:
    return f"**{number(value, digits)}**" if value is not None and strong else number(value, digits)


def _listed(items: Iterable) -> str:
    return ", ".join(str(item) for item in items)
