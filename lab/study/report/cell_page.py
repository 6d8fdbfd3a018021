"""A page for each cell: what became of it, its curves, its losses, its config, and the command that makes it again.

The pages lie in the directories of the cells. They have no pictures, which would take minutes for a thousand cells, and
share plotly's script, which lies beside the study's figures.
"""

import shlex
from pathlib import Path
from statistics import fmean, stdev

from lab.storage import find_json, told, write_atomically
from lab.study.judge.evidence import Findings
from lab.study.judge.residuals import MEANINGS, shown
from lab.study.numbers import number
from lab.study.report import live, page
from lab.study.report.layout import CELL_PAGE, describe, differences, links, words_without
from lab.study.report.page import Chart, Code, Piece, Section, Table, Text
from lab.study.report.verdicts import differing, interval, signed
from lab.study.results import Results

SCRIPT = "figures/plotly.min.js"
UP = "../../"  # from the directory of a cell to the study's
OWN = ("--cells", "--workdir")  # flags of the study's command that a cell's has otherwise


def write(study: Results, findings: Findings | None) -> list[Path]:
    """The pages of all cells that are begun; returns their paths."""
    begun = {cell["name"] for cell, link in zip(study.plan["cells"], links(study), strict=True) if link}
    if begun:
        write_atomically(study.directory / SCRIPT, page.plotly().encode())
    against = {one.name: one for one in findings.of_kind("baseline")} if findings else {}
    configs = {cell["name"]: _config(study, cell) for cell in study.plan["cells"]}
    written = []
    for place, cell in enumerate(study.plan["cells"], 1):
        if cell["name"] in begun:
            sections = _sections(study, cell, place, against, configs)
            title = f"{study.plan['study']}: {describe(cell['labels']) or cell['name']}"
            text = page.html(title, sections, script=UP + SCRIPT, home=f"{UP}report.html")
            written.append(write_atomically(study.directory / cell["directory"] / CELL_PAGE, text.encode()))
    return written


def command(study: Results, place: int) -> str:
    """The command that makes the cell of a place, from 1 on, again, and no other, in a directory beside the study's."""
    share, workdir = f"--cells={place}/{len(study.plan['cells'])}", f"--workdir={told(study.directory)}-again"
    return shlex.join([*words_without(study, OWN), share, workdir])


def _config(study: Results, cell: dict) -> dict:
    return find_json(study.directory / cell["directory"] / "config.json") or {}


def _sections(study: Results, cell: dict, place: int, against: dict, configs: dict) -> list[Section]:
    again = [Text("To make this cell again, and no other, without touching what is here:"), Code(command(study, place))]
    return [
        Section("Cell", [*_state(study, cell), *_verdict(cell, against), *again]),
        Section("Curves", _curves(study, cell)),
        Section("Losses", _losses(study, cell)),
        Section("Config", _changes(study, cell, against, configs)),
    ]


def _state(study: Results, cell: dict) -> list[Piece]:
    runs = study.runs_by_cell[cell["name"]]
    states = ", ".join(f"seed {run.seed} {run.status}" for run in runs)
    failures = [
        Text(f"**Seed {run.seed} failed** at step {run.failure.get('step', '—')}: {run.failure.get('reason', '—')}")
        for run in runs
        if run.status == "failed"
    ]
    return [Text(f"{states}. Its files are in `{cell['directory']}`."), *failures]


def _verdict(cell: dict, against: dict) -> list[Piece]:
    if cell["name"] not in against:
        return []
    one = against[cell["name"]]
    bounds = f"{signed(one.estimate.mean)} {interval(one.estimate.t_interval)}"
    known = f"{bounds} {one.differences.measure.unit}, over {one.estimate.n} seeds"
    return [Text(f"Less its baseline, {one.against}: **{one.verdict}**, {known}. Differs in {differing(one)}.")]


def _curves(study: Results, cell: dict) -> list[Piece]:
    seeds = {
        f"seed {run.seed}": [{line["step"]: line[study.measure.column] for line in run.metrics}]
        for run in study.runs_by_cell[cell["name"]]
        if run.metrics
    }
    if not seeds:
        return [Text("No step has been logged yet.")]
    caption = "Training loss of each seed; faint, the values themselves. They are in seed-*/metrics.jsonl."
    return [Chart("curves", b"", caption, live.learning_curves([{"": seeds}], study.measure))]


def _losses(study: Results, cell: dict) -> list[Piece]:
    asks = {"loss": study.condition, **study.further_asks}
    tables = [_losses_of(study, cell, name, column) for name, column in asks.items()]
    costs = ", ".join(f"{name} {text}" for name, text in shown(cell).items())
    found = [table for table in tables if table]
    return [*found, Text(f"{costs}. {MEANINGS}")] if found else [Text("No seed has been evaluated yet.")]


def _losses_of(study: Results, cell: dict, ask: str, column: str) -> Table | None:
    by_seed = {run.seed: {row[column]: row for row in run.rows(ask)} for run in study.runs_by_cell[cell["name"]]}
    by_seed = {seed: rows for seed, rows in by_seed.items() if rows}
    rows, score = [], study.measure.column
    for value in dict.fromkeys(value for found in by_seed.values() for value in found):
        losses = [found[value][score] for found in by_seed.values() if value in found]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        each = [number(found.get(value, {}).get(score), 4) for found in by_seed.values()]
        rows.append([str(value), number(fmean(losses), 4) + spread, *(each if len(by_seed) > 1 else [])])
    seeds = [f"seed {seed}" for seed in by_seed] if len(by_seed) > 1 else []
    caption = f"{ask}: {study.measure.unit} by {column}, mean ± standard deviation over seeds."
    return Table([column, study.measure.heading, *seeds], rows, caption) if rows else None


def _changes(study: Results, cell: dict, against: dict, configs: dict) -> list[Piece]:
    """The fields that the cell has otherwise than its baseline, or than the study's base config."""
    one = against.get(cell["name"])
    other, named = (configs[one.against], one.against) if one else (study.plan["config"], "the study's base config")
    if not configs[cell["name"]] or not other:
        return [Text("Its config.json, or that of its baseline, is not there yet.")]
    found = differences(configs[cell["name"]], other)
    rows = [[f"`{field}`", str(theirs), str(ours)] for field, (ours, theirs) in found.items()]
    if not rows:
        return [Text(f"It is {named}, with nothing changed.")]
    return [Table(["field", named, "this cell"], rows, f"What differs from {named}; all of it is in config.json.")]
