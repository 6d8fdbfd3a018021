"""What a result depends on, and which finished cells are what is asked for.

A record holds (a) the fields of model, data and train that are read, (b) the training data, (c) digests of the training
step and of the program that draws the initial state, each in one canonical form, and (d) digests of the tables, a few
batches and the learning rates; and a digest of the weights where they are not drawn but read. How a cell runs is not in
it, nor what is asked of it, nor how its code is written.
"""

import functools
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lab import config as lab_config
from lab import data as lab_data
from lab.model.spec import read_by_layers
from lab.options import leaves
from lab.storage import cache_directory, find_json, write_json
from lab.study.define import start
from lab.train import canonical, optimizer
from lab.train.partition import Partition
from lab.train.step import Program

FILE = "identity.json"
# The texts and their tokenizer are in the data's fingerprint, wherever they lie and whatever was left out.
ELSEWHERE = ("data.path", "data.missing", "data.lossy", "data.eos")
PARTS = {"fields", "data", "program", "initial", "tables", "batches", "schedule", "versions"}
WEIGHTS = "weights"  # a part of cells whose weights are read, not drawn
TRACED = ("program", "initial")  # compare under equal versions only
SAMPLED_SEED = 0  # of the batches that are looked at: a cell has many seeds
SAME, OTHER_VERSIONS = "same", "other versions"

Identity = dict[str, Any]


def record(config: ConfigDict, data: lab_data.Data) -> Identity:
    """Of a cell whose config was checked. JSON, and the same in every process."""
    return {
        "fields": fields(config),
        "data": data.fingerprint,
        **_traced(config),
        "batches": _batches(config, data),
        # Six digits: devices and versions of XLA round a cosine otherwise in the last.
        "schedule": _digest([f"{rate:.6g}" for rate in optimizer.schedule(config.train).tolist()]),
        "versions": versions(),
    } | ({WEIGHTS: weights} if (weights := start.digest(config)) else {})


def fields(config: ConfigDict) -> dict[str, Any]:
    """(a): what is read of model, data and train, and how far the seed of the weights is from that of the data."""
    read = {f"model.{name}" for name in set().union(*read_by_layers(config.model))}
    for name in ("data", "train"):
        read |= {f"{name}.{field}" for field in lab_config.ROOMS[name].read(leaves(config[name]))}
    values, elsewhere = leaves(config), {*ELSEWHERE, *["data.tokenizer"] * bool(config.checkpoint)}
    found = {name: values[name] for name in sorted(read - elsewhere)}
    return json.loads(json.dumps(found)) | {"model_seed - seed": config.model_seed - config.seed}


def versions() -> dict[str, str]:
    """Of the libraries that a program's text depends on."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}


def name_of(made: Identity) -> str:
    """Twelve digits for the name of a directory."""
    return _digest(made)[:12]


def compare(asked: Identity, found: Identity) -> str | None:
    """SAME, OTHER_VERSIONS, or None where a record that was found is of something else.

    A field that one of them lacks has its default there: it was declared later.
    """
    defaults = _defaults()
    names = {*asked["fields"], *found["fields"]}
    value = lambda record, name: record["fields"].get(name, defaults.get(name))  # noqa: E731
    if any(value(asked, name) != value(found, name) for name in names):
        return None
    alike = found["versions"] == asked["versions"]
    parts = {*asked, WEIGHTS} - {"fields", "versions"}
    if any(asked.get(name) != found.get(name) for name in parts if alike or name not in TRACED):
        return None
    return SAME if alike else OTHER_VERSIONS


def read(directory: pathlib.Path) -> list[Identity]:
    """The records of a cell, one for each set of versions under which it was made, the oldest first; none where the
    file is damaged: the name of the directory still tells the cell."""
    found = (find_json(directory / FILE) or {}).get("records")
    whole = isinstance(found, list) and all(isinstance(one, dict) and {*one} >= PARTS for one in found)
    return found if whole else []


def records(workdir: pathlib.Path, folder: str = "cells") -> dict[str, list[Identity]]:
    """{directory of a cell, relative to the study's: its records} of all cells in the folder that were begun."""
    found = [path.parent for path in sorted(workdir.glob(f"{folder}/*/{FILE}"))]
    return {directory.relative_to(workdir).as_posix(): read(directory) for directory in found}


def keep(directory: pathlib.Path, made: Identity) -> None:
    """Adds a record to the directory of its cell, unless there is one of its versions."""
    there = read(directory)
    if all(one["versions"] != made["versions"] for one in there):
        write_json(directory / FILE, {"records": [*there, made]})


def find(asked: Identity, there: Mapping[str, list[Identity]], remake: bool = False) -> tuple[str, str] | None:
    """(directory, SAME or OTHER_VERSIONS) of the cell that is what is asked for; None if there is none.

    remake: a cell made under other versions is not.
    """
    compared = {}
    for directory, found in there.items():
        alike = [one for one in found if one["versions"] == asked["versions"]]
        compared[directory] = compare(asked, (alike or found)[-1]) if found else None
    for wanted in (SAME,) if remake else (SAME, OTHER_VERSIONS):
        for directory, answer in compared.items():
            if answer == wanted:
                return directory, answer
    return None


@functools.cache
def _defaults() -> dict[str, Any]:
    """Of every field of model, data and train, as JSON has them."""
    declared = {
        f"{name}.{field}": option.default
        for name in ("model", "data", "train")
        for field, option in lab_config.ROOMS[name].declared().items()
    }
    return json.loads(json.dumps(declared))


def _traced(config: ConfigDict) -> dict[str, str]:
    """(c) and the tables of (d). Tracing takes seconds: what the same code has traced before is kept."""
    read = {name: value for name, value in fields(config).items() if name.startswith("model.")}
    shape = config.data.rows, config.data.texts_per_row * config.data.text_length
    made = repr((Program.of(config), Partition.of(config)))
    key = _digest([_sources(), versions(), read, shape, made])
    path = cache_directory() / "programs" / f"{key}.json"
    if {*(kept := find_json(path) or {})} == {*TRACED, "tables"}:
        return kept
    made = {
        "program": canonical.train_step(config),
        "initial": canonical.initial_state(config),
        "tables": canonical.tables(config),
    }
    write_json(path, made)
    return made


_packed: dict[tuple, str] = {}  # digests of batches: cells of one layout share them


def _batches(config: ConfigDict, data: lab_data.Data) -> str:
    """Of the first and the last batch of one seed, as they are packed."""
    sampled = config.copy_and_resolve_references()
    sampled.seed, sampled.run.workers = SAMPLED_SEED, 0
    key = data.fingerprint, sampled.data.to_json_best_effort(), config.train.steps
    if key not in _packed:
        state = hashlib.blake2b(digest_size=16)
        for step in sorted({0, config.train.steps - 1}) if config.train.steps else ():
            batches = lab_data.train_batches(sampled, data.train, start=step)
            batch, _ = next(batches)
            batches.close()
            for array in jax.tree.leaves(batch):
                state.update(np.ascontiguousarray(array, "<i4").tobytes())
        _packed[key] = state.hexdigest()
    return _packed[key]


@functools.cache
def _sources() -> str:
    """Of all code that a traced program may depend on."""
    lab = pathlib.Path(__file__).resolve().parents[2]
    return _digest([(file.relative_to(lab).as_posix(), file.read_text("utf-8")) for file in sorted(lab.rglob("*.py"))])


def _digest(value) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
