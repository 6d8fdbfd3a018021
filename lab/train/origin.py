"""Where weights come from that were not drawn: the checkpoint of a cell, or of an imported model.

A run that trains the whole of its model saves the whole. One that trains a part of it saves that part, and one that
trains nothing saves nothing: its config.json names the checkpoint that it began from, its base.
"""

import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lab.errors import UserError
from lab.model import parameter
from lab.options import leaves
from lab.storage import find_json, local, read_json, told, write_json
from lab.train import checkpoint
from lab.train.partition import Partition, parted, whole

BASE = "base.json"  # beside config.json: a digest of the weights that a run began from


class Origin(NamedTuple):
    """Weights on a disk.

    cell: the directory with config.json, which is `stored`, and the tokenizer; directory: of checkpoints; step: None
    for the newest; base: where the weights are that it does not hold, by `partition`; None where it holds all.
    """

    cell: pathlib.Path
    stored: dict[str, Any]
    directory: pathlib.Path
    step: int | None
    partition: Partition
    base: "Origin | None"


def find(path, base=None) -> Origin:
    """The checkpoint at a path: the directory of a cell (its first seed is taken), of one of its seeds, of one
    checkpoint, or of an imported model. base: where the checkpoint lies now that a partial run names as its base.

    Raises UserError where there is none.
    """
    cell, directory, step = checkpoint.locate(local(path))
    stored = read_json(cell / "config.json")
    fields, partition = leaves(stored), Partition.of(stored)
    untrained = fields.get("checkpoint") and fields.get("train.steps") == 0
    if not untrained and not partition.partial:
        return Origin(cell, stored, directory, step, partition, None)
    under = _base(cell, base or fields.get("checkpoint", ""))
    if untrained:
        return under._replace(cell=cell, stored=stored)
    return Origin(cell, stored, directory, step, partition, under)


def _base(cell: pathlib.Path, path: str) -> Origin:
    kept = find_json(cell / BASE)
    try:
        found = find(path)
        changed = kept is not None and kept.get("weights") != digest(found)
    except UserError as error:
        raise UserError(
            f"{cell} began from weights that it does not hold, and they are no longer where they were ({error}); put "
            "them back, or say where they are: lab.load(path, base=...)"
        ) from None
    if changed:
        raise UserError(
            f"{cell} began from weights that it does not hold, and {path} has others now; put them back, or say where "
            "they are: lab.load(path, base=...)"
        )
    return found


def keep(cell: pathlib.Path, path: str) -> None:
    """Writes down beside a cell which weights it begins from, those at a path."""
    write_json(cell / BASE, {"weights": digest(find(path))})


def pinned(path) -> str:
    """A path, or a URL, at which `find` finds these weights, whatever a run that goes on saves beside them."""
    found = find(path)
    if found.cell not in found.directory.parents:  # it trained nothing, and names where its weights are
        return told(found.cell.absolute())
    return told((found.directory / str(checkpoint.newest(found.directory, found.step)[0])).absolute())


def of_run(config: ConfigDict, directory: pathlib.Path) -> Origin:
    """Of the weights that a finished run of a config with a checkpoint is asked with; directory: of its checkpoints."""
    base, partition = find(config.checkpoint), Partition.of(config)
    if not config.train.steps:
        return base
    return Origin(directory, {}, directory, config.train.steps, partition, base if partition.partial else None)


def digest(origin: Origin) -> str:
    """Of the weights: the same wherever they lie, and however they are called."""
    own = int(checkpoint.newest(origin.directory, origin.step)[1]["weights"])
    under = [digest(origin.base), *origin.partition] if origin.base else []
    return hashlib.blake2b(json.dumps([own, *under]).encode(), digest_size=16).hexdigest()


def read(origin: Origin, like, mesh: Mesh | None = None):
    """`like`, a whole model, with the weights of an origin: those of a partial run put together with their base.

    mesh: over which `like` is laid; None: one device. Raises UserError for weights that are missing, damaged, of other
    shapes, or not those that a partial run was trained upon.
    """
    if origin.base is None:
        return checkpoint.read_model(origin.directory, like, origin.step)
    return _laid(whole(read_parted(origin, like, mesh)), mesh)


def read_parted(origin: Origin, like, mesh: Mesh | None = None):
    """The model of a partial run as it is trained: upon its base, and not put together with it."""
    under = read(origin.base, like, mesh)
    begun = _laid(parted(under, origin.partition, jax.random.key(0)), mesh)
    return checkpoint.read_model(origin.directory, begun, origin.step)


def _laid(model, mesh: Mesh | None):
    return model if mesh is None else jax.device_put(model, parameter.shardings(model, mesh))
