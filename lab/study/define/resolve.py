"""What the overrides of a study become: its cells, everything solved that they ask to be matched."""

import itertools
import re

from ml_collections import ConfigDict

from lab.config import leaves, set_field
from lab.errors import UserError, choose
from lab.study.define import cell, matching
from lab.study.define.cells import MATCH, NAME, Override


def resolve(config: ConfigDict, overridden: tuple[str, ...] = ()) -> list[cell.Cell]:
    """The study's cells, with command-line overrides (`overridden`: their fields) already in `config`.

    Raises UserError for an unknown field, two cells that are the same, an override of what the study varies, and a
    match that cannot be made.
    """
    overrides = config.study.cells or ((),)
    varied = {field for override in overrides for field, _ in override if field not in (NAME, MATCH)}
    for field in overridden:
        if field in varied:
            raise UserError(
                f"--config.{field}: the study {config.study.name!r} varies it; leave it out, or edit the study's cells"
            )
    cells = [cell.make(config.study, override, _changed(config, override)) for override in overrides]
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
    part = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not part or int(part[1]) > int(part[2]):
        raise UserError(f"--cells={text!r} is no share; choose I/N with 1 <= I <= N, as in 1/4")
    return slice(int(part[1]) - 1, None, int(part[2]))


def _changed(config: ConfigDict, override: Override) -> ConfigDict:
    """The base config with an override laid over it, matches left open."""
    fields = leaves(config)
    changed = config.copy_and_resolve_references()
    for field, value in override:
        if field not in (NAME, MATCH):
            choose("a field of study.cells", field, fields)
            try:
                set_field(changed, field, value)
            except TypeError:
                kind = type(fields[field]).__name__
                raise UserError(f"a cell of the study sets {field} = {value!r}, which is no {kind}") from None
    return changed
