"""Several studies side by side: all their cells in one table, and cells of one name paired with the first study's."""

from pathlib import Path

from lab.errors import UserError
from lab.study.define.contrasts import settings
from lab.study.judge import pairing
from lab.study.judge.evidence import Comparison, compare, corrected
from lab.study.judge.pairing import Scores
from lab.study.judge.residuals import BETWEEN, COSTS, MEANINGS, faster, relative, residuals, shown, throughput
from lab.study.numbers import number
from lab.study.report.page import Piece, Section, Table, Text
from lab.study.report.verdicts import DETAILS, JUDGED, details, judged, refusals
from lab.study.results import Results

TITLE = "Comparison of studies"


def sections(studies: list[Results]) -> list[Section]:
    """The page of a comparison. Each study judges its cells by its own study.judged; pairs of other conditions are
    refused. Raises UserError for a study that is given twice."""
    names = _names(studies)
    named = dict(zip(names, studies, strict=True))
    scores = {name: _scores(study) for name, study in named.items()}
    return [Section("Cells", _cells(named, scores)), Section("Cells of one name", _paired(named, scores))]


def paired(studies: dict[str, Results], scores: dict[str, Scores]) -> list[Comparison]:
    """Every later study against the first, cell by cell of the same name, as one family of tests."""
    planned = {name: {cell["name"]: cell for cell in study.plan["cells"]} for name, study in studies.items()}
    speeds = {name: throughput(study) for name, study in studies.items()}
    first, *others = studies
    found = []
    for other in others:
        for cell in scores[first]:
            if cell in scores[other]:
                differences = pairing.differences([[scores[other][cell]], [scores[first][cell]]], (1, -1))
                costs = residuals([[planned[other][cell]], [planned[first][cell]]])
                speed = faster([[speeds[other][cell]], [speeds[first][cell]]])
                found.append(compare("study", f"{other}: {cell}", first, differences, costs, speed))
    return corrected(found)


def _names(studies: list[Results]) -> list[str]:
    """What tells the studies apart: their names where these differ, else their directories."""
    directories = [str(study.directory) for study in studies]
    if len({Path(directory).resolve() for directory in directories}) < len(studies):
        raise UserError(f"one study is given twice: {', '.join(directories)}")
    names = [study.plan["study"] for study in studies]
    return names if len(set(names)) == len(names) else directories


def _scores(study: Results) -> Scores:
    return pairing.scores(study, settings(study.plan["config"].get("study", {})).judged)


def _cells(studies: dict[str, Results], scores: dict[str, Scores]) -> list[Piece]:
    rows = []
    for name, study in studies.items():
        for cell in study.plan["cells"]:
            losses = {seed: score.loss for seed, score in scores[name][cell["name"]].items()}
            mean = sum(losses.values()) / len(losses) if losses else None
            seeds = " ".join(map(str, losses)) or "—"
            rows.append([name, cell["name"], number(mean, 4), seeds, *shown(cell).values(), f"{cell['tokens']:,}"])
    units = ", ".join(dict.fromkeys(study.measure.unit for study in studies.values()))
    columns = ["study", "cell", "loss", "seeds", *COSTS, "training tokens"]
    caption = f"Loss: mean over seeds and the judged conditions of the study, {units}. {MEANINGS}"
    return [Table(columns, rows, caption, sortable=True)]


def _paired(studies: dict[str, Results], scores: dict[str, Scores]) -> list[Piece]:
    comparisons, first = paired(studies, scores), next(iter(studies))
    if not comparisons:
        return [Text(f"No later study has a cell named like one of {first}.")]
    rows = [
        [one.name, str(one.estimate.n), *judged(one), *relative(one.residuals), *details(one)] for one in comparisons
    ]
    caption = f"Less the cell of the same name in {first}, over the seeds of both; corrected over all rows. {BETWEEN}"
    return [Table(["cell", "seeds", *JUDGED, *COSTS, *DETAILS], rows, caption, sortable=True), *refusals(comparisons)]
