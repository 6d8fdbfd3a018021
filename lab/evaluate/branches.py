"""Loss by number of branches: every model is asked about the same texts, however they are interleaved."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lab.data import evaluation_batches
from lab.model import mesh as lab_mesh
from lab.train import compiled
from lab.train.loop import Stopped


class Condition(NamedTuple):
    """The loss at one number of branches: nats per labelled token, the mean over all of them."""

    branches: int
    loss: float
    tokens: int  # labelled
    seconds: float  # steady, without compiling


def evaluate(
    config: ConfigDict,
    model,
    texts,
    mesh,
    *,
    members: int = 1,
    on_condition: Callable[[list[Condition]], None],
    stop: Callable[[], bool],
):
    """([[Condition of each member] for every count of config.evaluate.branches], the executable).

    One program serves them all. `model` is a stack where members > 1; seconds are those of all members together.
    """
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    conditions, run = [], None
    make = compiled.evaluation_steps if members > 1 else compiled.evaluation_step
    for branches in config.evaluate.branches:
        sums = np.zeros((2, members))  # nats and tokens, float64 on the host
        begun = time.perf_counter()
        for batch in evaluation_batches(config, texts, branches, **hosts):
            placed = lab_mesh.place(batch, mesh)
            if run is None:
                run = make(model, placed, mesh)
                begun = time.perf_counter()
            sums += [np.reshape(x, -1) for x in jax.device_get(run(model, placed))]
            if stop():
                raise Stopped("the evaluation, which starts again")
        seconds = time.perf_counter() - begun
        conditions.append(
            [Condition(branches, nats / tokens, int(tokens), seconds) for nats, tokens in sums.T.tolist()]
        )
        on_condition(conditions[-1])
    return conditions, run
