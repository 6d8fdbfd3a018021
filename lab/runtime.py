"""The process the lab runs in: memory allocator, CPU devices, compile cache, compile counts, and how it is stopped.

Import this first and call `tune_allocator` before anything imports JAX.
"""

import collections
import ctypes
import itertools
import math
import os
import platform
import signal
import sys
from collections.abc import Callable

from lab import cluster, watch
from lab.errors import UserError
from lab.storage import cache_directory


def tune_allocator() -> None:
    """Keeps freed memory in the process (glibc only): XLA's CPU buffers are otherwise mapped anew at every step.

    About 10% of a small step. If the environment sets any MALLOC_ variable, nothing is changed.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    limit = 2**31 - 1
    # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of <malloc.h>
    for option, value in ((-8, 1), (-3, limit), (-1, limit), (-2, 2**28)):
        mallopt(option, value)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_devices(rows: int, mesh, processes: int = 1) -> int:
    """CPU devices of this process: as the mesh says or, if an axis is -1, one per core as far as rows divide."""
    known = math.prod(size for size in mesh.values() if size > 0)
    if min(mesh.values()) > 0:
        return max(known // processes, 1)
    over_rows = processes * max(mesh.data, 1) * max(mesh.fsdp, 1)
    fitting = [n for n in range(1, cores() // known + 1) if rows % (n * over_rows) == 0]
    return max(fitting, default=1) * known


def start(config) -> cluster.Cluster:
    """Configures JAX for this process and joins the others that the environment names. Call once, first."""
    found = cluster.find(os.environ)
    simulate_devices(config, found.processes)
    keep_programs()
    if found.address:
        cluster.join(found, config.run.join_timeout, config.run.heartbeat_timeout)
    if found.processes > 1:
        watch.start(found.process, found.processes, config.run)
    return found


def simulate_devices(config, processes: int = 1) -> None:
    """Sets how many CPU devices this process has, unless the environment does."""
    import jax

    explicit = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not explicit and "JAX_NUM_CPU_DEVICES" not in os.environ:
        # Of the asks the one that every study has: a further one must fit the devices, and change none.
        rows = math.gcd(config.data.rows // max(config.run.microbatches, 1), config.evaluate.loss.rows)
        jax.config.update("jax_num_cpu_devices", cpu_devices(rows, config.run.mesh, processes))


def keep_programs() -> None:
    """Keeps compiled programs in the lab's cache, for other processes too."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def start_alone() -> None:
    """The same for a command that reads no study's config and runs on one host."""
    tune_allocator()
    keep_programs()
    open_devices()


def open_devices() -> None:
    """Takes hold of the devices. Raises UserError where there are none of the kind that is asked for."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where a known platform has no plugin
        said = (str(error).strip().splitlines() or ["its plugin is not installed"])[0]
        asked = os.environ.get("JAX_PLATFORMS")
        raise UserError(
            f"JAX opens no device{f' of JAX_PLATFORMS = {asked}' if asked else ''} ({said}); choose cpu, cuda or tpu "
            "there, or unset it"
        ) from error


def described(found: cluster.Cluster, mesh: str, rows: list[int]) -> str:
    """One line of what a study runs on. mesh: in words. rows: of the batches of its cells."""
    import jax

    each = " or ".join(str(count // found.processes) for count in sorted(set(rows)))
    devices = f"{jax.device_count()} {jax.devices()[0].platform} devices, {jax.local_device_count()} here"
    return f"{found}; {devices}; mesh {mesh}; {each} rows of a batch for each process"


def environment(mesh) -> dict:
    """What a result depends on beside its config: recorded with it."""
    import jax
    import jaxlib

    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": cores(),
    }


class CompileCounts:
    """How often each function was compiled since this was made, and for how many seconds."""

    def __init__(self):
        import jax

        self.counts, self.seconds = collections.Counter(), collections.Counter()
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            name = details.get("fun_name", "?").removeprefix("jit(").removesuffix(")")
            self.counts[name] += 1
            self.seconds[name] += duration

    def __str__(self) -> str:
        """The training and evaluation programs, and those of instruments: how many of each, in how many seconds."""
        further = [name for name in ("train_steps", "measure", "measure_members") if self.counts[name]]
        names = ["train_step", "evaluation_step", *further]
        return ", ".join(f"{name} {self.counts[name]} ({self.seconds[name]:.1f} s)" for name in names)


def stop_requests() -> Callable[[int], bool]:
    """A function of the step that says whether SIGTERM or Ctrl-C came; over several hosts, the same answer on all.

    A second Ctrl-C ends at once.
    """
    import jax
    from jax.experimental import multihost_utils

    came, agreed, calls, several = [], [], itertools.count(), jax.process_count() > 1

    def note(number, frame):
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        os.write(2, b"\nlab: stopping after this step, with a checkpoint\n")
        if several:
            signal.raise_signal(signal.SIGTERM)

    def stop_together(step: int) -> bool:
        # The hosts agree on a number that must only grow: steps begin again with every run, calls do not.
        watch.tell(step)
        if multihost_utils.reached_preemption_sync_point(next(calls)):
            agreed.append(step)
        return bool(agreed)

    signal.signal(signal.SIGINT, note)
    if several:  # JAX's own runtime catches SIGTERM
        return stop_together
    signal.signal(signal.SIGTERM, note)
    return lambda step: bool(came)
