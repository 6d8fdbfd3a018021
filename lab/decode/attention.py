"""The kernel of attention that an engine takes on a GPU: the one that reads limits there, if it passes a trial."""

import dataclasses
import logging
from collections.abc import Iterator

import jax
import numpy as np
from jax import default_backend

from lab import kernels
from lab.coordinates import Coordinates
from lab.kernels import trial
from lab.kernels.trial import Problem

KERNEL = "pallas_triton"
TOKENS, SLOTS = (1, 64), 1024  # of a row: the queries of a step, few and many, and the keys


def settled(model):
    """The model as an engine runs it, which on a GPU names the kernel.

    Otherwise "auto" is `tiled`, which waits there for the host at every turn of its loops. It stays so where the kernel
    is not as right as its rounding allows on small texts that fork, of the model's own heads, and where it does not
    run; a warning says why then. An implementation that the model names is taken as it is.
    """
    biased = any(block.mixer.biased for block in model.blocks)
    if model.execution.implementation != "auto" or default_backend() != "gpu" or biased:
        return model
    if why := kernels.lacks(KERNEL) or next(filter(None, map(fault, problems(model))), None):
        logging.warning("attention: %s %s; decoding with tiled, which is slow on a GPU", KERNEL, why)
        return model
    model = jax.tree.map(lambda w: w, model)
    model.execution = model.execution._replace(implementation=KERNEL)
    return model


def fault(problem: Problem) -> str | None:
    """What is wrong with the kernel on this machine, if anything is."""
    try:
        found = trial.numbers(problem, KERNEL, np.random.default_rng(0))
    except Exception as error:  # of a compiler, of a device: whatever it is, the kernel is not taken
        said = (str(error).strip().splitlines() or [""])[0]
        return f"does not run here ({type(error).__name__}: {said[:200]})"
    for name, error in found["errors"].items():
        if not error <= found["allowed"][name]:
            return f"is wrong here, by {error:.2g} of {name} ({problem})"
    return None if found["same"] else f"does not repeat itself to the bit ({problem})"


def problems(model) -> Iterator[Problem]:
    """Each way in which layers call attention, once."""
    found = {}
    for T in TOKENS:
        for call in calls(model, T):
            assert not call.pop("biased")
            problem = Problem(**call, training=False, at=(), forked=True)
            found[problem.program()] = problem
    return iter(found.values())


def calls(model, T: int) -> list[dict]:
    """Of attention, by T tokens over a cache."""

    def extended(model):
        at = Coordinates.padding(1, T).map(np.asarray)
        cache = model.init_cache(1, SLOTS, branches=T)
        nodes = lambda at: dataclasses.replace(at, node=0 * at.time)  # noqa: E731
        cache = cache._replace(coordinates=nodes(cache.coordinates))
        limits, slots = np.zeros((1, 1, 1), np.int32), np.arange(T, dtype=np.int32)[None]
        return model.extend(0 * at.time, nodes(at), cache, slots_BT=slots, limits=limits)

    with kernels.recorded() as found:
        jax.eval_shape(extended, model)
    return found
