"""Batches of probes, made on the fly: in training functions of (seed, step, row), in evaluation of the row alone."""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from lab.coordinates import Coordinates
from lab.data import cache
from lab.data.checks import at_least, at_most_once, rows_of_process
from lab.data.dataset import Data
from lab.data.packing import Row, parse_draw
from lab.data.pipeline import Batch, Info, prefetched, stacked
from lab.data.probes import BLANK, FIRST, PROBES, Probe, RowSettings
from lab.data.tokenizers import Symbols
from lab.errors import UserError

_TRAINING, _EVALUATION, ASKED = 0, 1, 2  # the first number of a seed: nothing of one is drawn as of another


def check(config: ConfigDict) -> None:
    """Raises UserError for the first field of config.data that cannot work with the others."""
    data = config.data
    for difficulty in parse_draw(data.probe.difficulty, "data.probe.difficulty"):
        _check_difficulty(config, "data.probe.difficulty", difficulty)
    ids = FIRST + PROBES[data.corpus].alphabet(settings_of(data))
    if ids > config.model.vocabulary:
        raise UserError(
            f"model.vocabulary = {config.model.vocabulary} is fewer than the {ids} ids of the probe {data.corpus}; "
            f"raise it to at least {ids}"
        )


def check_difficulties(config: ConfigDict, ask: ConfigDict, field: str) -> None:
    """The same of an ask by difficulty, called `field`."""
    at_least(f"{field}.texts", ask.texts, 1)
    if ask.texts % ask.rows:
        upper = -(-ask.texts // ask.rows) * ask.rows
        raise UserError(
            f"{field}.texts = {ask.texts} is not a multiple of {field}.rows = {ask.rows}; the next is {upper}"
        )
    if not ask.difficulties:
        raise UserError(f"{field}.difficulties is empty; choose at least one difficulty, as (2, 4, 8)")
    at_most_once(f"{field}.difficulties", ask.difficulties)
    for difficulty in ask.difficulties:
        _check_difficulty(config, f"{field}.difficulties", difficulty)


def open(config: ConfigDict) -> Data:
    """No texts, and a tokenizer that writes ids as numbers. Raises UserError for a field that cannot work."""
    check(config)
    tokenizer = Symbols(config.model.vocabulary)
    fingerprint = cache.digest("probe", config.data.corpus, tokenizer.fingerprint)
    return Data(None, None, tokenizer, fingerprint, fingerprint)


def train_batches(
    config: ConfigDict,
    texts: None = None,
    *,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    then: Callable[[Batch], Any] | None = None,
) -> Iterator[tuple[Any, Info]]:
    """Batches of steps start .. train.steps - 1, as `pipeline.train_batches` gives them.

    The difficulty of each row is uniform over those of data.probe.difficulty. Raises UserError for bad fields.
    """
    check(config)
    local = rows_of_process("data.rows", config.data.rows, process_index, process_count)
    make = _ProbeSteps(config, local)
    return prefetched(grain.MapDataset.range(start, config.train.steps).map(make), config.run.workers, then)


def evaluation_batches(
    config: ConfigDict, ask: ConfigDict, texts: None, difficulty: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Batches [ask.rows, text_length] of one difficulty, the same for every cell and seed. Raises UserError."""
    check(config)
    _check_difficulty(config, "difficulty", difficulty)
    local = rows_of_process("rows of an ask", ask.rows, process_index, process_count)
    probe, settings = PROBES[config.data.corpus], settings_of(config.data)

    def batches() -> Iterator[Batch]:
        for first in range(0, ask.texts, ask.rows):
            rngs = [np.random.default_rng((_EVALUATION, 0, difficulty, first + row)) for row in local]
            yield stacked([padded_row(probe, rng, difficulty, settings) for rng in rngs])

    return batches()


def nominal_coordinates(config: ConfigDict, rows: int) -> Coordinates:
    """Coordinates [rows, T] of the first training rows."""
    check(config)
    make = _ProbeSteps(config, range(0))
    return stacked([make.row(*divmod(row, config.data.rows)) for row in range(rows)]).coordinates


def settings_of(data: ConfigDict) -> RowSettings:
    """What the rows of config.data are made with."""
    questions = data.probe.questions if "probe.questions" in PROBES[data.corpus].options else 0
    return RowSettings(data.text_length, data.probe.symbols, data.probe.objects, questions)


def padded_row(probe: Probe, rng: np.random.Generator, difficulty: int, settings: RowSettings) -> Row:
    """A row of settings.length tokens: blanks without labels fill it, whatever the difficulty."""
    made = probe.row(rng, difficulty, settings)
    if isinstance(made, Row):
        return made
    short = (0, settings.length - len(made[0]))
    filled = (
        np.pad(x, short, constant_values=fill).astype(np.int32) for x, fill in zip(made, (BLANK, -1), strict=True)
    )
    return Row(*filled, Coordinates.single(1, settings.length).map(lambda x: x[0]))


class _ProbeSteps:
    """Maps a step to this process's rows. A function of the step alone, so that any thread or process may call it."""

    def __init__(self, config: ConfigDict, local: range):
        data = config.data
        self._seed, self._corpus, self._local, self._rows = config.seed, data.corpus, local, data.rows
        self._settings = settings_of(data)
        self._low, self._high = parse_draw(data.probe.difficulty, "data.probe.difficulty")

    def __call__(self, step: int) -> tuple[Batch, Info]:
        # What a probe does not read is 0, and left out: hashes from before it was declared stay as they are.
        settings = [number for number in self._settings if number]
        made_with = (self._corpus, *settings, self._low, self._high, self._rows, self._seed, step)
        tokens = self._rows * self._settings.length
        rows = [self.row(step, row) for row in self._local]
        return stacked(rows), Info(cache.digest(*made_with)[:16], 1.0, tokens)

    def row(self, step: int, row: int) -> Row:
        """That of so many in a step."""
        rng = np.random.default_rng((_TRAINING, self._seed, step, row))
        difficulty = int(rng.integers(self._low, self._high + 1))
        return padded_row(PROBES[self._corpus], rng, difficulty, self._settings)


def _check_difficulty(config: ConfigDict, field: str, difficulty: int) -> None:
    corpus, settings = config.data.corpus, settings_of(config.data)
    probe = PROBES[corpus]
    at_least(field, difficulty, probe.easiest)
    if (needed := probe.tokens(difficulty, settings)) > settings.length:
        raise UserError(
            f"{field} = {difficulty} of the probe {corpus} needs rows of {needed} tokens, "
            f"over data.text_length = {settings.length}; lower the one or raise the other"
        )
    if probe.symbols(difficulty) > probe.alphabet(settings):
        raise UserError(
            f"{field} = {difficulty} of the probe {corpus} needs {probe.symbols(difficulty)} symbols, over "
            f"data.probe.symbols = {settings.symbols}; lower the one or raise the other"
        )
