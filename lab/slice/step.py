"""Compiles the training step of a config for a slice of TPUs that is not here, with libtpu's own compiler."""

import contextlib
import importlib.util
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lab import kernels
from lab.errors import UserError
from lab.model import mesh as lab_mesh
from lab.model import parameter
from lab.slice import chips, hlo
from lab.slice.chips import Chip
from lab.train import canonical, compiled, dropout, optimizer, partition
from lab.train.step import Program, initial_state

ENVIRONMENT = (
    "python -m venv .venv-tpu && .venv-tpu/bin/pip install -r requirements-tpu.txt, and plan with .venv-tpu/bin/python"
)
# A description of the machine to compile for is all that libtpu may look for.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
AGAIN = 30  # seconds after which it is said again that a program is being compiled


class Slice(NamedTuple):
    """TPUs that are not here. sides: of the slice, in chips; devices: what JAX compiles for, one for each chip."""

    name: str
    chip: Chip
    sides: tuple[int, ...]
    devices: list


class Compiled(NamedTuple):
    """A training step on a slice, of one chip. held: bytes of weights, optimizer and batch; temporary: bytes besides,
    None if the compiler does not say; limit: bytes of HBM that a program may take. work: None if it does not fit."""

    mesh: Mesh
    seconds: float
    held: int
    temporary: int | None
    limit: float
    work: hlo.Work | None

    @property
    def total(self) -> int:
        return self.held + (self.temporary or 0)


def open_slice(name: str) -> Slice:
    """The slice of a name such as "v5e:16x16". Raises UserError for an unknown one, and where there is no libtpu.
    Call it before a device is used."""
    chip = chips.parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name} needs libtpu, which has an environment of its own: {ENVIRONMENT}")
    os.environ.update(ALONE)
    jax.config.update("jax_platforms", "cpu")
    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # what it raises, and of which class, is not promised
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology={name} is no slice that libtpu knows ({said}); choose such as {', '.join(chip.slices)}"
        ) from error
    sides = tuple(1 + max(along) for along in zip(*(device.coords for device in devices), strict=True))
    return Slice(name, chip, sides, devices)


def check(config, of: Slice) -> Mesh:
    """The mesh of a config over a slice. Raises UserError for one that does not cover it, and for a batch that does not
    divide over it."""
    mesh = lab_mesh.make(config.run.mesh, of.devices)
    rows, tokens = config.data.rows // config.run.microbatches, config.data.texts_per_row * config.data.text_length
    lab_mesh.check_rows(mesh, "data.rows / run.microbatches", rows, tokens)
    return mesh


def compile_for(config, of: Slice, say: Callable[[str], None]) -> Compiled:
    """The training step of a config, as lab.main would compile it there."""
    mesh, begun = check(config, of), time.monotonic()
    inputs = described(config, mesh)
    held = sum(_bytes(x) for x in jax.tree.leaves(inputs))
    with kernels.compiled_for("tpu"), _telling(say, begun):
        try:
            program = compiled.train_step(*inputs, Program.of(config), mesh)
        except jax.errors.JaxRuntimeError as error:
            return _unfit(mesh, time.monotonic() - begun, held, error)
    sizes = program.memory_analysis()
    kept = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    work = hlo.read(program.as_text())
    spent = time.monotonic() - begun
    return Compiled(mesh, spent, kept, sizes.temp_size_in_bytes, of.chip.hbm, work)


def described(config, mesh: Mesh) -> tuple:
    """(state, numbers, batch) of a training step over the mesh: shapes, types and shardings."""
    program = Program.of(config)
    state = jax.eval_shape(lambda model: initial_state(model, program), partition.abstract(config))
    numbers = {name: np.float32(0) for name in optimizer.ones(program.optimizer)}
    numbers |= dropout.numbers_by_step(config)(0)
    whole, tokens = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, lab_mesh.TOKENS)

    def laid(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return (
        jax.tree.map(laid, state, parameter.shardings(state, mesh)),
        {name: laid(x, whole) for name, x in numbers.items()},
        jax.tree.map(lambda x: laid(x, tokens), canonical.abstract_batch(config)),
    )


def _bytes(x) -> int:
    """Of an array, on one device."""
    return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize


def _unfit(mesh: Mesh, spent: float, held: int, error: Exception) -> Compiled:
    """What the compiler says of a program for which there is not enough HBM. Raises what is said of others again."""
    said = re.search(r"(?:Used |temporaries \()([\d.]+[KMGT])\b.{,40}?(?: of |HBM \()([\d.]+[KMGT])\b", str(error))
    if not said or "RESOURCE_EXHAUSTED" not in str(error) or "vmem" in str(error):
        raise error
    used, limit = (float(n[:-1]) * 1024 ** (1 + "KMGT".index(n[-1])) for n in said.groups())
    return Compiled(mesh, spent, held, max(int(used) - held, 0), limit, None)


@contextlib.contextmanager
def _telling(say: Callable[[str], None], begun: float) -> Iterator[None]:
    """Within it, it is said from time to time how long it has taken."""
    done = threading.Event()

    def tell():
        while not done.wait(AGAIN):
            say(f"still compiling, after {time.monotonic() - begun:.0f} s")

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()
