"""Runs a study: every cell and seed that has no result yet, one after another, each leaving its result behind."""

import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lab import data as lab_data
from lab import kernels, runtime
from lab.errors import UserError
from lab.evaluate import conditions
from lab.model import mesh as lab_mesh
from lab.model import parameter
from lab.study.cells import Cell
from lab.study.progress import Display
from lab.study.results import write_atomically
from lab.train import loop
from lab.train.checkpoint import Checkpoints


class Run(NamedTuple):
    """One seed of a cell, and where it leaves its files."""

    cell: Cell
    seed: int
    fingerprint: str
    data: lab_data.Data
    directory: pathlib.Path

    @property
    def name(self) -> str:
        return f"{self.cell.name} seed {self.seed}"


class Summary(NamedTuple):
    """How a study ended."""

    done: int
    new: int
    failed: int


CORPUS_FIELDS = ("corpus", "path", "field", "tokenizer", "text_length", "long_texts", "texts")


def _open_data(cells: list[Cell]) -> list[lab_data.Data]:
    """The data of each cell; cells that read the same share it."""
    opened: dict[tuple, lab_data.Data] = {}
    keys = [
        (*(c.config.data[f] for f in CORPUS_FIELDS), c.config.model.vocabulary, c.config.evaluate.texts) for c in cells
    ]
    for key, cell in zip(keys, cells, strict=True):
        if key not in opened:
            opened[key] = lab_data.open(cell.config)
    return [opened[key] for key in keys]


def runs_of(cells: list[Cell], seeds: int, workdir: pathlib.Path) -> list[Run]:
    """Every run of the study, in the order of its cells."""
    runs = []
    for cell, data in zip(cells, _open_data(cells), strict=True):
        fingerprint = cell.fingerprint(data.fingerprint)
        for seed in range(seeds):
            directory = workdir / cell_directory(cell, fingerprint) / f"seed-{seed}"
            runs.append(Run(cell, seed, fingerprint, data, directory))
    return runs


def cell_directory(cell: Cell, fingerprint: str) -> str:
    return f"cells/{cell.name.replace('/', '_')}-{fingerprint}"


def write_plan(workdir: pathlib.Path, config: ConfigDict, rows: list[dict], runs: list[Run], command: str) -> None:
    """plan.json: what the study is, for the report and for whoever finds the directory. Refuses another study's."""
    path = workdir / "plan.json"
    if path.exists():
        there = json.loads(path.read_text())["study"]
        if there != config.study.name:
            raise UserError(
                f"--workdir={workdir} holds the study {there!r}, not {config.study.name!r}; choose another directory"
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"--workdir={workdir} holds other files and no study; choose an empty or new directory")
    of_cell = {run.cell.name: run for run in runs}
    seeds = list(range(config.study.seeds))
    cells = [
        row
        | {
            "fingerprint": of_cell[row["name"]].fingerprint,
            "directory": cell_directory(of_cell[row["name"]].cell, of_cell[row["name"]].fingerprint),
            "seeds": seeds,
        }
        for row in rows
    ]
    study = config.study
    plan = {
        "study": study.name,
        "question": study.question,
        "labels": [list(pair) for pair in study.labels],
        "condition": study.condition,
        "sections": list(study.sections),
        "published": study.published,
        "command": command,
        "config": json.loads(config.to_json_best_effort()),
        "cells": cells,
    }
    workdir.mkdir(parents=True, exist_ok=True)
    _write_json(path, plan)


def run_study(
    runs: list[Run], *, display: Display, stop: Callable[[int], bool], after_run: Callable[[], None], retry_failed: bool
) -> Summary:
    """Makes every run that is not finished. A run that fails is written down, and the others go on.

    Raises loop.Stopped when a stop was asked for; everything finished or checkpointed is kept.
    """
    status = _agreed([_status(run) for run in runs])
    waiting = [run for run, s in zip(runs, status, strict=True) if s == 0 or (s == 2 and retry_failed)]
    display.skip_runs(len(runs) - len(waiting))
    failed = len([s for s in status if s == 2]) if not retry_failed else 0
    for run in waiting:
        try:
            text = _run(run, display, stop)
        except loop.NonFinite as error:
            failed += 1
            text = f"FAILED: {error}"
            if jax.process_index() == 0:
                _write_json(run.directory / "failure.json", {"reason": str(error)})
        display.finish_run(text, fresh=not text.startswith("FAILED"))
        after_run()
    return Summary(len(runs) - failed, len(waiting), failed)


def _status(run: Run) -> int:
    """0: to be made, 1: finished, 2: failed."""
    return 1 if (run.directory / "result.json").exists() else 2 if (run.directory / "failure.json").exists() else 0


def _agreed(values: list[int]) -> list[int]:
    """What process 0 found, on every process."""
    if jax.process_count() == 1:
        return values
    return multihost_utils.broadcast_one_to_all(np.asarray(values, np.int32)).tolist()


def check_hosts_agree(runs: list[Run]) -> None:
    """Stops hosts that hold other code, data or configs: they would silently train something else."""
    if jax.process_count() > 1:
        text = json.dumps([(run.name, run.fingerprint) for run in runs])
        ours = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
        multihost_utils.assert_equal(ours, "the hosts differ in config, data or code")


def _run(run: Run, display: Display, stop: Callable[[int], bool]) -> str:
    """Trains and evaluates one run; returns a line about it."""
    config = run.cell.seeded(run.seed)
    mesh = lab_mesh.make(config.mesh)
    lab_mesh.check_rows(mesh, "data.rows / train.microbatches", config.data.rows // config.train.microbatches,
                        config.data.texts_per_row * config.data.text_length)  # fmt: skip
    lab_mesh.check_rows(
        mesh, "evaluate.rows", config.evaluate.rows, config.evaluate.texts_per_row * config.data.text_length
    )
    first = jax.process_index() == 0
    if first:
        run.directory.mkdir(parents=True, exist_ok=True)
        (run.directory / "failure.json").unlink(missing_ok=True)
        _write_json(run.directory.parent / "config.json", json.loads(run.cell.config.to_json_best_effort()))
        run.data.tokenizer.save(run.directory.parent)
    log = _Log(run, display, every=config.log.every, writes=first)
    checkpoints = Checkpoints(run.directory / "checkpoints", config.checkpoint.keep)
    try:
        trained = loop.train(config, run.data.train, checkpoints, mesh, on_start=log.start, on_step=log.step, stop=stop)
        found, executable = conditions.evaluate(
            config, trained.state.model, run.data.validation, mesh,
            on_condition=log.condition, stop=lambda: stop(config.train.steps),
        )  # fmt: skip
        if first:
            log.flush()
            result = _result(run, config, mesh, trained, found, executable)
            log.finish(result)
            _write_json(run.directory / "result.json", result)
    finally:
        checkpoints.close()
        log.close()
    text = f"loss {found[0].loss:.3f}, accuracy {found[0].accuracy:.1%} at {config.study.condition} {found[0].value}"
    if trained.steps:
        text += (
            f", {trained.tokens / trained.seconds:,.0f} tokens/s, {trained.outside / trained.seconds:.1%} of "
            f"{trained.seconds:.1f} s outside the compiled step"
        )
    return text


class _Log:
    """What a run tells while it runs: metrics.jsonl, TensorBoard, and the display."""

    def __init__(self, run: Run, display: Display, every: int, writes: bool):
        self._run, self._display, self._every, self._writes = run, display, every, writes
        self._path = run.directory / "metrics.jsonl"
        self._file = self._board = None
        self._tokens, self._since = 0, time.perf_counter()

    def start(self, step: int) -> None:
        """Steps that are made again are logged again: what an earlier attempt logged from here on goes."""
        self._display.start_run(self._run.name, step, self._run.cell.config.train.steps)
        if self._writes:
            from lab.study.tensorboard import Writer  # slow to import, and only one host needs it

            kept = self._path.read_text().splitlines(keepends=True)[:step] if self._path.exists() else []
            write_atomically(self._path, "".join(kept).encode())
            self._file = self._path.open("a")
            self._board = Writer(self._run.directory / "tensorboard")
        self._since = time.perf_counter()

    def step(self, record: loop.Record) -> None:
        self._tokens += record.tokens
        if self._writes:
            self._file.write(json.dumps(record._asdict()) + "\n")
        if (record.step + 1) % self._every == 0:
            now = time.perf_counter()
            rate, self._since, self._tokens = self._tokens / (now - self._since), now, 0
            self._display.step(record.step, record.loss, rate)
            if self._writes:
                self._file.flush()
                self._board.scalars(record.step, {
                    "train/loss_nats": record.loss, "train/grad_norm": record.grad_norm,
                    "train/learning_rate": record.learning_rate, "train/fill_share": record.fill,
                    "train/tokens_per_second": rate,
                })  # fmt: skip

    def condition(self, condition: conditions.Condition) -> None:
        self._display.condition(self._run.cell.config.study.condition, condition.value, condition.loss)

    def flush(self) -> None:
        self._file.flush()

    def finish(self, result: dict) -> None:
        """The run among the others, in the HPARAMS tab."""
        label = self._run.cell.config.study.condition
        metrics = {
            f"eval/{name}_{label}_{c[label]}": c[field]
            for name, field in (("loss_nats", "loss"), ("accuracy_share", "accuracy"))
            for c in result["conditions"]
        }
        self._board.hparams(result["labels"] | {"seed": self._run.seed}, metrics)

    def close(self) -> None:
        if self._writes and self._file:
            self._file.close()
            self._board.close()


def _result(run: Run, config: ConfigDict, mesh, trained: loop.Trained, found, executable) -> dict:
    label = config.study.condition
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    hashes = "".join(line["text_hash"] for line in lines)
    texts_per_second = lambda c: config.evaluate.texts * config.data.text_length / c.seconds  # noqa: E731
    peak = runtime.peak_bytes(executable)
    return {
        "cell": run.cell.name,
        "fingerprint": run.fingerprint,
        "seed": run.seed,
        "labels": run.cell.labels,
        "parameters": parameter.count(trained.state.model),
        "tokens": sum(line["tokens"] for line in lines),
        "conditions": [
            {label: c.value, "loss": c.loss, "accuracy": c.accuracy, "tokens": c.tokens} for c in found
        ],
        "timings": [
            _train_timing(trained),
            *(
                {"phase": "eval", label: c.value, "seconds": c.seconds, "tokens_per_second": texts_per_second(c),
                 "peak_bytes": peak}
                for c in found
            ),
        ],
        "environment": runtime.environment(mesh) | {"implementation": kernels.resolve(config.model.implementation)},
        "text_hash": hashlib.sha256(hashes.encode()).hexdigest()[:16],
    }  # fmt: skip


def _train_timing(trained: loop.Trained) -> dict:
    """Of the steps made by the process that finished the run; a resumed run has made some before."""
    return {
        "phase": "train",
        "seconds": trained.seconds,
        "steps": trained.steps,
        "tokens_per_second": trained.tokens / trained.seconds if trained.steps else None,
        "peak_bytes": runtime.peak_bytes(trained.executable) if trained.executable else None,
        "overhead_share": trained.outside / trained.seconds if trained.steps else None,
    }


def _write_json(path: pathlib.Path, value) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())
