"""Loss and accuracy by condition: every model is asked the same, under one number of branches or difficulty each."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
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
    bytes: int  # of text that these stand for; 0: unknown
    seconds: float  # steady, without compiling
    executable: object


def laid_over(config: ConfigDict, asked: ConfigDict, model, mesh):
    """The model that an ask is about: the same weights, and what its overrides make of the rest."""
    if not asked.model:
        return model
    return compiled.with_weights_of(compiled.described(asks.remodelled(config, asked), mesh), model)


def evaluate(
    config: ConfigDict,
    name: str,
    model,
    texts,
    mesh,
    *,
    done: int = 0,
    stop: Callable[[], bool],
    bytes_of_ids: np.ndarray | None = None,
) -> Iterator[Condition]:
    """The conditions of the ask `name`, but for the first `done`, one by one as they are found; one program serves
    them all. `model`: as it was trained. bytes_of_ids: the tokenizer's. Raises Stopped, the condition at hand lost,
    when stop() says so."""
    asked = config.evaluate[name]
    model, config = laid_over(config, asked, model, mesh), asks.remodelled(config, asked)
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    run, arrange, batches_of = None, None, asks.ASKS[asked.kind].batches
    for value in asks.conditions(asked)[done:]:
        sums = np.zeros(3)  # nats, right answers and tokens; float64 on the host
        begun, sent, size = time.perf_counter(), None, 0
        for batch in batches_of(config, asked, texts, value, **hosts):
            size += 0 if bytes_of_ids is None else int(bytes_of_ids[batch.labels[batch.labels >= 0]].sum())
            arrange = arrange or Arrangement(config.model, config.run, batch.tokens.shape[1])
            placed = lab_mesh.place(arrange(batch)[0], mesh)
            if run is None:
                run = compiled.evaluation_step(model, placed, mesh)
                begun = time.perf_counter()
            before, sent = sent, run(model, placed)
            if before is not None:  # waited for while the next batch is computed
                sums += jax.device_get(before)
            if stop():
                raise Stopped(f"the ask {name}, {asks.ASKS[asked.kind].column} {value}")
        nats, right, tokens = (sums + jax.device_get(sent)).tolist()
        seconds = time.perf_counter() - begun
        yield Condition(value, nats / tokens, right / tokens, int(tokens), _over_hosts(size), seconds, run)


def _over_hosts(count: int) -> int:
    """The sum of what each host has counted of its own rows."""
    if jax.process_count() == 1:
        return count
    # In two parts: devices cut integers to 32 bits.
    parts = multihost_utils.process_allgather(np.array(divmod(count, 2**24), np.int32))
    return sum(int(high) * 2**24 + int(low) for high, low in parts)
