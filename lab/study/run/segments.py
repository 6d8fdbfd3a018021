"""The segments of a run: from which step on it was made in which way, and on what.

The bits of a result are promised within one kind of segment. A run may go on in another way, which begins a new one.
"""

import importlib.metadata
import pathlib

from ml_collections import ConfigDict

from lab import kernels, runtime
from lab.config import ROUNDING
from lab.model.spec import biased
from lab.options import leaves
from lab.storage import find_json, write_json
from lab.train import dropout

FILE = "segments.json"
MADE_ON = ("platform", "device_kind", "devices", "processes", "jax", "jaxlib")  # of runtime.environment


def way(config: ConfigDict, mesh, members: int) -> dict:
    """How a step is made here: the run fields that round, as they were resolved, and the machine. JSON."""
    asked, made = leaves(config.run), runtime.environment(mesh)
    fields = {name: asked[name] for name in ROUNDING if not name.startswith("mesh.")}
    needs = dict(biased=biased(config.model), dropping=dropout.of_attention(config.train))
    return {
        **fields,
        "implementation": kernels.resolve(config.run.implementation, **needs),
        "mesh": dict(mesh.shape),
        "vmapped": members > 1 and members,
        **{name: made[name] for name in MADE_ON},
        **{name: importlib.metadata.version(name) for name in ("flax", "optax")},
    }


def begin(directory: pathlib.Path, step: int, here: dict) -> str:
    """Notes in a run's directory that its steps from `step` on are made `here`; says so if the ones before were not."""
    path = directory / FILE
    kept = [one for one in read(directory) if one["first_step"] < step]
    before = kept[-1] if kept else None
    changed = {name: value for name, value in here.items() if before and before.get(name) != value}
    if before is None or changed:
        write_json(path, {"segments": [*kept, {"first_step": step, **here}]})
    elif len(kept) < len(read(directory)):
        write_json(path, {"segments": kept})
    if not changed:
        return ""
    told = ", ".join(f"{name} {before.get(name)} -> {value}" for name, value in changed.items())
    return f"goes on from step {step} in another way ({told}): a new segment, which is paired with none but its like"


def read(directory: pathlib.Path) -> list[dict]:
    """The segments of a run so far; none where the file is damaged, so that the run is paired with no other."""
    found = (find_json(directory / FILE) or {}).get("segments")
    whole = isinstance(found, list) and all(isinstance(one, dict) and "first_step" in one for one in found)
    return found if whole else []
