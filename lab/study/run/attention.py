"""The implementation of attention that a study takes on a GPU, found by trial before any device is held here."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterable, Iterator

import filelock
import jax
import numpy as np
from flax import nnx
from jax._src import distributed
from ml_collections import ConfigDict

from lab import data as lab_data
from lab import kernels
from lab import model as lab_model
from lab.errors import UserError
from lab.evaluate import asks
from lab.kernels import choice
from lab.kernels.trial import Problem
from lab.model import parameter
from lab.model.mixers import MIXERS
from lab.model.spec import layer_specs
from lab.storage import cache_directory, find_json, write_json
from lab.study.define import plan
from lab.study.define.cell import Cell
from lab.train import canonical, dropout, step

PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "tokamax"),
)

KEY = "lab/attention"  # of what the first host tells the others
WAIT = 3_600_000  # milliseconds that they wait for it


class Machine:
    """The GPUs of this host, as their driver names them: asking JAX would take hold of them."""

    def __init__(self, names: list[str], driver: str):
        self.names, self.driver = names, driver

    @classmethod
    def here(cls) -> "Machine | None":
        """None where JAX will not use a GPU."""
        platforms = os.environ.get("JAX_PLATFORMS", "")
        plugin = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
        if not plugin or not (platforms == "" or {"gpu", "cuda"} & {*platforms.split(",")}):
            return None
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            run = subprocess.run(asked, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        found = [line.split(", ") for line in run.stdout.splitlines() if ", " in line]
        return cls([name for name, _ in found], found[0][1]) if found and not run.returncode else None

    def described(self) -> dict:
        """JSON: on what a trial depends beside its problems."""
        versions = {}
        for name in PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return {"gpus": sorted({*self.names}), "driver": self.driver, **versions, "kernels": _sources()}


@functools.cache
def _sources() -> str:
    """A digest of all kernels, and of what tries them."""
    room = pathlib.Path(kernels.__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(room.glob("*.py")))).hexdigest()[:16]


def decide(config: ConfigDict, cells: list[Cell], workdir: pathlib.Path, say: Callable[[str], None]) -> dict | None:
    """{"name", "warning", "machine", "tried"} of the implementation that all cells of a study are to take; None where
    config.run.implementation names one, and where there is no GPU.

    A study that was begun on this machine goes on with its own; where a cell adds a bias to scores, all take one that
    does. Of several hosts the first one tries. Raises UserError for hosts whose GPUs differ.
    """
    if config.run.implementation != "auto":
        return None
    machine, hosts = Machine.here(), distributed.global_state
    here = machine.described() if machine else None
    if hosts.client is not None and hosts.process_id:
        found = json.loads(hosts.client.blocking_key_value_get(KEY, WAIT))
        if (found or {}).get("machine") != here:
            raise UserError("the hosts differ in GPUs, drivers or code; give each the same, or name run.implementation")
        return found
    found = _of_first_host(cells, machine, here, workdir, hosts.num_processes or 1, say) if machine else None
    if hosts.client is not None:
        hosts.client.key_value_set(KEY, json.dumps(found))
    return found


def _of_first_host(cells, machine, here, workdir, hosts, say) -> dict:
    before = (find_json(workdir / "plan.json") or {}).get("attention") or {}
    if before.get("machine") == here and before.get("name") in _able(cells, kernels.IMPLEMENTATIONS):
        return before
    found = _found(cells, here, len(machine.names) * hosts, say)
    if before:
        say(f"attention: {before.get('name')} was taken on another machine; runs go on here in a new segment")
    return found


def _able(cells: list[Cell], names: Iterable[str]) -> list[str]:
    """Those that can do what all cells ask of attention: one serves the whole study."""
    needs = dict(
        biased=any(asks.adds_to_scores(cell.config) for cell in cells),
        dropping=any(dropout.of_attention(cell.config.train) for cell in cells),
    )
    return [name for name in names if kernels.able(name, **needs)]


def _found(cells: list[Cell], here: dict, devices: int, say: Callable[[str], None]) -> dict:
    """{"name", "warning", "machine", "tried"}, of the cache if it is there; other processes wait for one that tries."""
    say("attention: looking at how the study calls it")
    problems = of_study(cells, devices)
    gpu = [name for name, row in kernels.IMPLEMENTATIONS.items() if row.platform == "gpu" or name == "tiled"]
    names = _able(cells, gpu)
    asked = [here, [problem.key() for problem in problems], *([] if names == gpu else [names])]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    path = cache_directory() / "attention" / f"{digest}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_suffix(".lock"))
        with lock:
            if kept := find_json(path):
                return kept
            found = _tried(problems, names, here, say)
            write_json(path, found)
            return found
    except OSError:  # a cache that cannot be written: it is tried again the next time
        return _tried(problems, names, here, say)


def _tried(problems: list[Problem], names: list[str], here: dict, say: Callable[[str], None]) -> dict:
    chosen = _chosen(problems, names, say)
    for line in table(problems, chosen):
        say(line)
    tried = [{**one._asdict(), "seconds": [*one.seconds.values()], "sums": None} for one in chosen.tried]
    return {"name": chosen.name, "warning": chosen.warning, "machine": here, "tried": tried}


def _chosen(problems: list[Problem], names: list[str], say: Callable[[str], None]) -> choice.Decision:
    """Tries those for which everything is installed."""
    absent = {name: why for name in names if (why := kernels.lacks(name))}
    chosen = choice.choose(problems, [name for name in names if name not in absent], say)
    return chosen._replace(tried=[*chosen.tried, *(choice.Tried(*one, {}, {}) for one in absent.items())])


def table(problems: list[Problem], chosen: choice.Decision) -> Iterator[str]:
    """Lines for a user: what was tried on what, and what is taken."""
    for place, problem in enumerate(problems):
        yield f"attention, problem {place + 1}: {problem}, called {problem.calls:,} times"
        for one in chosen.tried:
            told = f"{1e3 * one.seconds[place]:.3f} ms" if place in one.seconds else "—"
            yield f"  {one.name:<14} {told:>12}  {one.refused or ('' if one.same else 'not the same bits twice')}"
    yield f"attention: {chosen.name} is taken{f'; {chosen.warning}' if chosen.warning else ''}"


def of_study(cells: list[Cell], devices: int) -> list[Problem]:
    """Every distinct way in which the cells of a study call attention on one of so many devices, in training and in
    their asks."""
    found: dict[tuple, Problem] = {}
    programs = {plan.program(cell.config) + cell.config.data.draw: cell.config for cell in cells}
    for config in programs.values():
        for problem in _of_cell(config, devices):
            known = found.get(problem.key())
            calls = problem.calls + (known.calls if known else 0)
            found[problem.key()] = dataclasses.replace(problem, calls=calls)
    return [*found.values()]


def _of_cell(config: ConfigDict, devices: int) -> Iterator[Problem]:
    rows = config.data.rows // config.run.microbatches
    at = lab_data.nominal_coordinates(config, rows)
    yield from _problems(config, at, devices, True, config.train.steps * config.run.microbatches)
    for name, asked in config.evaluate.items():
        if not asks.ASKS[asked.kind].batches:
            continue  # chunks behind a cache: any implementation that has one
        asked = asked.copy_and_resolve_references()
        calls = max(asked.texts // (asked.texts_per_row * asked.rows), 1)
        asked.texts = asked.texts_per_row * asked.rows
        conditions = asks.conditions(asked)
        texts = [np.zeros(config.data.text_length, np.int32)] * asked.texts
        batch = next(iter(asks.ASKS[asked.kind].batches(config, asked, texts, conditions[-1])))
        changed = asks.remodelled(config, asked, f"evaluate.{name}")
        yield from _problems(changed, batch.coordinates, devices, False, calls * len(conditions))


def _problems(config: ConfigDict, at, devices: int, training: bool, calls: int) -> Iterator[Problem]:
    """One for each layer, as a trace of the model calls attention."""
    sizes = dict(config.run.mesh)
    fixed = math.prod(size for size in sizes.values() if size > 0)
    sizes = {axis: size if size > 0 else max(devices // fixed, 1) for axis, size in sizes.items()}
    rows = max(at.shape[0] // (sizes["data"] * sizes["fsdp"]), 1)
    local = at.map(lambda x: np.ascontiguousarray(x[:rows]))
    queries = local.map(lambda x: np.ascontiguousarray(x[:, : x.shape[1] // sizes["context"]]))
    free = not any(MIXERS[spec.mixer.name].in_order for spec in layer_specs(config.model))
    for call in _calls(config, at.shape, training):
        if call.pop("biased"):
            continue  # tiled's alone: nothing to choose
        cut = lambda shape, tokens: (rows, tokens, max(shape[2] // sizes["tensor"], 1), shape[3])  # noqa: E731
        call |= {"q": cut(call["q"], queries.shape[1]), **{n: cut(call[n], local.shape[1]) for n in "kv"}}
        yield Problem(**call, training=training, at=(queries, local), free=free, calls=calls)


def _calls(config: ConfigDict, shape: tuple[int, int], training: bool) -> list[dict]:
    """Those of a forward pass or, in training, of one with gradients, on a batch of that shape."""
    config = canonical.canonical(config)
    structure, *numbers = parameter.split(lab_model.abstract(config.model, config.run))
    loss = lambda weights, rest, batch: step.summed_losses(nnx.merge(structure, weights, rest), batch)[0]  # noqa: E731
    with kernels.recorded() as calls:
        jax.eval_shape(jax.grad(loss) if training else loss, *numbers, canonical.batch_of(*shape))
    return calls


def show(cells: list[Cell]) -> None:
    """Tries all that can run on this machine, whatever it is, and prints the table."""
    machine = Machine.here()
    platform = "gpu" if machine else os.environ.get("JAX_PLATFORMS", "").split(",")[0] or "cpu"
    here = [name for name, row in kernels.IMPLEMENTATIONS.items() if row.platform in (None, platform)]
    problems, say = of_study(cells, len(machine.names) if machine else 1), functools.partial(print, flush=True)
    for line in table(problems, _chosen(problems, _able(cells, here), say)):
        say(line)
