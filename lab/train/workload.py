"""What one training loop trains: one run, or several that share a program as one vmapped run."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lab import watch
from lab.data import Batch, nominal_coordinates, train_batches
from lab.model.arrangement import Arrangement
from lab.train import compiled, dropout, instruments, memory, optimizer
from lab.train.instruments import Measured
from lab.train.optimizer import Numbers
from lab.train.step import Metrics, Program, State

FETCHES = "fetches texts"  # a phase of a run (lab.watch)


class Member(NamedTuple):
    """One run: its config, and the texts it trains on."""

    config: ConfigDict
    texts: Sequence[np.ndarray]


class Sent(NamedTuple):
    """What is known of a batch: what lab.data.pipeline.Info says of it, and `tiles`, the share of attention's tiles
    that are computed for it, over this host's rows."""

    text_hash: str
    fill: float
    tokens: int
    tiles: float


class Record(NamedTuple):
    """What is known of one step once it is done. instruments: what was measured of it; None where that was not due."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    fill: float
    tokens: int
    text_hash: str
    tiles: float
    instruments: dict | None = None


class Workload:
    """The members of one training loop. Several are stacked along a leading axis of state, numbers and batches.

    They must share their program and their number of steps. A vmapped run is not the solo run to the last bit.
    """

    def __init__(self, members: Sequence[Member]):
        self.members = list(members)
        self.config = self.members[0].config
        self._program = Program.of(self.config)
        length = nominal_coordinates(self.config, 1).shape[1]
        drops = dropout.of_attention(self.config.train)
        self._arrange = Arrangement(self.config.model, self.config.run, length, drops)
        self._numbers = [
            (optimizer.numbers_by_step(member.config.train), dropout.numbers_by_step(member.config))
            for member in self.members
        ]

    @property
    def vmapped(self) -> bool:
        return len(self.members) > 1

    def initial_state(self, mesh: Mesh) -> State:
        states = [compiled.initial_state(member.config, self._program, mesh) for member in self.members]
        return compiled.stacked(states, mesh) if self.vmapped else states[0]

    def batches(self, start: int) -> Iterator[tuple[Batch, list[Sent]]]:
        """This host's rows of each step from `start`, arranged for the model, and what is known of each member's."""
        hosts = dict(process_index=jax.process_index(), process_count=jax.process_count(), then=self._then())
        each = [train_batches(member.config, member.texts, start=start, **hosts) for member in self.members]
        steps = zip(*each, strict=True)
        fetches = any(getattr(member.texts, "fetches", False) for member in self.members)
        while step := _next(steps, fetches):
            arranged, infos = zip(*step, strict=True)
            batches, shares = zip(*arranged, strict=True)
            sent = [Sent(*info, share) for info, share in zip(infos, shares, strict=True)]
            yield jax.tree.map(lambda *x: np.stack(x), *batches) if self.vmapped else batches[0], sent

    def _then(self):
        """What is done with this host's rows where they are made."""
        if not self._program.dropout:
            return self._arrange
        first = jax.process_index() * (self.config.data.rows // jax.process_count())
        return functools.partial(_numbered_and_arranged, self._arrange, first)

    def numbers(self, step: int) -> Numbers:
        each = [of_optimizer(step) | of_dropout(step) for of_optimizer, of_dropout in self._numbers]
        return jax.tree.map(lambda *x: np.stack(x), *each) if self.vmapped else each[0]

    def compile(self, state: State, numbers: Numbers, batch: Batch, mesh: Mesh):
        make = compiled.train_steps if self.vmapped else compiled.train_step
        return make(state, numbers, batch, self._program, mesh)

    def evaluated(self, state: State, numbers: Numbers, mesh: Mesh) -> State:
        """The state after the last step, with the weights at which it is evaluated. numbers: of that step."""
        return compiled.evaluated(state, numbers, self._program, mesh, self.vmapped)

    def measuring(self, state: State, numbers: Numbers, batch: Batch, mesh: Mesh) -> Callable:
        """A function of (step, state, numbers, batch), before that step is made, to what run.log.instruments measures
        of it; None where it is not due."""
        log, run = self.config.run.log, None
        if names := instruments.programmed(log.instruments):
            run = compiled.measure(state, numbers, batch, self._program, names, mesh, len(self.members))
            memory.check(run, self.config)

        def measure(step: int, *inputs) -> Measured | None:
            if not log.instruments or not instruments.due(step, log.every):
                return None
            return run(*inputs) if run else {}

        return measure

    def records(
        self, step: int, metrics: Metrics, numbers: Numbers, sent: list[Sent], measured: Measured | None = None
    ) -> list[Record]:
        """What is known of a step of each member; waits for it."""
        loss, grad_norm, rate = (
            np.reshape(x, -1).tolist() for x in (*jax.device_get(metrics), numbers["learning_rate"])
        )
        told = [None if measured is None else instruments.told(measured, i, self.vmapped) for i in range(len(sent))]
        return [
            Record(step, loss[i], grad_norm[i], rate[i], of.fill, of.tokens, of.text_hash, of.tiles, told[i])
            for i, of in enumerate(sent)
        ]


def _next(steps: Iterator[tuple], fetches: bool) -> tuple | None:
    """None behind the last. fetches: a step may wait for shards, and is not taken for standing still meanwhile."""
    with watch.phase(FETCHES) if fetches else contextlib.nullcontext():
        return next(steps, None)


def _numbered_and_arranged(arrange: Arrangement, first: int, batch: Batch) -> tuple[Batch, float]:
    """Of a module, so that it reaches the processes that make batches."""
    return arrange(dropout.numbered(batch, first))
