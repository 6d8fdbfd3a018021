"""Memory of a device: what a program takes of it, by estimate and as compiled, and whether it fits."""

import math
import os
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lab.errors import UserError
from lab.model import parameter
from lab.train import canonical, partition, step
from lab.train.step import Program


def needed(executable) -> int:
    """Bytes of a device while the executable runs, as its buffer assignment says."""
    sizes = executable.memory_analysis()
    return (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
    )


def peak(executable) -> int | None:
    """Bytes of a device while the executable runs: as measured, or (CPU) as its buffer assignment says. None: of no
    single executable, where nothing is measured."""
    return _stats().get("peak_bytes_in_use") or (executable and needed(executable))


def of_device() -> int | None:
    """Bytes that a device here has: as it says, or its share of this host's (CPU). None where nothing says."""
    if limit := _stats().get("bytes_limit"):
        return limit
    names = "SC_PHYS_PAGES", "SC_PAGE_SIZE"
    known = jax.local_devices()[0].platform == "cpu" and {*names} <= {*os.sysconf_names}
    return math.prod(map(os.sysconf, names)) // jax.local_device_count() if known else None


def estimate(config: ConfigDict) -> Callable[[Mesh], int]:
    """Bytes of a device that a training step takes under a mesh, by shapes alone: nothing is compiled.

    The state and a gradient (two, where it is added up), as each array lies; what the forward pass of a microbatch
    keeps for the backward pass; of one layer what is computed again; and the largest array once more, mostly logits.
    An array as wide as the residual stream lies over rows and tokens, any other one over tensor too. What is really
    kept between operations is the compiler's choice.
    """
    program = Program.of(config)
    state = jax.eval_shape(lambda model: step.initial_state(model, program), partition.abstract(config))
    lasting = state, *[parameter.split(state.model)[1]] * (1 + (config.run.microbatches > 1))
    whole, by_heads, largest = _kept(config, config.run.remat)
    if config.run.remat != "none":
        whole_again, by_heads_again, largest = _kept(config, "none")
        whole, by_heads = whole + whole_again / config.model.layers, by_heads + by_heads_again / config.model.layers
    rows = config.data.rows // config.run.microbatches

    def needed(mesh: Mesh) -> int:
        laid = zip(jax.tree.leaves(lasting), jax.tree.leaves(parameter.shardings(lasting, mesh)), strict=True)
        held = sum(math.prod(lies.shard_shape(x.shape)) * x.dtype.itemsize for x, lies in laid)
        over = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "context"))
        tensor = mesh.shape["tensor"]
        return int(held + rows / over * (whole + (by_heads + largest) / tensor))

    return needed


def _kept(config: ConfigDict, remat: str) -> tuple[int, int, int]:
    """Bytes that a forward pass keeps of one row: in arrays as wide as the stream, in others, and in the largest."""
    config = config.copy_and_resolve_references()
    config.run.update(remat=remat, implementation="tiled")  # every implementation keeps the same
    length = config.data.texts_per_row * config.data.text_length
    structure, trainable, rest = parameter.split(partition.abstract(config))

    def backward(trainable, rest, batch):
        def loss(trainable):
            return step.summed_losses(partition.whole(nnx.merge(structure, trainable, rest)), batch)[0]

        return jax.vjp(loss, trainable)[1]  # a tree of what it keeps

    one, two = (
        jax.tree.leaves(jax.eval_shape(backward, trainable, rest, canonical.batch_of(rows, length))) for rows in (2, 3)
    )
    of_row = [(b.size - a.size) * a.dtype.itemsize for a, b in zip(one, two, strict=True)]  # weights among them: 0
    as_stream = [x.ndim > 0 and x.shape[-1] == config.model.dim for x in one]
    whole = sum(size for size, wide in zip(of_row, as_stream, strict=True) if wide)
    return whole, sum(of_row) - whole, max(of_row)


def check(executable, config: ConfigDict) -> None:
    """Raises UserError for a training step that needs more than its device has, naming what would fit."""
    limit = _stats().get("bytes_limit")
    if not limit or (bytes_needed := needed(executable)) <= limit:
        return
    temporary = executable.memory_analysis().temp_size_in_bytes
    raise UserError(unfit(config, bytes_needed - temporary, temporary, limit))


def unfit(config: ConfigDict, held: int, temporary: int, limit: float, over: int = 1) -> str:
    """What is said of a training step that does not fit, and what to choose. held: bytes that are left when it is over,
    which grow with the model alone; temporary: those besides, which grow with the rows that are computed at once.
    over: devices that these rows lie over."""
    told = f"a training step needs {(held + temporary) / 2**30:.1f} GiB of a device, and it has {limit / 2**30:.1f}"
    room, now = limit - held, config.run.microbatches
    parts = [n for n in range(now + 1, config.data.rows + 1) if config.data.rows % (n * over) == 0]
    enough = [n for n in parts if n * room >= now * temporary]
    ways = [f"run.microbatches = {enough[0]}"] if room > 0 and enough else []
    ways += [f"run.remat = {'dots' if config.run.remat == 'none' else 'full'}"] * (config.run.remat != "full")
    return f"{told}; choose {' or '.join([*ways, 'more devices (run.mesh.fsdp)', 'fewer data.rows'])}"


def _stats() -> dict:
    return jax.local_devices()[0].memory_stats() or {}
