"""Loss by number of branches: every model is asked about the same texts, however they are interleaved."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
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
    config: ConfigDict, model, texts, mesh, *, on_condition: Callable[[Condition], None], stop: Callable[[], bool]
):
    """([Condition] for every count of config.evaluate.branches, the executable). One program serves them all."""
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    conditions, run = [], None
    for branches in config.evaluate.branches:
        nats = tokens = 0.0
        begun = time.perf_counter()
        for batch in evaluation_batches(config, texts, branches, **hosts):
            placed = lab_mesh.place(batch, mesh)
            if run is None:
                run = compiled.evaluation_step(model, placed, mesh)
                begun = time.perf_counter()
            part = jax.device_get(run(model, placed))
            nats, tokens = nats + float(part[0]), tokens + float(part[1])  # float64 on the host
            if stop():
                raise Stopped("the evaluation, which starts again")
        conditions.append(Condition(branches, nats / tokens, int(tokens), time.perf_counter() - begun))
        on_condition(conditions[-1])
    return conditions, run
