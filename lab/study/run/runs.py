"""The runs of a study: every seed of every cell, where each leaves its files, and what is trained at once."""

import collections
import dataclasses
import hashlib
import json
import pathlib
import socket
import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import lab
from lab import data as lab_data
from lab import kernels
from lab import model as lab_model
from lab.errors import UserError
from lab.evaluate import asks, ready
from lab.model import mesh as lab_mesh
from lab.storage import find_json, write_json
from lab.study import measure, results
from lab.study.define import asked, contrasts, identity, plan, start
from lab.study.define.cell import Cell, labels
from lab.study.run import places, segments
from lab.train import canonical, dropout, partition


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One seed of a cell, and where it leaves its files."""

    cell: Cell
    seed: int
    identity: identity.Identity  # of the cell
    data: lab_data.Data
    directory: pathlib.Path
    baseline: Cell | None = None  # what the study compares it with
    note: str = ""  # what tells a trial from the other runs of its cell

    @property
    def place(self) -> str:
        """The directory of its cell, relative to the study's."""
        return "/".join(self.directory.parts[-3:-1])

    @property
    def name(self) -> str:
        return f"{self.cell.name} seed {self.seed}" + (f" ({self.note})" if self.note else "")


Unit = tuple[Run, ...]  # trained by one program


CORPUS_FIELDS = (
    *("corpus", "path", "field", "missing", "tokenizer", "eos", "lossy"),
    *("text_length", "text_bytes", "long_texts", "texts"),
)


def _open_data(cells: list[Cell]) -> list[lab_data.Data]:
    """The data of each cell; cells that read the same share it."""
    opened: dict[tuple, lab_data.Data] = {}
    keys = [
        (*(c.config.data[f] for f in CORPUS_FIELDS), c.config.model.vocabulary, _sizes_of_asks(c.config)) for c in cells
    ]
    for key, cell in zip(keys, cells, strict=True):
        if key not in opened:
            opened[key] = lab_data.open(cell.config)
    return [opened[key] for key in keys]


def _sizes_of_asks(config: ConfigDict) -> tuple:
    return tuple((ask.texts, ask.texts_per_row, ask.rows) for ask in config.evaluate.values())


def runs_of(cells: list[Cell], seeds: Sequence[int], workdir: pathlib.Path, remake: bool = False) -> list[Run]:
    """Every cell with every seed, in the order of the cells, each where its files lie or will lie.

    remake: cells that were made under other versions of the libraries are made again. Raises UserError for what shows
    once the data is read.
    """
    for cell in cells:
        start.check_brought(cell.config)
        partition.check_begun(cell.config)
    opened = _open_data(cells)
    filled = [asks.filled(cell.config, data.validation) for cell, data in zip(cells, opened, strict=True)]
    cells = [dataclasses.replace(cell, config=config) for cell, config in zip(cells, filled, strict=True)]
    for cell, data in zip(cells, opened, strict=True):
        ready.check(cell.config, data)
    by_name = {cell.name: cell for cell in cells}
    pairs = contrasts.settings(cells[0].config.study).baseline if cells else ()
    against = contrasts.baselines({name: cell.labels for name, cell in by_name.items()}, pairs)
    there, runs, taken = identity.records(workdir), [], {}
    for cell, data in zip(cells, opened, strict=True):
        made = identity.record(cell.config, data)
        directory = place(cell, made, there, remake, "cells")
        if taken.setdefault(directory, cell) is not cell:
            raise UserError(f"the cells {taken[directory].name!r} and {cell.name!r} compute the same; leave one out")
        for seed in seeds:
            run = workdir / directory / f"seed-{seed}"
            runs.append(Run(cell, seed, made, data, run, by_name.get(against.get(cell.name))))
    return runs


def place(
    cell: Cell, made: identity.Identity, there: dict[str, list[identity.Identity]], remake: bool, folder: str
) -> str:
    """The directory of a cell, relative to the study's: one of those that are there, or one in the folder."""
    found = identity.find(made, there, remake)
    return found[0] if found else f"{folder}/{_file_name(cell.name)}-{identity.name_of(made)}"


def _file_name(name: str) -> str:
    """As much of a cell's name as a directory can carry; the identity behind it is what tells cells apart."""
    encoding = sys.getfilesystemencoding()
    plain = "".join(letter if letter.isprintable() and letter != "/" else "_" for letter in name)
    return plain.encode(encoding, "replace")[: plan.LONGEST_NAME].decode(encoding, "ignore")


def units_of(runs: list[Run], vmap: str) -> list[Unit]:
    """What is trained at once: a run, or (study.vmap) the seeds of a cell or the cells of a seed. All cells of a seed
    come before the next seed, so that what is there compares them."""
    if vmap == "none":
        return [(run,) for run in sorted(runs, key=lambda run: run.seed)]
    units: dict[tuple, list[Run]] = {}
    for run in runs:
        config = run.cell.config
        alike = run.place if vmap == "seeds" else (run.seed, config.train.steps, plan.program(config))
        units.setdefault(alike, []).append(run)
    return [tuple(unit) for unit in units.values()]


def write_plan(
    workdir: pathlib.Path,
    config: ConfigDict,
    rows: list[dict],
    runs: list[Run],
    tuning: list[dict],
    command: str,
    attention: dict | None = None,
    calibration: Sequence[dict] = (),
) -> None:
    """plan.json: what the study is, for the report and for whoever finds the directory. Refuses another study's."""
    path, looks = workdir / "plan.json", places.check(workdir, config).get("looks") or []
    looks = [look for look in looks if isinstance(look, dict) and "seeds" in look]
    of_cell: dict[str, list[Run]] = {}
    for run in runs:
        of_cell.setdefault(run.cell.name, []).append(run)
    cells = [
        row
        | {
            "identity": identity.name_of(of_cell[row["name"]][0].identity),
            "directory": of_cell[row["name"]][0].place,
            "seeds": [run.seed for run in of_cell[row["name"]]],
            "asks": asked.wanted(of_cell[row["name"]][0].cell.config, of_cell[row["name"]][0].data),
        }
        for row in rows
    ]
    judged = measure.of_cells(rows)
    if judged is not measure.NATS:
        cells = [cell | {"reads": _reads(of_cell[cell["name"]][0])} for cell in cells]
    study = config.study
    written = {
        "study": study.name,
        "question": study.question,
        "labels": [list(pair) for pair in labels(study)],
        "condition": asks.column(config),
        "asks": {name: asks.column(config, name) for name in config.evaluate},
        "sections": list(study.sections),
        "published": study.published,
        "command": command,
        "config": json.loads(config.to_json_best_effort()),
        "tuning": tuning,
        "calibration": list(calibration),
        "attention": attention,
        "looks": looks,
        "cells": cells,
    } | ({measure.FIELD: judged.column} if judged is not measure.NATS else {})
    with places.writable(workdir):
        write_json(path, written)
        for several in of_cell.values():
            _mend(several[0])


def _reads(run: Run) -> dict:
    """The texts of a training step and their bytes, as many as the texts have in the mean."""
    texts = run.cell.config.data.rows * run.cell.config.data.texts_per_row
    return {"texts": texts, "size": texts * run.data.train.mean_bytes}


def _mend(run: Run) -> None:
    """Writes again what a cell that was begun has lost of the files that say what it is."""
    cell = run.directory.parent
    if cell.is_dir() and not identity.read(cell):
        identity.keep(cell, run.identity)
    if cell.is_dir() and not find_json(cell / "config.json"):
        write_json(cell / "config.json", run.cell.described())


def note_look(workdir: pathlib.Path) -> None:
    """Adds to plan.json that the whole study was there to be read, with its number of seeds, unless the last look did.

    Seeds that are added after a look are not what was planned; the report says so.
    """
    path = workdir / "plan.json"
    there = results.read_plan(path)
    looks, look = there.get("looks") or [], {"seeds": there["config"]["study"]["seeds"]}
    every = all(run.status != "pending" for run in results.collect(workdir).runs)
    if every and looks[-1:] != [look]:
        write_json(path, there | {"looks": [*looks, look]})


def made_elsewhere(runs: list[Run]) -> str:
    """How many finished runs were made under which other versions of the libraries; "" if none."""
    counted = collections.Counter()
    for run in runs:
        if results.trained(run.directory):
            made = segments.read(run.directory)[-1:] or [{}]
            counted[", ".join(f"{name} {made[0].get(name)}" for name in identity.versions())] += 1
    here = ", ".join(f"{name} {version}" for name, version in identity.versions().items())
    told = [f"{count} made under {made}" for made, count in counted.items() if made != here]
    return f"{'; '.join(told)}, and this is {here}: they are kept; --remake makes them again" if told else ""


def check_devices(runs: list[Run]) -> None:
    """Refuses cells whose attention, mesh or batches do not fit the devices at hand."""
    for config in (run.cell.config for run in runs):
        needs = dict(biased=asks.adds_to_scores(config), dropping=dropout.of_attention(config.train))
        kernels.resolve(config.run.implementation, **needs)
        check_mesh(config, lab_mesh.make(config.run.mesh))
        for name, ask in config.evaluate.items():
            if asks.ASKS[ask.kind].decode and (hosts := jax.process_count()) > 1:
                raise UserError(f"evaluate.{name} decodes, which one host does, and these are {hosts}; ask it on one")


def check_mesh(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Refuses a mesh that does not divide the batches of a cell, or the heads of its model."""
    rows, length = config.data.rows // config.run.microbatches, config.data.texts_per_row * config.data.text_length
    lab_mesh.check_rows(mesh, "data.rows / run.microbatches", rows, length)
    for name, ask in config.evaluate.items():
        if asks.ASKS[ask.kind].row_length or not asks.ASKS[ask.kind].decode:
            lab_mesh.check_rows(mesh, f"evaluate.{name}.rows", ask.rows, asks.tokens_at_once(config, ask))
    if mesh.shape["tensor"] > 1:
        _check_heads(config, mesh, rows, length)


_divided: set[tuple] = set()  # models whose heads a mesh divides: seeds and cells share them


def _check_heads(config: ConfigDict, mesh: jax.sharding.Mesh, rows: int, length: int) -> None:
    """Raises what the model does that attends over such a mesh: it is traced, and nothing is computed."""
    key = config.model.to_json_best_effort(), mesh
    if key in _divided:
        return
    config = canonical.canonical(config)
    model, batch = lab_model.abstract(config.model, config.run), canonical.batch_of(rows, length)
    with jax.set_mesh(mesh), kernels.recorded():
        jax.eval_shape(lambda model, batch: model(batch.tokens, batch.coordinates), model, batch)
    _divided.add(key)


def check_hosts_agree(runs: list[Run]) -> None:
    """Stops hosts that hold other code, data or configs: they would silently train something else, or wait forever.
    Of many that differ from process 0 the first is named."""
    if jax.process_count() == 1:
        return
    told = {
        "config": [(run.name, run.cell.config.to_json_best_effort()) for run in runs],
        "data": [(run.data.fingerprint, run.data.validation_fingerprint) for run in runs],
        "code": [(run.place, run.identity) for run in runs] + [_code(), identity.versions()],
    }
    ours = [np.frombuffer(hashlib.sha256(json.dumps(part).encode()).digest(), np.uint8) for part in told.values()]
    name = socket.gethostname().encode()[:255]
    ours.append(np.frombuffer(name.ljust(256, b"\0"), np.uint8))
    found = multihost_utils.process_allgather(np.concatenate(ours))
    hosts = [bytes(row[-256:].tolist()).rstrip(b"\0").decode(errors="replace") for row in found]
    for process, row in enumerate(found):
        for at, part in enumerate(told):
            if (row != found[0])[32 * at : 32 * at + 32].any():
                raise UserError(
                    f"process {process} on host {hosts[process]} has other {part} than process 0 on {hosts[0]}; give "
                    "all hosts the same command and the same files"
                )


def _code() -> str:
    """A digest of the lab's own sources: what differs in them may send hosts apart at any later step."""
    folder = pathlib.Path(lab.__file__).parent
    files = sorted(folder.rglob("*.py"))
    return hashlib.sha256(b"".join(str(x.relative_to(folder)).encode() + x.read_bytes() for x in files)).hexdigest()
