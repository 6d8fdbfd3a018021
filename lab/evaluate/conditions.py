"""Loss and accuracy by condition: every model is asked the same, under one number of branches, difficulty or length
each."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lab.evaluate import asks, keys, long, passes, reached
from lab.evaluate.passes import Pass
from lab.model import mesh as lab_mesh
from lab.model.arrangement import Arrangement
from lab.train import compiled
from lab.train.loop import Stopped


class Condition(NamedTuple):
    """What was found under one condition of an ask; means over all labelled tokens."""

    value: int | str
    loss: float  # nats per token
    accuracy: float  # share of tokens whose label has the largest logit
    tokens: int  # labelled
    bytes: int  # of text that these stand for; 0: unknown
    seconds: float  # steady, without compiling
    executable: object  # None: several
    read: int = 0  # tokens that were put through the model; 0: those of the texts that were asked for
    further: dict = {}  # columns of the row beside these
    documents: dict | None = None  # what was found of each document, as JSON keeps it


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
    tokenizer=None,
) -> Iterator[Condition]:
    """The conditions of the ask `name`, but for the first `done`, one by one as they are found; one program serves
    them all. `model`: as it was trained. bytes_of_ids: the tokenizer's. tokenizer: of asks that write their own
    documents. Raises Stopped, the condition at hand lost, when stop() says so."""
    asked = config.evaluate[name]

    def told() -> None:
        if stop():
            raise Stopped(f"the ask {name}")

    if asks.ASKS[asked.kind].decode:
        yield from _of_decoded(config, name, model, texts, mesh, done, told, bytes_of_ids, tokenizer)
        return
    if asks.ASKS[asked.kind].rows:
        yield from _of_documents(config, name, model, texts, mesh, done, told, bytes_of_ids, tokenizer)
        return
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


def _of_documents(config, name: str, plain, texts, mesh, done, told, bytes_of_ids, tokenizer) -> Iterator[Condition]:
    """The same of an ask of long documents: one program of a chunk serves all lengths."""
    asked, kind = config.evaluate[name], asks.ASKS[config.evaluate[name].kind]
    model, how, values = laid_over(config, asked, plain, mesh), Pass.of(asked), asks.conditions(asked)

    if long.methods(asked) and values[done:]:
        of = kind.rows(config, asked, texts, tokenizer, max(values))
        changed = asks.remodelled(config, asked)
        reached.check(name, config, changed, (plain, model), of, how, mesh, told)
    for value in values[done:]:
        of = kind.rows(config, asked, texts, tokenizer, value)
        if asked.evaluator:
            of = of._replace(keys=keys.of_rows(asked, of, long.digest(of), tokenizer, mesh, told))
        nats, right, seconds = passes.score_all(model, of, how, mesh, told)
        found = kind.summary(config, asked, value, of, nats.astype(np.float64), right)
        size = 0 if bytes_of_ids is None else int(bytes_of_ids[found.labels].sum())
        means = found.nats / found.tokens, found.right / found.tokens, found.tokens
        ran = seconds, passes.executable(model, how, mesh), int((of.tokens >= 0).sum())
        yield Condition(value, *means, size, *ran, found.further, found.documents)


def _of_decoded(config, name: str, plain, texts, mesh, done, told, bytes_of_ids, tokenizer) -> Iterator[Condition]:
    """The same of an ask that decodes."""
    asked, values = config.evaluate[name], asks.conditions(config.evaluate[name])

    model = laid_over(config, asked, plain, mesh)
    for one in asks.ASKS[asked.kind].decode(config, asked, model, texts, tokenizer, mesh, values[done:], told):
        size = 0 if bytes_of_ids is None or one.ids is None else int(bytes_of_ids[one.ids].sum())
        means = one.loss, one.accuracy, one.tokens
        yield Condition(one.value, *means, size, one.seconds, one.executable, one.generated, one.further, one.documents)


def _over_hosts(count: int) -> int:
    """The sum of what each host has counted of its own rows."""
    if jax.process_count() == 1:
        return count
    # In two parts: devices cut integers to 32 bits.
    parts = multihost_utils.process_allgather(np.array(divmod(count, 2**24), np.int32))
    return sum(int(high) * 2**24 + int(low) for high, low in parts)
