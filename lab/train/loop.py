"""The training loop of one run. It knows no variant by name."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from lab.data import Batch, train_batches
from lab.model import mesh as lab_mesh
from lab.train import compiled, optimizer
from lab.train.checkpoint import Checkpoints, Position
from lab.train.step import Metrics, Program, State


class Record(NamedTuple):
    """What is known of one step once it is done."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    fill: float
    tokens: int
    text_hash: str


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
    """The loss or the gradient norm of a step is not a number."""


class Stopped(Exception):
    """A stop was asked for; everything is saved."""


def train(
    config: ConfigDict,
    texts,
    checkpoints: Checkpoints,
    mesh: jax.sharding.Mesh,
    *,
    on_start: Callable[[int], None],
    on_step: Callable[[Record], None],
    stop: Callable[[int], bool],
) -> Trained:
    """Trains from the newest checkpoint, or afresh, to config.train.steps, and leaves a checkpoint of the last step.

    on_start(step) tells where it begins; on_step(record) comes once for every step, in order, while the next one runs.
    Raises NonFinite with the step, its batch and the last good checkpoint; Stopped, all saved, when stop(step) says so.
    """
    program = Program(config.train.optimizer, config.train.decay, config.train.microbatches)
    state = compiled.initial_state(config.model, program, mesh, config.seed)
    position, state = checkpoints.restore(state) or (Position(0, 0), state)
    checkpoints.save(position, state)  # of step 0: what Orbax does once in a process is done before steps are timed
    on_start(position.step)
    numbers = optimizer.numbers_by_step(config.train)
    texts_per_step = config.data.rows * config.data.texts_per_row
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    batches = train_batches(config, texts, start=position.step, **hosts)
    run, clock, pending, steps, tokens = None, Stopwatch(), None, 0, 0

    def settle() -> None:
        """Waits for the step that was sent last, and checks and reports it."""
        nonlocal pending
        if pending is not None:
            metrics = jax.device_get(pending[0])
            clock.settle()
            record, pending = _record(metrics, *pending[1:]), None
            _check_finite(record, position)
            on_step(record)

    for step, (batch, info) in enumerate(batches, position.step):
        placed: Batch = lab_mesh.place(batch, mesh)
        if run is None:
            run, clock = compiled.train_step(state, numbers(step), placed, program, mesh), Stopwatch()
        clock.send(running=pending is not None and not pending[0].loss.is_ready())
        state, metrics = run(state, numbers(step), placed)
        settle()  # of the step before, while this one runs
        pending = metrics, step, info, numbers(step).learning_rate
        steps, tokens = steps + 1, tokens + info.tokens
        stopping, last = stop(step), step + 1 == config.train.steps
        if stopping or last or (step + 1) % config.checkpoint.every == 0:
            settle()  # a checkpoint is worth keeping only if its step was finite
            position = Position(step + 1, (step + 1) * texts_per_step)
            checkpoints.save(position, state)
        if stopping and not last:
            checkpoints.wait()
            raise Stopped(f"step {step + 1}")
    checkpoints.wait()
    return Trained(state, steps, clock.stop(), clock.outside, tokens, run)


def _record(metrics: Metrics, step: int, info, learning_rate) -> Record:
    loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
    return Record(step, loss, grad_norm, float(learning_rate), info.fill, info.tokens, info.text_hash)


def _check_finite(record: Record, position: Position) -> None:
    if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
        raise NonFinite(
            f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm}, batch {record.text_hash}; "
            f"last good checkpoint: {position.step}"
        )
