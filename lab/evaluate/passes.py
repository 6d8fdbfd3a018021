"""One pass over rows, in chunks behind a cache: memory grows with the cache, and logits are never those of a row."""

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from lab.data.checks import rows_of_process
from lab.evaluate.long import LongRows
from lab.model import mesh as lab_mesh
from lab.train import compiled
from lab.train.step import Scored


class Pass(NamedTuple):
    """How rows are scored: so many at once, `chunk` tokens at a time, with a cache of `slots` a row."""

    rows: int
    chunk: int
    slots: int

    @classmethod
    def of(cls, ask) -> "Pass":
        """That of an ask: one cache serves all of its lengths, and so does one program."""
        chunk = min(ask.chunk, max(ask.lengths))
        return cls(ask.rows, chunk, -(-max(ask.lengths) // chunk) * chunk)


def calls(of: LongRows, how: Pass) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """tokens and labels [rows, N] of each call, N padded to whole chunks: the last is filled with rows of nothing."""
    count, length = of.tokens.shape
    for first in range(0, count, how.rows):
        part = [x[first : first + how.rows] for x in (of.tokens, of.labels)]
        short = (0, how.rows - len(part[0])), (0, -length % how.chunk)
        tokens, labels = (np.pad(x, short, constant_values=-1).astype(np.int32) for x in part)
        yield tokens, labels


def score(model, tokens_BN: np.ndarray, labels_BN: np.ndarray, how: Pass, mesh, stop: Callable[[], None]) -> Scored:
    """Numpy arrays [B, N] of one call. stop(): raises where the work is to end; asked at every chunk."""
    local = rows_of_process("rows of an ask", how.rows, jax.process_index(), jax.process_count())
    place = lambda x: lab_mesh.place_rows(np.ascontiguousarray(x[local.start : local.stop]), mesh)  # noqa: E731
    cache, found, sent = compiled.empty_cache(model, how.rows, how.slots, mesh), [], None
    for start in range(0, tokens_BN.shape[1], how.chunk):
        parts = [place(x[:, start : start + how.chunk]) for x in (tokens_BN, labels_BN)]
        arguments = model, cache, *parts, np.int32(start)
        before, (sent, cache) = sent, compiled.score_chunk(*arguments, mesh)(*arguments)
        found += [] if before is None else [jax.device_get(before)]  # while the next is computed
        stop()
    found.append(jax.device_get(sent))
    return Scored(*(np.concatenate(each, axis=1) for each in zip(*found, strict=True)))


def score_all(model, of: LongRows, how: Pass, mesh, stop: Callable[[], None]) -> tuple[np.ndarray, np.ndarray, float]:
    """nats float32 [R, N] and right bool [R, N] of every label, and the seconds that it took, without compiling."""
    count, length = of.tokens.shape
    found, begun = [], time.perf_counter()
    for place, (tokens, labels) in enumerate(calls(of, how)):
        if place == 0:
            executable(model, how, mesh)
            compiled.empty_cache(model, how.rows, how.slots, mesh)  # its program is compiled too
            begun = time.perf_counter()
        found.append(score(model, tokens, labels, how, mesh, stop)[:2])
    seconds = time.perf_counter() - begun
    nats, right = (np.concatenate(each)[:count, :length] for each in zip(*found, strict=True))
    return nats, right, seconds


def executable(model, how: Pass, mesh):
    """The program of a chunk. What the compiler has freed goes back to the system: it would stand beside the cache."""
    local = rows_of_process("rows of an ask", how.rows, jax.process_index(), jax.process_count())
    nothing = lab_mesh.place_rows(np.full((len(local), how.chunk), -1, np.int32), mesh)
    cache = compiled.described_cache(model, how.rows, how.slots, mesh)
    program = compiled.score_chunk(model, cache, nothing, nothing, np.int32(0), mesh)
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return program
