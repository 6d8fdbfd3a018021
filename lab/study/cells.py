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

Override = tuple[tuple[str, object], ...]
NAME = "name"  # a pair of this field names an override; labels may show it like any other field


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


def _joined(overrides) -> Override:
    names = [value for override in overrides for field, value in override if field == NAME]
    pairs = [pair for override in overrides for pair in override if pair[0] != NAME]
    fields = [field for field, _ in pairs]
    for field in fields:
        if fields.count(field) > 1:
            raise UserError(f"a cell sets {field} twice: {[value for name, value in pairs if name == field]}")
    return ((NAME, ",".join(names)), *pairs) if names else tuple(pairs)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One config of a study, by what tells it from the others."""

    name: str
    labels: dict[str, object]
    config: ConfigDict

    @functools.cached_property
    def identity(self) -> dict:
        """The part of the config that a result depends on; the data seed names the run within the cell."""
        rooms = ("model", "data", "train", "evaluate", "mesh")
        seeds = {"model_seed_offset": self.config.model_seed - self.config.seed}
        return seeds | {room: json.loads(self.config[room].to_json_best_effort()) for room in rooms}

    def fingerprint(self, data_fingerprint: str) -> str:
        """Of the cell's config, its data, and the sources that turn the one and the other into a result."""
        return _digest({"config": self.identity, "data": data_fingerprint, "sources": source_fingerprint()})

    def seeded(self, seed: int) -> ConfigDict:
        """The config of one of its runs."""
        config = self.config.copy_and_resolve_references()
        config.model_seed += seed - config.seed
        config.seed = seed
        return config


def resolve(config: ConfigDict, overridden: tuple[str, ...] = ()) -> list[Cell]:
    """The study's cells, with command-line overrides (`overridden`: their fields) already in `config`.

    Raises UserError for an unknown field, two cells that are the same, and an override of what the study varies.
    """
    varied = {field for override in config.study.cells for field, _ in override if field != NAME}
    for field in overridden:
        if field in varied:
            raise UserError(
                f"--config.{field}: the study {config.study.name!r} varies it; leave it out, or edit the study's cells"
            )
    fields = leaves(config)
    cells = []
    for override in config.study.cells or ((),):
        changed = config.copy_and_resolve_references()
        for field, value in override:
            if field != NAME:
                choose("a field of study.cells", field, fields)
                try:
                    set_field(changed, field, value)
                except TypeError:
                    kind = type(fields[field]).__name__
                    raise UserError(f"a cell of the study sets {field} = {value!r}, which is no {kind}") from None
        values = leaves(changed) | {NAME: dict(override).get(NAME, "")}
        labels = {
            label: values[choose("a field of study.labels", field, values)] for field, label in config.study.labels
        }
        spelled = ",".join(f"{label}={value}" for label, value in labels.items())
        cells.append(Cell(spelled or values[NAME] or "base", labels, changed))
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


@functools.cache
def source_fingerprint() -> str:
    """Of the code that makes numbers: data, model, kernels, train, evaluate, and coordinates."""
    lab = pathlib.Path(__file__).resolve().parents[1]
    rooms = [lab / "coordinates.py", *(lab / room for room in ("data", "model", "kernels", "train", "evaluate"))]
    files = sorted(file for room in rooms for file in ([room] if room.is_file() else room.rglob("*.py")))
    return _digest([(str(file.relative_to(lab)), file.read_text()) for file in files])


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
