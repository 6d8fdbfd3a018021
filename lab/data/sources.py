"""The kinds of data behind one set of functions, chosen by data.corpus: texts in branches, and generated probes."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from lab.coordinates import Coordinates
from lab.data import checks, dataset, generated, pipeline
from lab.data.corpora import CORPORA
from lab.data.dataset import Data
from lab.data.pipeline import Batch, Info
from lab.data.probes import PROBES
from lab.errors import choose
from lab.options import Part, Room, leaves


class Source(NamedTuple):
    """What every kind of data owes; the functions of this module say what each gives."""

    check: Callable
    open: Callable
    train_batches: Callable
    nominal_coordinates: Callable


TEXTS = Source(checks.check_training, dataset.open, pipeline.train_batches, pipeline.nominal_coordinates)
PREPARED = TEXTS._replace(open=dataset.open_prepared)
PROBE = Source(generated.check, generated.open, generated.train_batches, generated.nominal_coordinates)
DATA = Room({}, (Part("corpus", CORPORA | PROBES, "stdlib", "where texts come from, or a probe", at=""),))
SOURCES = dict.fromkeys(CORPORA, TEXTS) | {"prepared": PREPARED} | dict.fromkeys(PROBES, PROBE)


def source(config: ConfigDict) -> Source:
    """The kind of data that data.corpus names. Raises UserError for an unknown name."""
    return SOURCES[choose("data.corpus", config.data.corpus, SOURCES)]


def check(config: ConfigDict) -> None:
    """Raises UserError for the first field of config.data that cannot work."""
    choose("data.corpus", config.data.corpus, SOURCES)
    DATA.check(leaves(config.data), "data.")
    checks.check_size("data", config.data, config.data.text_length)
    source(config).check(config)


def open(config: ConfigDict) -> Data:
    """The data of a config: texts tokenised into the cache, or nothing to read. Raises UserError."""
    check(config)
    return source(config).open(config)


def train_batches(config: ConfigDict, texts, **options) -> Iterator[tuple[Batch, Info]]:
    """Batches of steps start .. train.steps - 1. Options: start, process_index, process_count, then."""
    return source(config).train_batches(config, texts, **options)


def nominal_coordinates(config: ConfigDict, rows: int) -> Coordinates:
    """Coordinates [rows, T] of the first training rows if every text had text_length tokens."""
    return source(config).nominal_coordinates(config, rows)
