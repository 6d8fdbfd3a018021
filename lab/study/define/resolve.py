"""What the overrides of a study become: its cells, everything solved that they ask to be matched."""

import itertools
import re

from ml_collections import ConfigDict

from lab import config as lab_config
from lab.errors import UserError, choose
from lab.model import spec as lab_spec
from lab.options import Option, leaves, names_of, set_field
from lab.study.define import cell, matching
from lab.study.define.cells import ASIDE, MATCH, NAME, PSEUDO, Override, laid

NAMES = Option("", "of an override: see lab.study.define.cells.named")
READ = ("model", "data", "train")  # the rooms of which a cell reads what its entries read


def resolve(config: ConfigDict, overridden: tuple[str, ...] = ()) -> list[cell.Cell]:
    """The study's cells, with command-line overrides (`overridden`: their fields) already in `config`.

    Raises UserError for an unknown field, two cells that are the same, an override of what the study varies, and a
    match that cannot be made.
    """
    _check_rungs(config)
    overrides = laid(config.study.cells, config.study.rungs) or ((),)
    for name in (value for override in overrides for field, value in override if field == NAME):
        NAMES.check("a name in study.cells", name)
    varied = {field for override in overrides for field, _ in override if field not in PSEUDO}
    for field in overridden:
        if field in varied:
            raise UserError(
                f"--config.{field}: the study {config.study.name!r} varies it; leave it out, or edit the study's cells"
            )
    if config.checkpoint and "data.tokenizer" in varied:
        raise UserError("the study varies data.tokenizer, and config.checkpoint has one of its own; leave one out")
    configs = [_changed(config, override) for override in overrides]
    _forget_unread(config, overrides, configs)
    cells = [cell.make(config.study, *pair) for pair in zip(overrides, configs, strict=True)]
    if config.study.length != "steps" or any(field == MATCH for override in overrides for field, _ in override):
        solutions = matching.solve(config.study, cells, overrides)
        cells = [cell.make(config.study, o, *solution) for o, solution in zip(overrides, solutions, strict=True)]
    for one, other in itertools.combinations(cells, 2):
        if one.name == other.name:
            raise UserError(
                f"two cells of the study are named {one.name!r}; study.labels or a name must tell them apart"
            )
    return cells


def share(text: str) -> slice:
    """The part of a study that "I/N" names: every N-th of its cells, from the I-th."""
    part = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", text)
    if not part or int(part[1]) > int(part[2]):
        raise UserError(f"--cells={text!r} is no share; choose I/N with 1 <= I <= N, as in 1/4")
    return slice(int(part[1]) - 1, None, int(part[2]))


def _check_rungs(config: ConfigDict) -> None:
    """Refuses a rung that sets what is no field; what a field may be is checked where the rung is laid over a cell."""
    fields = leaves(config)
    for name, pairs in config.study.rungs:
        for field, _ in pairs:
            choose(f"a field of the rung {name!r} of study.rungs", field, fields)


def _changed(config: ConfigDict, override: Override) -> ConfigDict:
    """The base config with an override laid over it, matches left open."""
    fields = leaves(config)
    changed = config.copy_and_resolve_references()
    for field, value in override:
        if field not in PSEUDO:
            choose("a field of study.cells", field, fields)
            if field == "checkpoint":
                raise UserError(
                    "the study varies checkpoint, whose model is that of all cells; run it once on each, with "
                    "--config.checkpoint=DIR and a --workdir of its own, and compare with python -m lab.report A B"
                )
            if field.split(".")[0] in ASIDE:
                raise UserError(
                    f"the study varies {field}: how a cell runs and what it is asked are no part of what it is, so two "
                    f"cells would share their results; set it for all with --config.{field}=..."
                )
            try:
                set_field(changed, field, value)
            except TypeError:
                kind = type(fields[field]).__name__
                raise UserError(f"a cell of the study sets {field} = {value!r}, which is no {kind}") from None
    return changed


def _forget_unread(config: ConfigDict, overrides: tuple[Override, ...], configs: list[ConfigDict]) -> None:
    """Gives back their defaults to the fields of each cell that nothing of it reads, if another cell reads them.

    So a study may set for all cells what only some have a use for. Raises UserError for a field that a cell sets
    itself and does not read, and for one that the study sets and no cell reads.
    """
    declared = {name: lab_config.ROOMS[name].declared() for name in READ}
    read = [{name: _read(changed, name) for name in READ} for changed in configs]
    for name in READ:
        every = set().union(*(of_cell[name] for of_cell in read))
        for override, changed, of_cell in zip(overrides, configs, read, strict=True):
            for field, value in leaves(changed[name]).items():
                own = f"{name}.{field}" in names_of(override)
                if field in of_cell[name] or value == declared[name][field].default or (not own and field not in every):
                    continue  # fields that no cell reads are refused where a cell is checked
                if own:
                    raise lab_config.ROOMS[name].unread(leaves(changed[name]), field, f"{name}.")
                set_field(changed[name], field, declared[name][field].default)


def _read(config: ConfigDict, name: str) -> set[str]:
    if name == "model":
        return set().union(*lab_spec.meant_by_layers(config.model))
    return lab_config.ROOMS[name].read(leaves(config[name]), f"{name}.")
