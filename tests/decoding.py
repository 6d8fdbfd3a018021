"""Requests as rows of a full pass, laid out as packing does, and one engine shape for all tests."""

import functools

import jax
import numpy as np
import tiny
import variants

from lab.coordinates import Coordinates
from lab.decode.engine import Engine
from lab.kernels import tiles

SHAPE = dict(rows=2, length=960, branches=tiles.FEW + 2, chunk=4)  # some read their own texts alone
LENGTH = 64  # tokens of a full pass
# The prompt and a branch of its own are all that a token sees, and nothing turns by the flat index.
ALONE = dict(model__rule="own_branch", model__position__unselected="time")


@functools.cache
def built(variant: str, **overrides):
    return tiny.model(variants.config(variant, **overrides))


def engine(model, **changed) -> Engine:
    return Engine(model, **SHAPE | changed)


def tokens(rng, count: int) -> list[int]:
    return rng.integers(0, tiny.VOCABULARY, count).tolist()


def run(engine: Engine, until=None) -> dict[tuple[int, int], list[int]]:
    """{(request, branch): tokens} of everything that is in the engine, stepped until nothing is left."""
    found: dict[tuple[int, int], list[int]] = {}
    while engine.busy:
        for event in engine.step():
            found.setdefault((event.request, event.branch), []).extend([] if event.token is None else [event.token])
    return found


def row(prompt: list[int], texts: dict[int, list[int]], length: int):
    """(tokens, coordinates) [1, length]: the prompt, then the tokens of the branches by time and branch."""
    P, n = len(prompt), len(texts)
    laid = [(time, 0, token, time) for time, token in enumerate(prompt)]
    laid += [
        (P + i, branch, token, P + i * n + rank)
        for rank, (branch, text) in enumerate(sorted(texts.items()))
        for i, token in enumerate(text)
    ]
    time, branch, held, index = np.array(sorted(laid), np.int32).T
    at = Coordinates.padding(1, length).map(np.copy)  # its fields are one array
    for name, values in dict(segment=0 * time, branch=branch, time=time, index=index).items():
        getattr(at, name)[0, : len(time)] = values
    return np.pad(held, (0, length - len(held)))[None], at


@functools.cache
def full_pass():
    return jax.jit(lambda model, tokens, at: model(tokens, at))


def short_of_the_best(model, prompt: list[int], texts: dict[int, list[int]], given: dict[int, int]) -> float:
    """By how much a generated token's logit misses the largest at most, in one pass without a cache.

    given: tokens that each text began with.
    """
    held, at = row(prompt, texts, LENGTH)
    z = np.asarray(full_pass()(model, held, at))[0]
    places = {
        (b, t): i for i, (s, b, t) in enumerate(zip(at.segment[0], at.branch[0], at.time[0], strict=True)) if s == 0
    }
    missing = [
        z[before].max() - z[before, token]
        for branch, text in texts.items()
        for i, token in enumerate(text)
        if i >= given[branch]
        for before in [places[(branch if i else 0, len(prompt) + i - 1)]]
    ]
    return max(missing)
