"""What was asked of a run and what was found, as its directory keeps it: evaluations/<name>-<digest>.json.

A file holds what its rows depend on (`parts`), the versions that made it, and the rows found so far. It is what is
asked for if all parts are the same; a complete one that was made under other versions of jax, flax or optax need not
have the same `program`, whose text depends on them.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from lab.storage import find_json, write_json

LOSS = "loss"  # that of lab.evaluate.asks, without what it imports
DIRECTORY = "evaluations"
TRACED = ("program",)  # parts that compare under equal versions only


def begun(name: str, column: str, wanted: Mapping) -> dict:
    """An evaluation without rows. wanted: {"parts", "versions"}, all of it JSON."""
    return {"name": name, "column": column, **wanted, "complete": False, "conditions": [], "timings": []}


def find(run: Path, name: str, wanted: Mapping) -> dict | None:
    """The evaluation of a run that is what is wanted, complete or not; None if there is none that is whole."""
    there = [found for path in sorted((run / DIRECTORY).glob(f"{name}-*.json")) if _whole(found := find_json(path))]
    for fits in (_same, _of_other_versions):
        for found in there:
            if found["name"] == name and fits(found, wanted):
                return found
    return None


def save(run: Path, evaluation: Mapping) -> None:
    """Writes it whole, in the place of what was found before."""
    text = json.dumps([evaluation["parts"], evaluation["versions"]], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    write_json(run / DIRECTORY / f"{evaluation['name']}-{digest}.json", evaluation)


def rows(evaluation: Mapping | None) -> list[dict]:
    """{column: value, loss, accuracy, tokens} by condition, once all are found; and bytes and bits_per_byte, where the
    tokenizer counts bytes."""
    return evaluation["conditions"] if evaluation and evaluation["complete"] else []


def _whole(found: Mapping | None) -> bool:
    """Whether a file holds an evaluation, every loss of it a number: others were once kept."""
    if found is None or not {*begun("", "", {"parts": {}, "versions": {}})} <= {*found}:
        return False
    if not isinstance(found["conditions"], list) or not all(isinstance(row, dict) for row in found["conditions"]):
        return False
    numbers = [row.get("loss") for row in found["conditions"] if str(found["column"]) in row]
    finite = [isinstance(number, int | float) and math.isfinite(number) for number in numbers]
    return len(finite) == len(found["conditions"]) and all(finite)


def _same(found: Mapping, wanted: Mapping) -> bool:
    return all(found[key] == wanted[key] for key in ("parts", "versions"))


def _of_other_versions(found: Mapping, wanted: Mapping) -> bool:
    lasting = [{name: part for name, part in one["parts"].items() if name not in TRACED} for one in (found, wanted)]
    return found["complete"] and found["versions"] != wanted["versions"] and lasting[0] == lasting[1]
