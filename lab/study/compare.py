"""Several studies side by side: all their cells in one table, and cells of one name paired with the first study's."""

from pathlib import Path

from lab.errors import UserError
from lab.study import pairing
from lab.study.contrasts import settings
from lab.study.evidence import Comparison, compare, corrected
from lab.study.layout import number
from lab.study.page import Block, Section, Table, Text
from lab.study.pairing import Scores
from lab.study.results import Study
from lab.study.verdicts import MEASURED, measured, refusals

TITLE = "Comparison of studies"


def sections(studies: list[Study]) -> list[Section]:
    """The page of a comparison. Each study judges its cells by its own study.judged; pairs of other conditions are
    refused. Raises UserError for a study that is given twice."""
    names = _names(studies)
    scores = dict(zip(names, map(_scores, studies), strict=True))
    return [Section("Cells", _cells(studies, scores)), Section("Cells of one name", _paired(names, scores))]


def paired(names: list[str], scores: dict[str, Scores]) -> list[Comparison]:
    """Every later study against the first, cell by cell of the same name, as one family of tests."""
    first, *others = names
    found = []
    for other in others:
        for cell in scores[first]:
            if cell in scores[other]:
                runs = [[scores[other][cell]], [scores[first][cell]]]
                found.append(compare("study", f"{other}: {cell}", first, pairing.differences(runs, (1, -1))))
    return corrected(found)


def _names(studies: list[Study]) -> list[str]:
    """What tells the studies apart: their names where these differ, else their directories."""
    directories = [str(study.directory) for study in studies]
    if len({Path(directory).resolve() for directory in directories}) < len(studies):
        raise UserError(f"one study is given twice: {', '.join(directories)}")
    names = [study.plan["study"] for study in studies]
    return names if len(set(names)) == len(names) else directories


def _scores(study: Study) -> Scores:
    return pairing.scores(study, settings(study.plan["config"].get("study", {})).judged)


def _cells(studies: list[Study], scores: dict[str, Scores]) -> list[Block]:
    rows = []
    for study, (name, found) in zip(studies, scores.items(), strict=True):
        for cell in study.plan["cells"]:
            losses = {seed: score.loss for seed, score in found[cell["name"]].items()}
            mean = sum(losses.values()) / len(losses) if losses else None
            seeds = " ".join(map(str, losses)) or "—"
            rows.append([name, cell["name"], number(mean, 4), seeds, f"{cell['parameters']:,}", f"{cell['tokens']:,}"])
    columns = ["study", "cell", "loss", "seeds", "parameters", "training tokens"]
    caption = "Loss: mean over seeds and the judged conditions of the study, nats per token."
    return [Table(columns, rows, caption, sortable=True)]


def _paired(names: list[str], scores: dict[str, Scores]) -> list[Block]:
    comparisons = paired(names, scores)
    if not comparisons:
        return [Text(f"No later study has a cell named like one of {names[0]}.")]
    rows = [[one.name, str(one.estimate.n), *measured(one)] for one in comparisons]
    caption = f"Less the cell of the same name in {names[0]}, over the seeds of both; corrected over all rows."
    return [Table(["cell", "seeds", *MEASURED], rows, caption, sortable=True), *refusals(comparisons)]
