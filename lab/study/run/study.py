"""Runs a study: every cell and seed that is not trained or not asked everything, one after another."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import filelock
import jax

from lab import watch
from lab.exchange import companions
from lab.storage import mirror, write_json
from lab.study import evaluations, results
from lab.study.define import identity
from lab.study.run import ask, make
from lab.study.run.hosts import agreed
from lab.study.run.progress import Display
from lab.study.run.runs import Run, Unit
from lab.train import loop, origin

WAITING, FINISHED, FAILED = range(3)
POLL = 1.0  # seconds between looks at runs that other processes make
OF_STORE = 10  # times as long between looks into an object store


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
    """Trains every run that is not trained, and asks each what is missing. A run that fails is written down, and the
    others go on.

    Processes that share the directory divide the runs: each run is made by one of them, and all wait for the last.
    Raises loop.Stopped when a stop was asked for; everything finished or checkpointed is kept.
    """
    runs = [run for unit in units for run in unit]
    found = dict(zip((run.directory for run in runs), agreed([_status(run) for run in runs]), strict=True))
    to_make = (WAITING, FAILED) if retry_failed else (WAITING,)
    waiting = [tuple(run for run in unit if found[run.directory] in to_make) for unit in units]
    waiting = [unit for unit in waiting if unit]
    display.skip_runs(len(runs) - sum(map(len, waiting)))
    new, store = 0, mirror(runs[0].directory) if runs else None
    while waiting:
        held = waiting
        if store and jax.process_index() == 0:
            store.refresh()
        for unit in waiting:
            with _locked(unit) as ours:
                if not ours:
                    continue
                held = [other for other in held if other is not unit]
                now = agreed([_status(run) for run in unit])
                left = tuple(run for run, status in zip(unit, now, strict=True) if status == found[run.directory])
                for run in set(unit) - set(left):
                    display.finish_run(run.name, "made by another process", fresh=False)
                if not left:
                    continue
                new += len(left)
                _make(left, display, stop)
            after_run()
        for _ in range((OF_STORE if store else 1) if len(held) == len(waiting) else 0):
            time.sleep(POLL)
            if stop(0):
                raise loop.Stopped("a run that another process makes")
        waiting = held
    failed = sum(status == FAILED for status in agreed([_status(run) for run in runs]))
    return Summary(len(runs) - failed, new, failed)


def _make(unit: Unit, display: Display, stop: Callable[[int], bool]) -> None:
    """Makes the runs of a unit. One that fails is written down, and the others are made without it."""
    watch.begin(unit[0].name, watch.BEGINS)
    if jax.process_index() == 0:
        for run in unit:
            (run.directory / "failure.json").unlink(missing_ok=True)
            if not _trained(run):
                write_json(run.directory.parent / "config.json", run.cell.described())
                identity.keep(run.directory.parent, run.identity)
                if run.cell.config.checkpoint:  # so that the cell is exported as what it began from was imported
                    companions.copy(origin.find(run.cell.config.checkpoint).cell, run.directory.parent)
                    origin.keep(run.directory.parent, run.cell.config.checkpoint)
                run.data.tokenizer.save(run.directory.parent)
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(run.directory / evaluations.DIRECTORY)  # of other weights
    trained = agreed([_trained(run) for run in unit])
    untrained = tuple(run for run, done in zip(unit, trained, strict=True) if not done)
    speed, model, failed = "", None, []
    while untrained:
        try:
            speed, model = make.train(untrained, display, stop)
            break
        except loop.NonFinite as error:
            if len(untrained) > 1 and jax.process_index() == 0:
                make.drop_stack(untrained)  # what is left of it is another one
            failed.append(untrained[error.member])
            untrained = tuple(run for run in untrained if run is not failed[-1])
            _fail(failed[-1], error, display)
    for run in unit:
        if run in failed:
            continue
        if model is None:
            display.start_asking(run.name)
        try:
            told = ask.ask(run, display, stop, model if run in untrained else None)
        except (loop.NonFinite, ask.NoCheckpoint) as error:
            _fail(run, error, display)
        else:
            display.finish_run(run.name, ", ".join(filter(None, (told, speed))))


def _fail(run: Run, error: Exception, display: Display) -> None:
    if jax.process_index() == 0:
        step = getattr(error, "step", None)
        at = {} if step is None else {"step": step}
        write_json(run.directory / "failure.json", {"reason": str(error), **at})
    display.finish_run(run.name, f"FAILED: {error}", fresh=False)


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
                if store := mirror(unit[0].directory):  # whose programs share no disk
                    claim = store.claim([run.directory for run in unit], [make.checkpoint_directory(unit)])
                    held = locks.enter_context(claim)
            except filelock.Timeout:
                held = False
        yield bool(agreed([held])[0])


def _status(run: Run) -> int:
    if _trained(run) and ask.complete(run):
        return FINISHED
    return FAILED if results.failed(run.directory) is not None else WAITING


def _trained(run: Run) -> bool:
    return results.trained(run.directory) is not None
