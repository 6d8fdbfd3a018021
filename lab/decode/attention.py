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
SLOTS = 4096  # keys of a trial at most: enough that up to 256 queries are a step (lab.kernels.tiles.is_step)


def settled(model, widths: tuple[int, ...], length: int):
    """The model as an engine runs it, which on a GPU names the kernel. widths: tokens of a row in its calls.

    Otherwise "auto" is `tiled`, which waits there for the host at every turn of its loops. It stays so where a position
    adds to scores, and where weights lie on several devices. It stays so, too, where the kernel fails its trial, and a
    warning says why. The trial is of small texts that fork, of the model's own heads and of these widths. It runs in
    this process: a kernel that crashes ends it, one that hangs holds it. What the model names is taken as it is.
    """
    biased = any(block.mixer.biased for block in model.blocks)
    spread = len(model.embedding[...].sharding.device_set) > 1
    if model.execution.implementation != "auto" or default_backend() != "gpu" or biased or spread:
        return model
    named = jax.tree.map(lambda w: w, model)
    named.execution = model.execution._replace(implementation=KERNEL)
    why = kernels.lacks(KERNEL) or next(filter(None, map(fault, problems(named, widths, min(length, SLOTS)))), None)
    if why:
        logging.warning("attention: %s %s; decoding with tiled, which is slow on a GPU", KERNEL, why)
        return model
    logging.info("attention: %s (it passed its trial here)", KERNEL)
    return named


_faults: dict[str, str | None] = {}  # of what has been tried in this process


def fault(problem: Problem) -> str | None:
    """What is wrong with the kernel on this machine, if anything is."""
    if problem.program() not in _faults:
        _faults[problem.program()] = _fault(problem)
    return _faults[problem.program()]


def _fault(problem: Problem) -> str | None:
    try:
        found = trial.numbers(problem, KERNEL, np.random.default_rng(0))
    except Exception as error:  # of a compiler, of a device: whatever it is, the kernel is not taken
        said = (str(error).strip().splitlines() or [""])[0]
        return f"does not run here ({type(error).__name__}: {said[:200]})"
    for name, error in found["errors"].items():
        if not error <= found["allowed"][name]:
            return f"is wrong here, by {error:.2g} of {name} ({problem})"
    return None if found["same"] else f"does not repeat itself to the bit ({problem})"


def problems(model, widths: tuple[int, ...], length: int) -> Iterator[Problem]:
    """Each way in which its layers call attention, once."""
    found = {}
    for T in widths:
        for call in calls(model, T, length):
            assert not call.pop("biased")
            problem = Problem(**call, training=False, at=(), forked=True)
            found[problem.program()] = problem
    return iter(found.values())


def calls(model, T: int, length: int) -> list[dict]:
    """Of attention, by T tokens over a cache."""

    def extended(model):
        at = Coordinates.padding(1, T).map(np.asarray)
        cache = model.init_cache(1, max(T, length), branches=T)
        nodes = lambda at: dataclasses.replace(at, node=0 * at.time)  # noqa: E731
        cache = cache._replace(coordinates=nodes(cache.coordinates))
        limits, slots = np.zeros((1, 1, 1), np.int32), np.arange(T, dtype=np.int32)[None]
        return model.extend(0 * at.time, nodes(at), cache, slots_BT=slots, limits=limits)

    with kernels.recorded() as found:
        jax.eval_shape(extended, model)
    return found
