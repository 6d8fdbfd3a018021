"""Runs a study: every cell and seed that has no result yet, one after another, each leaving its result behind."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import filelock
import jax
import numpy as np
from jax.experimental import multihost_utils

from lab.storage import write_json
from lab.study.run.make import make
from lab.study.run.progress import Display
from lab.study.run.runs import Run, Unit
from lab.train import loop

WAITING, FINISHED, FAILED = range(3)
POLL = 1.0  # seconds between looks at runs that other processes make


class Summary(NamedTuple):
    """How a study ended."""

    done: int
    new: int
    failed: int


def run_study(
    units: list[Unit],
    *,
    display: Display,
    stop: Callable[[int], bool],
    after_run: Callable[[], None],
    retry_failed: bool,
) -> Summary:
    """Makes every run that is not finished. A run that fails is written down, and the others go on.

    Processes that share the directory divide the runs: each run is made by one of them, and all wait for the last.
    Raises loop.Stopped when a stop was asked for; everything finished or checkpointed is kept.
    """
    runs = [run for unit in units for run in unit]
    found = dict(zip((run.directory for run in runs), _agreed([_status(run) for run in runs]), strict=True))
    to_make = (WAITING, FAILED) if retry_failed else (WAITING,)
    waiting = [tuple(run for run in unit if found[run.directory] in to_make) for unit in units]
    waiting = [unit for unit in waiting if unit]
    display.skip_runs(len(runs) - sum(map(len, waiting)))
    new = 0
    while waiting:
        held = waiting
        for unit in waiting:
            with _locked(unit) as ours:
                if not ours:
                    continue
                held = [other for other in held if other is not unit]
                now = _agreed([_status(run) for run in unit])
                left = tuple(run for run, status in zip(unit, now, strict=True) if status == found[run.directory])
                for run in set(unit) - set(left):
                    display.finish_run(run.name, "made by another process", fresh=False)
                if not left:
                    continue
                new += len(left)
                _make(left, display, stop)
            after_run()
        if len(held) == len(waiting):
            time.sleep(POLL)
            if stop(0):
                raise loop.Stopped("a run that another process makes")
        waiting = held
    failed = sum(status == FAILED for status in _agreed([_status(run) for run in runs]))
    return Summary(len(runs) - failed, new, failed)


def _make(unit: Unit, display: Display, stop: Callable[[int], bool]) -> None:
    """Makes the runs of a unit. One that fails is written down, and the others are made without it."""
    while unit:
        try:
            for run, text in zip(unit, make(unit, display, stop), strict=True):
                display.finish_run(run.name, text)
            return
        except loop.NonFinite as error:
            failed = unit[error.member]
            if jax.process_index() == 0:
                write_json(failed.directory / "failure.json", {"reason": str(error)})
            display.finish_run(failed.name, f"FAILED: {error}", fresh=False)
            unit = tuple(run for run in unit if run is not failed)


@contextlib.contextmanager
def _locked(unit: Unit) -> Iterator[bool]:
    """Whether this program holds all runs of a unit until the block ends; process 0 holds them for all its hosts."""
    with contextlib.ExitStack() as locks:
        held = True
        if jax.process_index() == 0:
            try:
                for run in unit:
                    run.directory.mkdir(parents=True, exist_ok=True)
                    locks.enter_context(filelock.FileLock(run.directory / ".lock", blocking=False))
            except filelock.Timeout:
                held = False
        yield bool(_agreed([held])[0])


def _status(run: Run) -> int:
    if (run.directory / "result.json").exists():
        return FINISHED
    return FAILED if (run.directory / "failure.json").exists() else WAITING


def _agreed(values: list[int]) -> list[int]:
    """What process 0 found, on every process."""
    if jax.process_count() == 1:
        return values
    return multihost_utils.broadcast_one_to_all(np.asarray(values, np.int32)).tolist()
