"""Fair tuning: every cell is tried on the same grid with the same budget on one seed, then judged on others."""

import dataclasses
import itertools
import math
import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from lab.config import leaves, set_field
from lab.errors import UserError, choose
from lab.study.define.cell import Cell
from lab.study.results import judged_loss
from lab.study.run.runs import Run, cell_directory, runs_of


class Trial(NamedTuple):
    """A cell of the study with one point of the grid laid over it."""

    cell: str
    values: dict[str, object]
    run: Run

    def describe(self) -> dict:
        """As plan.json has it."""
        directory = cell_directory(self.run.cell, self.run.fingerprint)
        return {"cell": self.cell, "values": self.values, "directory": directory, "seed": self.run.seed}


def trials(config: ConfigDict, cells: list[Cell], workdir: pathlib.Path) -> list[Trial]:
    """Every cell at every point of config.study.tune, on config.study.tune_seed. None where nothing is tuned.

    Raises UserError for a field that is unknown or that the cells vary, for values twice in the grid, and for a tuning
    seed that cells are judged on.
    """
    study = config.study
    if not study.tune:
        return []
    judged = range(config.seed, config.seed + study.seeds)
    if study.tune_seed in judged:
        raise UserError(
            f"study.tune_seed = {study.tune_seed} is among the seeds {list(judged)} that cells are judged on"
        )
    for field, values in study.tune:
        choose("a field of study.tune", field, leaves(config))
        if len(set(values)) < len(values):
            raise UserError(f"study.tune has a value of {field} twice: {tuple(values)}")
        if len({repr(leaves(cell.config)[field]) for cell in cells}) > 1:
            raise UserError(
                f"study.tune names {field}, which the study's cells vary; tune another field, or do not vary it"
            )
    grid = [dict(point) for point in itertools.product(*([(field, v) for v in values] for field, values in study.tune))]
    tried = [(cell.name, values, with_values(cell, values)) for cell in cells for values in grid]
    runs = runs_of([cell for *_, cell in tried], [study.tune_seed], workdir)
    return [
        Trial(name, v, run._replace(note=_spelled(v), baseline=None))
        for (name, v, _), run in zip(tried, runs, strict=True)
    ]


def _spelled(values: dict[str, object]) -> str:
    return ", ".join(f"{field}={value}" for field, value in values.items())


def with_values(cell: Cell, values: dict[str, object]) -> Cell:
    """The cell with some fields set."""
    config = cell.config.copy_and_resolve_references()
    for field, value in values.items():
        set_field(config, field, value)
    return dataclasses.replace(cell, config=config)


def tuned(cells: list[Cell], trials: list[Trial]) -> list[Cell]:
    """The cells at their best point; one whose trials are not all finished, or all failed, keeps its own values."""
    chosen = {cell.name: best([t for t in trials if t.cell == cell.name]) for cell in cells}
    return [with_values(cell, chosen[cell.name].values) if chosen[cell.name] else cell for cell in cells]


def best(trials: list[Trial]) -> Trial | None:
    """The trial of the lowest judged loss; of equals, the first. None while any is to be made, or if none finished."""
    scores = [(score(trial.run), trial) for trial in trials]
    if not scores or any(s is None for s, _ in scores):
        return None
    lowest, trial = min(scores, key=lambda pair: pair[0])
    return trial if math.isfinite(lowest) else None


def score(run: Run) -> float | None:
    """Mean loss over the judged conditions; infinite for a failed run, None for one that is still to be made."""
    if (run.directory / "failure.json").exists():
        return math.inf
    study = run.cell.config.study
    loss = judged_loss(run.directory / "result.json", study.condition, study.judged)
    return math.inf if loss is not None and math.isnan(loss) else loss
