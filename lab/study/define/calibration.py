"""A/A calibration: one cell of a study is run again, on the same texts from other initial values, to see what its
judgement makes of runs between which nothing differs."""

import dataclasses
from collections.abc import Sequence

from ml_collections import ConfigDict

from lab import config as lab_config
from lab.errors import UserError, choose
from lab.study.define import contrasts
from lab.study.define.cell import Cell

APART = 1_000_000  # the model seeds of a cell and of its repeats: no number of seeds of the one reaches the other


def check(config: ConfigDict, cells: list[Cell]) -> None:
    """Refuses a calibration that could tell nothing. Raises UserError."""
    study = config.study
    if study.calibrate_cell:
        choose("study.calibrate_cell", study.calibrate_cell, [cell.name for cell in cells])
    if not study.calibrate:
        return
    if config.checkpoint:
        raise UserError(
            f"study.calibrate = {study.calibrate} beside config.checkpoint: repeats differ in the initial values that "
            "are drawn, and these are read; choose 0"
        )
    if study.seeds < 2:
        raise UserError(
            f"study.calibrate = {study.calibrate} beside study.seeds = {study.seeds}: one seed has no verdict that "
            "could be false; choose at least 2 seeds"
        )
    if study.vmap == "numbers":
        raise UserError(
            f"study.calibrate = {study.calibrate} beside study.vmap = 'numbers': repeats would be trained in stacks of "
            "their own, and runs of unlike stacks are not paired; choose study.vmap = 'none' or 'seeds'"
        )
    lab_config.check_seeds(repeat(calibrated(study, cells), study.calibrate).config)


def calibrated(study: ConfigDict, cells: Sequence[Cell]) -> Cell:
    """The cell that study.calibrate_cell names; else the first that is a baseline, else the first."""
    labels = {cell.name: cell.labels for cell in cells}
    baselines = {*contrasts.baselines(labels, contrasts.settings(study).baseline).values()}
    wanted = study.calibrate_cell or next((name for name in labels if name in baselines), cells[0].name)
    return next(cell for cell in cells if cell.name == wanted)


def repeat(cell: Cell, number: int) -> Cell:
    """The cell with other initial values at every seed; numbers count from 1."""
    config = cell.config.copy_and_resolve_references()
    config.model_seed += number * APART
    return dataclasses.replace(cell, config=config)


def cost(config: ConfigDict, cells: list[Cell], rows: list[dict]) -> dict | None:
    """What a calibration adds to a study, from the rows of its plan: runs, tokens, FLOPs of training and their share of
    the study's own. None of a study without one."""
    study = config.study
    if not study.calibrate:
        return None
    name, runs = calibrated(study, cells).name, study.calibrate * study.seeds
    flops = {row["name"]: row["train_flops_per_token"] * row["tokens"] for row in rows}
    tokens = next(row["tokens"] for row in rows if row["name"] == name)
    share = runs * flops[name] / (study.seeds * sum(flops.values()))
    return {"cell": name, "runs": runs, "tokens": runs * tokens, "train_flops": runs * flops[name], "share": share}
