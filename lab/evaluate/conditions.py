"""Loss and accuracy by condition: every model is asked the same, under one number of branches or difficulty each."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lab.evaluate import asks
from lab.model import mesh as lab_mesh
from lab.model.arrangement import Arrangement
from lab.train import compiled
from lab.train.loop import Stopped


class Condition(NamedTuple):
    """What was found under one condition of an ask; means over all labelled tokens."""

    value: int
    loss: float  # nats per token
    accuracy: float  # share of tokens whose label has the largest logit
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
    """([[Condition of each member] for every one of the ask's conditions], the executable).

    One program serves them all. `model` is a stack where members > 1; seconds are those of all members together.
    """
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    conditions, run, arrange = [], None, Arrangement(config.model, config.run)
    asked = config.evaluate[asks.LOSS]
    batches_of = asks.ASKS[asked.kind].batches
    make = compiled.evaluation_steps if members > 1 else compiled.evaluation_step
    for value in asks.conditions(asked):
        sums = np.zeros((3, members))  # nats, right answers and tokens; float64 on the host
        begun = time.perf_counter()
        for batch in batches_of(config, asked, texts, value, **hosts):
            placed = lab_mesh.place(arrange(batch)[0], mesh)
            if run is None:
                run = make(model, placed, mesh)
                begun = time.perf_counter()
            sums += [np.reshape(x, -1) for x in jax.device_get(run(model, placed))]
            if stop():
                raise Stopped("the evaluation, which starts again")
        seconds = time.perf_counter() - begun
        conditions.append([Condition(value, n / t, right / t, int(t), seconds) for n, right, t in sums.T.tolist()])
        on_condition(conditions[-1])
    return conditions, run
