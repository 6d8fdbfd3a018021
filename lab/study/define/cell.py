"""A cell of a study: one config, by what tells it from the others, and what its results depend on."""

import dataclasses
import functools
import hashlib
import json
import pathlib

from ml_collections import ConfigDict

from lab.errors import choose
from lab.options import leaves
from lab.study.define.cells import NAME, Override

ELSEWHERE = ("path",)  # of config.data: the texts themselves are in its fingerprint, wherever they lie


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
        rooms = ("model", "data", "train", "evaluate")
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


def make(study: ConfigDict, override: Override, config: ConfigDict, matches=(), length=None) -> Cell:
    """The cell of a config, under the study's labels."""
    values = leaves(config) | {NAME: dict(override).get(NAME, "")}
    labels = {label: values[choose("a field of study.labels", field, values)] for field, label in study.labels}
    spelled = ",".join(f"{label}={value}" for label, value in labels.items())
    return Cell(spelled or values[NAME] or "base", labels, config, values[NAME], matches, length)


@functools.cache
def source_fingerprint() -> str:
    """Of the code that makes numbers: data, model, kernels, train, evaluate, and coordinates."""
    lab = pathlib.Path(__file__).resolve().parents[2]
    rooms = [lab / "coordinates.py", *(lab / room for room in ("data", "model", "kernels", "train", "evaluate"))]
    files = sorted(file for room in rooms for file in ([room] if room.is_file() else room.rglob("*.py")))
    return _digest([(str(file.relative_to(lab)), file.read_text()) for file in files])


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
