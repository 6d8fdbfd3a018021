"""The turns of lab.decode in benchmarks/decode.py: branches that share one prompt, or rows that have each its own."""

import copy
import functools
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import peers

from lab import runtime

runtime.start_alone()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import lab  # noqa: E402
from lab import kernels  # noqa: E402
from lab.decode.engine import Engine  # noqa: E402
from lab.decode.forest import needed_for  # noqa: E402

DTYPE = "float32" if jax.default_backend() == "cpu" else "bfloat16"


def run(engine: Engine) -> None:
    while engine.busy:
        engine.step()


@functools.partial(jax.jit, static_argnames="rows")
def repeated(state, rows: int):
    return jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), state)


class Decoder:
    """rows = 1: an engine whose row has all the branches; else one with a branch in each row."""

    def open(self, place: str, rule: str) -> dict:
        self.model, _ = lab.load(place, model=(("rule", rule), ("compute", DTYPE)))
        self.filled = None
        return {"device": jax.devices()[0].device_kind, "dtype": DTYPE}

    def prepare(self, rows: int, prompt: list[int], texts: list[list[int]], tokens: int, chunk: int) -> None:
        """Compiles an engine for branches that begin with `texts`, and generate so many tokens at most."""
        self.engine = self.texts = None  # frees them first
        self.rows, self.branches = rows, len(texts)
        each = texts if rows == 1 else texts[:1]
        self.asked = dict(prompt=prompt, branches=len(each), texts=each, most_tokens=tokens)
        self.shape = dict(length=needed_for(len(prompt), [*map(len, each)], tokens, max(chunk, 64)), chunk=chunk)
        self.engine = Engine(self.model, rows=rows, branches=len(each), **self.shape)
        self.engine.submit([0, 0], branches=len(each), most_tokens=2)
        run(self.engine)

    def first(self) -> float:
        """Seconds from when the prompt comes to when every branch has its first token."""
        for _ in range(self.rows):
            self.engine.submit(self.asked["prompt"], branches=len(self.asked["texts"]), most_tokens=1)
        start = time.perf_counter()
        run(self.engine)
        return time.perf_counter() - start

    def fill(self) -> None:
        """Puts prompt and texts into the cache; those of one row into all of them."""
        if self.rows == 1:
            self.begin(self.engine)
        else:
            self.engine.state = None
            source = self.source()
            self.engine.state = repeated(source.state, self.rows)
            self.engine.forests = [copy.deepcopy(source.forests[0]) for _ in range(self.rows)]
            self.engine.limits = None
        self.texts = [[] for _ in range(self.branches)]
        self.steps(1)
        peers.forget_peak()

    def begin(self, engine: Engine) -> None:
        engine.submit(**self.asked)
        while not engine.running or not all(made.ready for made in engine.running):
            engine.step()

    def source(self) -> Engine:
        """An engine of one row that has the prompt and a text: kept for engines of more rows."""
        if self.filled is None or self.filled[0] != (self.asked, self.shape):
            self.filled = None
            engine = Engine(self.model, rows=1, branches=1, **self.shape)
            self.begin(engine)
            self.filled = (self.asked, self.shape), engine
        return self.filled[1]

    def steps(self, count: int) -> list[float]:
        """Seconds of each of so many steps."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            events = self.engine.step()
            seconds.append(time.perf_counter() - start)
            for place, event in enumerate(events):
                self.texts[place].append(event.token)
        return seconds

    def close(self) -> dict:
        """What it took, and what the first branch has generated."""
        cache = sum(x.nbytes for x in jax.tree.leaves(self.engine.state))
        implementation = kernels.resolve(self.engine.model.execution.implementation, self.engine.length, forking=True)
        return {"cache": cache, "resident": peers.peak(), "tokens": self.texts[0], "attention": implementation}


if __name__ == "__main__":
    of = Decoder()
    peers.answer({name: getattr(of, name) for name in ("open", "prepare", "first", "fill", "steps", "close")})
