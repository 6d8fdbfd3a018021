"""Loss and accuracy by condition: every model is asked the same, under one number of branches or difficulty each."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from lab import data as lab_data
from lab.model import mesh as lab_mesh
from lab.train import compiled
from lab.train.loop import Stopped


class Condition(NamedTuple):
    """What was found under one of `lab.data.conditions`; means over all labelled tokens."""

    value: int
    loss: float  # nats per token
    accuracy: float  # share of tokens whose label has the largest logit
    tokens: int  # labelled
    seconds: float  # steady, without compiling


def evaluate(
    config: ConfigDict, model, texts, mesh, *, on_condition: Callable[[Condition], None], stop: Callable[[], bool]
):
    """([Condition] for every one of `lab.data.conditions`, the executable). One program serves them all."""
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    conditions, run = [], None
    for value in lab_data.conditions(config):
        nats = right = tokens = 0.0
        begun = time.perf_counter()
        for batch in lab_data.evaluation_batches(config, texts, value, **hosts):
            placed = lab_mesh.place(batch, mesh)
            if run is None:
                run = compiled.evaluation_step(model, placed, mesh)
                begun = time.perf_counter()
            part = [float(x) for x in jax.device_get(run(model, placed))]  # float64 on the host
            nats, right, tokens = nats + part[0], right + part[1], tokens + part[2]
            if stop():
                raise Stopped("the evaluation, which starts again")
        seconds = time.perf_counter() - begun
        conditions.append(Condition(value, nats / tokens, right / tokens, int(tokens), seconds))
        on_condition(conditions[-1])
    return conditions, run
