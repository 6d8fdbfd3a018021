"""The cells of a study: plain overrides of one base config, made by combinators, and what each becomes.

An override is a tuple of (field, value) pairs; combinators take and give tuples of overrides:
product(vary("model.rotary.ratio", (0.0, 1.0)), vary("data.draw", ("fixed1", "1-15"))) is four cells.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re

from ml_collections import ConfigDict

from lab.config import leaves, set_field
from lab.errors import UserError, choose

ELSEWHERE = ("path", "workers")  # of config.data: the texts themselves are in its fingerprint, wherever they lie
Override = tuple[tuple[str, object], ...]
NAME = "name"  # a pair of this field names an override; labels may show it like any other field
MATCH = "match"  # a pair of this field asks for a field to be solved: see `matched`


def vary(field: str, values) -> tuple[Override, ...]:
    """One override for each value of a field."""
    return tuple(((field, value),) for value in values)


def product(*groups: tuple[Override, ...]) -> tuple[Override, ...]:
    """Every combination, the last group fastest."""
    return tuple(_joined(combination) for combination in itertools.product(*groups))


def chain(*groups: tuple[Override, ...]) -> tuple[Override, ...]:
    """One group after another."""
    return tuple(itertools.chain(*groups))


def zipped(*groups: tuple[Override, ...]) -> tuple[Override, ...]:
    """The first of each group together, the second of each, ...; the groups are equally long."""
    return tuple(_joined(row) for row in zip(*groups, strict=True))


def named(name: str, *pairs: tuple[str, object]) -> tuple[Override, ...]:
    """One override of several fields under a name."""
    return (((NAME, name), *pairs),)


def matched(group: tuple[Override, ...], *, to, on: str, by: str, multiple: int = 1) -> tuple[Override, ...]:
    """The overrides, each matched to another cell: the multiple of `multiple` that brings `on` nearest is found for the
    integer field `by`. matched(named("relu", ...), to="base", on="parameters", by="model.ffn", multiple=8).

    to: the name of a cell, or pairs (label, value) that the other cell has instead of this one's.
    on: parameters | train_flops (of a token) | cache (of a token, all layers).
    """
    match = (("to", to), ("on", on), ("by", by), ("multiple", multiple))
    return tuple((*override, (MATCH, match)) for override in group)


def _joined(overrides) -> Override:
    names = [value for override in overrides for field, value in override if field == NAME]
    pairs = [pair for override in overrides for pair in override if pair[0] != NAME]
    fields = [field for field, _ in pairs if field != MATCH]
    for field in fields:
        if fields.count(field) > 1:
            raise UserError(f"a cell sets {field} twice: {[value for name, value in pairs if name == field]}")
    return ((NAME, ",".join(names)), *pairs) if names else tuple(pairs)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One config of a study, by what tells it from the others.

    given_name: of its override. matches, length: what was solved, as rows of the plan.
    """

    name: str
    labels: dict[str, object]
    config: ConfigDict
    given_name: str = ""
    matches: tuple[dict, ...] = ()
    length: dict | None = None

    @functools.cached_property
    def identity(self) -> dict:
        """The part of the config that a result depends on; the data seed names the run within the cell."""
        rooms = ("model", "data", "train", "evaluate", "mesh")
        seeds = {"model_seed_offset": self.config.model_seed - self.config.seed}
        found = {room: json.loads(self.config[room].to_json_best_effort()) for room in rooms}
        for field in ELSEWHERE:
            del found["data"][field]
        return seeds | found

    def fingerprint(self, data_fingerprint: str) -> str:
        """Of the cell's config, its data, and the sources that turn the one and the other into a result."""
        return _digest({"config": self.identity, "data": data_fingerprint, "sources": source_fingerprint()})

    def described(self) -> dict:
        """The config as JSON keeps it."""
        return json.loads(self.config.to_json_best_effort())

    def seeded(self, seed: int) -> ConfigDict:
        """The config of one of its runs."""
        config = self.config.copy_and_resolve_references()
        config.model_seed += seed - config.seed
        config.seed = seed
        return config


def resolve(config: ConfigDict, overridden: tuple[str, ...] = ()) -> list[Cell]:
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
    cells = [_cell(config.study, override, _changed(config, override)) for override in overrides]
    if config.study.length != "steps" or any(field == MATCH for override in overrides for field, _ in override):
        from lab.study import matching  # which needs the model: configs import this module before JAX may start

        solutions = matching.solve(config.study, cells, overrides)
        cells = [_cell(config.study, o, *solution) for o, solution in zip(overrides, solutions, strict=True)]
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


def _cell(study: ConfigDict, override: Override, config: ConfigDict, matches=(), length=None) -> Cell:
    """The cell of a config, under the study's labels."""
    values = leaves(config) | {NAME: dict(override).get(NAME, "")}
    labels = {label: values[choose("a field of study.labels", field, values)] for field, label in study.labels}
    spelled = ",".join(f"{label}={value}" for label, value in labels.items())
    return Cell(spelled or values[NAME] or "base", labels, config, values[NAME], matches, length)


@functools.cache
def source_fingerprint() -> str:
    """Of the code that makes numbers: data, model, kernels, train, evaluate, and coordinates."""
    lab = pathlib.Path(__file__).resolve().parents[1]
    rooms = [lab / "coordinates.py", *(lab / room for room in ("data", "model", "kernels", "train", "evaluate"))]
    files = sorted(file for room in rooms for file in ([room] if room.is_file() else room.rglob("*.py")))
    return _digest([(str(file.relative_to(lab)), file.read_text()) for file in files])


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
