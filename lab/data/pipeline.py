"""Batches as functions of (seed, step): the order of texts, the rows of this process, and their prefetching."""

import dataclasses
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from lab.coordinates import Coordinates
from lab.data.checks import check_branches, check_training, rows_of_process
from lab.data.packing import Layout, Row, parse_draw
from lab.errors import UserError

_EVALUATION_SEED = 0  # not config.seed: every cell is evaluated on the same texts
_PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """tokens, labels: int32 [R, T], label -1 where there is none; coordinates: [R, T].

    rows: int32 [R, T], the row of each token among those of the whole step, of all hosts; None where nothing drops.
    """

    tokens: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray
    coordinates: Coordinates
    rows: jax.Array | np.ndarray | None = None


class Info(NamedTuple):
    """Of a whole step, over all processes.

    text_hash: of the ordered text ids, whatever their layout.
    fill: share of tokens that are not padding.
    tokens: how many are not padding.
    """

    text_hash: str
    fill: float
    tokens: int


def train_batches(
    config: ConfigDict,
    texts: Sequence[np.ndarray],
    *,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    then: Callable[[Batch], Any] | None = None,
) -> Iterator[tuple[Any, Info]]:
    """Batches of steps start .. train.steps - 1, each holding this process's share of the rows.

    Step s reads texts [s * rows * texts_per_row, ...) of a seeded permutation, drawn anew each epoch. A batch depends
    on (seed, step) alone. `then` is done with each where it is made, ahead of time: what it gives comes instead of the
    batch. Close the iterator to end its worker processes early. Raises UserError for bad fields.
    """
    check_training(config)
    pack = _TextSteps(config, texts, process_index, process_count)
    return prefetched(grain.MapDataset.range(start, config.train.steps).map(pack), config.run.workers, then)


def evaluation_batches(
    config: ConfigDict,
    ask: ConfigDict,
    texts: Sequence[np.ndarray],
    branches: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Batches [ask.rows, ask.texts_per_row * text_length] of groups of exactly `branches` branches.

    The texts are the first ask.texts of one permutation, the same for every cell, seed and number of branches.
    Raises UserError for sizes that do not divide and for too few texts.
    """
    check_training(config)
    check_branches(config, ask, "an ask", (branches,))
    if len(texts) < ask.texts:
        raise UserError(f"there are {len(texts)} validation texts, fewer than the {ask.texts} that are asked for")
    local = rows_of_process("rows of an ask", ask.rows, process_index, process_count)
    return _evaluation_calls(ask, texts, evaluation_layout(config, ask, branches), local)


def nominal_coordinates(config: ConfigDict, rows: int) -> Coordinates:
    """Coordinates [rows, T] of the first training rows if every text had text_length tokens: no corpus is read."""
    check_training(config)
    layout = training_layout(config)
    texts = [np.zeros(config.data.text_length, np.int32)] * layout.texts
    numbers = (divmod(row, config.data.rows) for row in range(rows))
    return stacked([layout.row(texts, _row_rng(config.seed, *number)) for number in numbers]).coordinates


def training_layout(config: ConfigDict) -> Layout:
    """The layout of a training row, as config.data describes it."""
    data = config.data
    low, high = parse_draw(data.draw)
    return Layout(
        texts=data.texts_per_row,
        length=data.texts_per_row * data.text_length,
        low=low,
        high=high,
        stagger=data.stagger,
        align=data.align,
        slots=data.slots,
        prompt=data.prompt,
        positions=data.positions,
        positions_within=data.positions_within,
    )


def evaluation_layout(config: ConfigDict, ask: ConfigDict, branches: int) -> Layout:
    """The layout of an evaluation row: a fixed number of branches, in the first slots, without staggering or skips."""
    length = ask.texts_per_row * config.data.text_length
    fixed = dict(texts=ask.texts_per_row, length=length, low=branches, high=branches, stagger=False, slots=0)
    fixed |= dict(positions="whole", positions_within=0)
    return dataclasses.replace(training_layout(config), **fixed)


class _TextSteps:
    """Maps a step to this process's rows. A function of the step alone, so that any thread or process may call it."""

    def __init__(self, config: ConfigDict, texts: Sequence[np.ndarray], process_index: int, process_count: int):
        data = config.data
        self._texts = texts
        self._seed = config.seed
        self._layout = training_layout(config)
        self._rows = data.rows
        self._local = rows_of_process("data.rows", data.rows, process_index, process_count)
        self._order = _permutation(len(texts), config.seed).batch(data.rows * data.texts_per_row)

    def __call__(self, step: int) -> tuple[Batch, Info]:
        ids = self._order[step]
        n = self._layout.texts
        _bring(self._texts, ids[self._local.start * n : self._local.stop * n])
        rows = [
            self._layout.row([self._texts[i] for i in ids[row * n : (row + 1) * n]], _row_rng(self._seed, step, row))
            for row in self._local
        ]
        tokens = int(_lengths(self._texts, ids).sum())
        return stacked(rows), Info(_hash(ids), tokens / (self._rows * self._layout.length), tokens)


def _bring(texts: Sequence[np.ndarray], ids: Iterable[int]) -> None:
    """Returns when the texts are here, where they may have to be fetched first."""
    if getattr(texts, "fetches", False):
        texts.bring(ids)


def _lengths(texts: Sequence[np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Tokens of texts. Those of other hosts' rows are not read for it, where the texts know how long they are."""
    known = getattr(texts, "lengths", None)
    return known(ids) if known else np.array([len(texts[i]) for i in ids])


def prefetched(
    steps: grain.MapDataset, workers: int, then: Callable[[Batch], Any] | None = None
) -> Iterator[tuple[Any, Info]]:
    """The steps in order, and `then` done with their batches, ahead of time: in threads, or in so many processes."""
    if then is not None:
        steps = steps.map(lambda step: (then(step[0]), step[1]))
    batches = steps.to_iter_dataset(_PREFETCH)
    if workers:
        # Its workers read absl flags, which only a program started by app.run has parsed.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(options, worker_init_fn=follow_parent)
    iterator = iter(batches)
    try:
        yield from iterator
    finally:
        iterator.close()


def follow_parent(*_) -> None:
    """A worker process outlives signals sent to the whole group, which its parent answers, but not its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _evaluation_calls(ask: ConfigDict, texts, layout: Layout, local: range) -> Iterator[Batch]:
    n = layout.texts
    order = _permutation(len(texts), _EVALUATION_SEED)
    rng = np.random.default_rng(_EVALUATION_SEED)  # nothing is random in this layout
    calls = range(0, ask.texts // n, ask.rows)
    ours = (range((first + local.start) * n, (first + local.stop) * n) for first in calls)
    _bring(texts, (order[i] for ids in ours for i in ids))
    for first in calls:
        rows = (range((first + row) * n, (first + row + 1) * n) for row in local)
        yield stacked([layout.row([texts[order[i]] for i in row], rng) for row in rows])


def _permutation(count: int, seed: int) -> grain.MapDataset:
    """The ids 0 .. count-1 in random order, again and again, each epoch in another one."""
    # grain adds the epoch to the seed: seeds 0 and 1 taken as they are would share all but one epoch.
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(count).shuffle(mixed).repeat()


def _row_rng(seed: int, step: int, row: int) -> np.random.Generator:
    return np.random.default_rng((seed, step, row))


def _hash(ids: np.ndarray) -> str:
    return hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8).hexdigest()


def stacked(rows: list[Row]) -> Batch:
    """The rows as one batch."""
    tokens, labels, coordinates = zip(*rows, strict=True)
    return Batch(np.stack(tokens), np.stack(labels), jax.tree.map(lambda *arrays: np.stack(arrays), *coordinates))
