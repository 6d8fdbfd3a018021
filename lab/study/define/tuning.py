"""Fair tuning: the grid on which every cell is tried, with the same budget, on one seed."""

import dataclasses
import itertools

from ml_collections import ConfigDict

from lab.errors import UserError, choose
from lab.options import leaves, set_field
from lab.study.define.cell import Cell

COMPUTED = ("model.", "data.", "train.")  # the rooms that make a cell what it is


def points(config: ConfigDict, cells: list[Cell]) -> list[dict[str, object]]:
    """The points of config.study.tune, each {field: value}. None where nothing is tuned.

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
        if not field.startswith(COMPUTED):
            raise UserError(f"study.tune names {field}, which is no part of what a cell computes; tune another field")
        if field == "data.tokenizer":
            raise UserError(
                "study.tune names data.tokenizer: losses per token of two tokenizers do not compare; vary it"
            )
        if len(set(values)) < len(values):
            raise UserError(f"study.tune has a value of {field} twice: {tuple(values)}")
        if len({repr(leaves(cell.config)[field]) for cell in cells}) > 1:
            raise UserError(
                f"study.tune names {field}, which the study's cells vary; tune another field, or do not vary it"
            )
    return [dict(point) for point in itertools.product(*([(field, v) for v in values] for field, values in study.tune))]


def with_values(cell: Cell, values: dict[str, object]) -> Cell:
    """The cell with some fields set."""
    config = cell.config.copy_and_resolve_references()
    for field, value in values.items():
        try:
            set_field(config, field, value)
        except TypeError:
            raise UserError(f"study.tune sets {field} = {value!r}, which is of another type") from None
    return dataclasses.replace(cell, config=config)
