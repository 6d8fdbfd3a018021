"""Memory of a device: what a program takes of it, and whether it fits before its first step."""

import jax
from ml_collections import ConfigDict

from lab.errors import UserError


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
