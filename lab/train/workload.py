"""What one training loop trains: one run, or several that share a program as one vmapped run."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lab.data import Batch, nominal_coordinates, train_batches
from lab.model.arrangement import Arrangement
from lab.train import compiled, optimizer
from lab.train.optimizer import Numbers
from lab.train.step import Metrics, Program, State


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
    """What is known of one step once it is done."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    fill: float
    tokens: int
    text_hash: str
    tiles: float


class Workload:
    """The members of one training loop. Several are stacked along a leading axis of state, numbers and batches.

    They must share their program and their number of steps. A vmapped run is not the solo run to the last bit.
    """

    def __init__(self, members: Sequence[Member]):
        self.members = list(members)
        self.config = self.members[0].config
        self._program = Program.of(self.config)
        length = nominal_coordinates(self.config, 1).shape[1]
        self._arrange = Arrangement(self.config.model, self.config.run, length)
        self._numbers = [optimizer.numbers_by_step(member.config.train) for member in self.members]

    @property
    def vmapped(self) -> bool:
        return len(self.members) > 1

    def initial_state(self, mesh: Mesh) -> State:
        states = [compiled.initial_state(member.config, self._program, mesh) for member in self.members]
        return compiled.stacked(states, mesh) if self.vmapped else states[0]

    def batches(self, start: int) -> Iterator[tuple[Batch, list[Sent]]]:
        """This host's rows of each step from `start`, arranged for the model, and what is known of each member's."""
        options = dict(process_index=jax.process_index(), process_count=jax.process_count(), then=self._arrange)
        each = [train_batches(member.config, member.texts, start=start, **options) for member in self.members]
        for step in zip(*each, strict=True):
            arranged, infos = zip(*step, strict=True)
            batches, shares = zip(*arranged, strict=True)
            sent = [Sent(*info, share) for info, share in zip(infos, shares, strict=True)]
            yield jax.tree.map(lambda *x: np.stack(x), *batches) if self.vmapped else batches[0], sent

    def numbers(self, step: int) -> Numbers:
        each = [numbers(step) for numbers in self._numbers]
        return jax.tree.map(lambda *x: np.stack(x), *each) if self.vmapped else each[0]

    def compile(self, state: State, numbers: Numbers, batch: Batch, mesh: Mesh):
        make = compiled.train_steps if self.vmapped else compiled.train_step
        return make(state, numbers, batch, self._program, mesh)

    def evaluated(self, state: State, numbers: Numbers, mesh: Mesh) -> State:
        """The state after the last step, with the weights at which it is evaluated. numbers: of that step."""
        return compiled.evaluated(state, numbers, self._program, mesh, self.vmapped)

    def records(self, step: int, metrics: Metrics, numbers: Numbers, sent: list[Sent]) -> list[Record]:
        """What is known of a step of each member; waits for it."""
        loss, grad_norm, rate = (
            np.reshape(x, -1).tolist() for x in (*jax.device_get(metrics), numbers["learning_rate"])
        )
        return [
            Record(step, loss[i], grad_norm[i], rate[i], of.fill, of.tokens, of.text_hash, of.tiles)
            for i, of in enumerate(sent)
        ]
