"""The training loop of one run. It knows no variant by name."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from lab.model import mesh as lab_mesh
from lab.train import compiled, memory
from lab.train.checkpoint import Checkpoints, Position
from lab.train.step import State
from lab.train.workload import Record, Workload


class Trained(NamedTuple):
    state: State
    steps: int  # made here: fewer than configured if the run was resumed
    seconds: float  # their steady wall time, without compiling and restoring
    outside: float  # the part of it in which the devices had nothing to do: data, logging, checkpoints
    tokens: int  # trained on here
    executable: object  # None if no step was left to make


class Stopwatch:
    """Steady wall time of the steps, and the part of it in which the devices had nothing to do."""

    def __init__(self):
        self.outside, self._begun = 0.0, time.perf_counter()
        self._idle_since = self._begun

    def send(self, running: bool) -> None:
        """A step is sent now. If none is running, the devices may have waited ever since the last one was settled."""
        if not running:
            now = time.perf_counter()
            self.outside, self._idle_since = self.outside + now - self._idle_since, now

    def settle(self) -> None:
        """The last step sent is done."""
        self._idle_since = time.perf_counter()

    def stop(self) -> float:
        """All is saved: seconds since the first step."""
        self.send(running=False)
        return time.perf_counter() - self._begun


class NonFinite(Exception):
    """The loss or the gradient norm of a step is not a number, for one member of the workload."""

    def __init__(self, message: str, member: int, step: int | None = None):
        super().__init__(message)
        self.member, self.step = member, step


class Stopped(Exception):
    """A stop was asked for; everything is saved."""


def train(
    workload: Workload,
    checkpoints: Checkpoints,
    mesh: jax.sharding.Mesh,
    *,
    on_start: Callable[[int], None],
    on_step: Callable[[list[Record]], None],
    on_checkpoint: Callable[[int, State], None],
    stop: Callable[[int], bool],
) -> Trained:
    """Trains from the newest checkpoint, or afresh, to config.train.steps, and leaves a checkpoint of the last step.

    on_start(step) tells where it begins; on_step(records), one for each member, comes once for every step, in order,
    while the next one runs; on_checkpoint(steps made, state) with every checkpoint, the one it begins from included.
    Raises NonFinite with the step, its batch and the last good checkpoint; Stopped, all saved, when stop(step) says so.
    """
    config = workload.config
    state, restored = workload.initial_state(mesh), None
    if checkpoints.steps():
        state = compiled.emptied(state)
        restored = checkpoints.restore(state)
        state = state if restored else workload.initial_state(mesh)
    position, state = restored or (Position(0, 0), state)
    checkpoints.save(position, state)  # of step 0: what Orbax does once in a process is done before steps are timed
    on_start(position.step)
    on_checkpoint(position.step, state)
    texts_per_step = config.data.rows * config.data.texts_per_row
    run, measure, clock, pending, steps, tokens = None, None, Stopwatch(), None, 0, 0

    def settle() -> None:
        """Waits for the step that was sent last, and checks and reports it."""
        nonlocal pending
        if pending is not None:
            metrics, step, numbers, sent, measured = pending
            records, pending = workload.records(step, metrics, numbers, sent, measured), None
            clock.settle()
            _check_finite(records, position)
            on_step(records)

    for step, (batch, sent) in enumerate(workload.batches(position.step), position.step):
        numbers, placed = workload.numbers(step), lab_mesh.place(batch, mesh)
        if run is None:
            run = workload.compile(state, numbers, placed, mesh)
            memory.check(run, config)
            measure = workload.measuring(state, numbers, placed, mesh)
            clock = Stopwatch()
        clock.send(running=pending is not None and not pending[0].loss.is_ready())
        measured = measure(step, state, numbers, placed)
        state, metrics = run(state, numbers, placed)
        settle()  # of the step before, while this one runs
        pending = metrics, step, numbers, sent, measured
        steps, tokens = steps + 1, tokens + sum(of.tokens for of in sent)
        stopping, last = stop(step), step + 1 == config.train.steps
        if stopping or last or (step + 1) % config.run.checkpoint.every == 0:
            settle()  # a checkpoint is worth keeping only if its step was finite
            if last:
                state = workload.evaluated(state, numbers, mesh)
            position = Position(step + 1, (step + 1) * texts_per_step)
            checkpoints.save(position, state)
            on_checkpoint(position.step, state)
        if stopping and not last:
            checkpoints.wait()
            raise Stopped(f"step {step + 1}")
    checkpoints.wait()
    return Trained(state, steps, clock.stop(), clock.outside, tokens, run)


def _check_finite(records: list[Record], position: Position) -> None:
    for member, record in enumerate(records):
        if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
            raise NonFinite(
                f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm}, batch {record.text_hash}; "
                f"last good checkpoint: {position.step}",
                member,
                record.step,
            )
