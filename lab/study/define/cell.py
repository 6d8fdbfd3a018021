"""A cell of a study: one config, by what tells it from the others."""

import dataclasses
import json

from ml_collections import ConfigDict

from lab.errors import choose
from lab.options import leaves
from lab.study.define.cells import NAME, RUNG, Override


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

    def described(self) -> dict:
        """The config as JSON keeps it."""
        return json.loads(self.config.to_json_best_effort())

    def seeded(self, seed: int) -> ConfigDict:
        """The config of one of its runs."""
        config = self.config.copy_and_resolve_references()
        config.model_seed += seed - config.seed
        config.seed = seed
        return config


def labels(study: ConfigDict) -> tuple[tuple[str, str], ...]:
    """(field, label), ... of a study: its own, and last the rung where it has rungs."""
    return (*study.labels, *[(RUNG, RUNG)] * bool(study.rungs))


def make(study: ConfigDict, override: Override, config: ConfigDict, matches=(), length=None) -> Cell:
    """The cell of a config, under the study's labels."""
    pseudo = {NAME: ""} | {field: value for field, value in override if field in (NAME, RUNG)}
    values = leaves(config) | pseudo
    found = {label: values[choose("a field of study.labels", field, values)] for field, label in labels(study)}
    spelled = ",".join(f"{label}={value}" for label, value in found.items())
    return Cell(spelled or values[NAME] or "base", found, config, values[NAME], matches, length)
