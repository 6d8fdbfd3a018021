"""Trials: runs of every cell at every point of the grid on the seed of tuning, and the best of them."""

import dataclasses
import math
import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from lab.evaluate import asks
from lab.study import evaluations
from lab.study.define import tuning
from lab.study.define.asked import wanted
from lab.study.define.cell import Cell
from lab.study.results import failed, judged_loss
from lab.study.run.runs import Run, runs_of


class Trial(NamedTuple):
    """A cell of the study with one point of the grid laid over it."""

    cell: str
    values: dict[str, object]
    run: Run

    def describe(self) -> dict:
        """As plan.json has it."""
        about = wanted(self.run.cell.config, self.run.data)
        place = self.run.place
        return {"cell": self.cell, "values": self.values, "directory": place, "seed": self.run.seed, "asks": about}


def trials(config: ConfigDict, cells: list[Cell], workdir: pathlib.Path, remake: bool = False) -> list[Trial]:
    """Every cell at every point of config.study.tune, on config.study.tune_seed. Raises what `tuning.points` does."""
    grid = tuning.points(config, cells)
    if not grid:
        return []
    tried = [(cell.name, values, tuning.with_values(cell, values)) for cell in cells for values in grid]
    runs = runs_of([cell for *_, cell in tried], [config.study.tune_seed], workdir, remake)
    return [
        Trial(name, v, dataclasses.replace(run, note=_spelled(v), baseline=None))
        for (name, v, _), run in zip(tried, runs, strict=True)
    ]


def _spelled(values: dict[str, object]) -> str:
    return ", ".join(f"{field}={value}" for field, value in values.items())


def tuned(cells: list[Cell], trials: list[Trial]) -> list[Cell]:
    """The cells at their best point; one whose trials are not all finished, or all failed, keeps its own values."""
    chosen = {cell.name: best([t for t in trials if t.cell == cell.name]) for cell in cells}
    return [tuning.with_values(cell, chosen[cell.name].values) if chosen[cell.name] else cell for cell in cells]


def best(trials: list[Trial]) -> Trial | None:
    """The trial of the lowest judged loss; of equals, the first. None while any is to be made, or if none finished."""
    scores = [(score(trial.run), trial) for trial in trials]
    if not scores or any(s is None for s, _ in scores):
        return None
    lowest, trial = min(scores, key=lambda pair: pair[0])
    return trial if math.isfinite(lowest) else None


def score(run: Run) -> float | None:
    """Mean loss over the judged conditions; infinite for a failed run, None for one that is still to be made."""
    if failed(run.directory) is not None:
        return math.inf
    config = run.cell.config
    found = evaluations.find(run.directory, asks.LOSS, wanted(config, run.data)[asks.LOSS])
    return judged_loss(evaluations.rows(found), asks.column(config), config.study.judged)
