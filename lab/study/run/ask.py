"""Asks a trained run whatever it has not been asked yet, and keeps every row as it is found."""

import math
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from lab import kernels, runtime, watch
from lab.errors import UserError
from lab.evaluate import asks, conditions
from lab.model import mesh as lab_mesh
from lab.model.spec import biased
from lab.study import evaluations, measure
from lab.study.define.asked import wanted
from lab.study.run import log
from lab.study.run.hosts import agreed
from lab.study.run.progress import Display
from lab.study.run.runs import Run
from lab.train import compiled, loop, memory, origin
from lab.train.checkpoint import Unreadable, read_model
from lab.train.partition import Partition


class NoCheckpoint(Exception):
    """A run that is to be asked more has no weights left that can be read."""


def ask(run: Run, display: Display, stop: Callable[[int], bool], trained=None) -> str:
    """Finds what is missing of every ask; returns a line about the first condition of the one named loss.

    trained: the model, where it is in memory; else it has the weights of the run's last checkpoint. Raises
    loop.NonFinite for a loss that is no number, which is not kept, and loop.Stopped: whole conditions are.
    """
    config = run.cell.seeded(run.seed)
    mesh = lab_mesh.make(config.run.mesh)
    model = None if trained is None else compiled.laid(trained, mesh)
    for name, about in wanted(config, run.data).items():
        column = asks.column(config, name)
        found = evaluations.find(run.directory, name, about) or evaluations.begun(name, column, about)
        complete, done = agreed([found["complete"], len(found["conditions"])])
        if complete:
            continue
        watch.begin(run.name, f"asks {name}")
        model = _from_checkpoint(run, config, mesh) if model is None else model
        stopped = lambda: stop(config.train.steps)  # noqa: E731
        options = dict(done=done, stop=stopped, bytes_of_ids=run.data.tokenizer.bytes_of_ids)
        options["tokenizer"] = run.data.tokenizer
        for one in conditions.evaluate(config, name, model, run.data.validation, mesh, **options):
            if not math.isfinite(one.loss):
                raise loop.NonFinite(f"ask {name}, {column} {one.value}: loss {one.loss}", member=0)
            display.condition(column if one.documents is None else f"{name}, {column}", one.value, one.loss)
            _keep(run, config, found, one, mesh)
        if name == asks.LOSS and jax.process_index() == 0:
            log.compare(run, column, found["conditions"])
    return _told(run, config)


def complete(run: Run) -> bool:
    """Whether every ask of a run has all its rows."""
    about = wanted(run.cell.config, run.data)
    return all(evaluations.rows(evaluations.find(run.directory, name, about[name])) for name in about)


def _from_checkpoint(run: Run, config: ConfigDict, mesh):
    model, directory = compiled.described(config, mesh), run.directory / "checkpoints"
    if not config.train.steps:
        return origin.read(origin.of_run(config, directory), model, mesh)
    try:
        if Partition.of(config).partial:
            return origin.read(origin.of_run(config, directory), model, mesh)
        return read_model(directory, model, config.train.steps)
    except Unreadable:
        raise
    except UserError as error:
        raise NoCheckpoint(f"{error}; delete {run.directory} to train it again") from error


def _keep(run: Run, config: ConfigDict, found: dict, one: conditions.Condition, mesh) -> None:
    """Adds a row and writes what there is by now."""
    asked, column = config.evaluate[found["name"]], found["column"]
    row = {column: one.value, "loss": one.loss, "accuracy": one.accuracy, "tokens": one.tokens}
    if one.bytes:
        row |= {"bytes": one.bytes, measure.BITS.column: measure.bits_per_byte(one.loss * one.tokens, one.bytes)}
    row |= one.further
    timing = {
        column: one.value,
        "seconds": one.seconds,
        "tokens_per_second": (one.read or asked.texts * config.data.text_length) / one.seconds,
        "peak_bytes": memory.peak(one.executable),
    }
    found["conditions"].append(row)
    found["timings"].append(timing)
    if one.documents is not None:
        found.setdefault("documents", []).append({column: one.value} | one.documents)
    found["complete"] = len(found["conditions"]) == len(asks.conditions(asked))
    adds = biased(asks.remodelled(config, asked).model)
    implementation = kernels.resolve(config.run.implementation, biased=adds)
    found["environment"] = runtime.environment(mesh) | {"implementation": implementation}
    if jax.process_index() == 0:
        evaluations.save(run.directory, found)


def _told(run: Run, config: ConfigDict) -> str:
    about = wanted(config, run.data)[asks.LOSS]
    rows, column = evaluations.rows(evaluations.find(run.directory, asks.LOSS, about)), asks.column(config)
    if not rows:  # another host keeps them
        return ""
    return f"loss {rows[0]['loss']:.3f}, accuracy {rows[0]['accuracy']:.1%} at {column} {rows[0][column]}"
