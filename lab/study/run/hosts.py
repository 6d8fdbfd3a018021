"""Several hosts of one program: process 0 looks at the files, and all do what it found."""

import itertools
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax._src import distributed  # nothing public waits without devices
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lab.errors import UserError


def meet(name: str, patience: int) -> None:
    """Waits until all processes have come to this place, for `patience` seconds. Each place has a name of its own.

    It needs no device. Where JAX itself makes processes wait for each other it gives them minutes, or half of one.
    """
    client = distributed.global_state.client
    if client is None:
        return
    try:
        client.wait_at_barrier(f"lab/{name}", 1000 * patience)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise UserError(f"other processes have not come as far in {patience} s (run.join_timeout): {name}") from error


def connect(mesh: Mesh, patience: int) -> None:
    """Opens the connections over which the CPUs of several processes compute together: those of every axis of the mesh
    and of several at once, and those of one device of each process.

    Gloo opens them when a group of devices first computes, and gives its last process 30 seconds to come; connected
    ones wait for each other for half an hour. A process may take longer than 30 seconds to read, trace or compile.
    """
    if jax.process_count() == 1 or jax.devices()[0].platform != "cpu":
        return
    hosts = Mesh(np.array(jax.devices()).reshape(jax.process_count(), -1), ("processes", "local_devices"))
    axes, number = [axis for axis, size in mesh.shape.items() if size > 1], np.float32(0)
    several = (over for count in range(1, len(axes) + 1) for over in itertools.combinations(axes, count))
    programs = []
    for among, over in ((hosts, "processes"), *((mesh, over) for over in several)):
        summed = jax.shard_map(lambda x, over=over: jax.lax.psum(x, over), mesh=among, in_specs=P(), out_specs=P())
        programs.append(jax.jit(summed).lower(number).compile())
    meet("connecting", patience)
    for run in programs:
        jax.block_until_ready(run(number))


def first(action: Callable[[], None]) -> None:
    """Does on process 0 what one is to do; a mistake of the user that it finds ends all of them."""
    found = None
    if jax.process_index() == 0:
        try:
            action()
        except UserError as error:
            found = error
    if agreed([found is not None])[0]:
        raise found or UserError("process 0 has found a mistake, and says which")


def check_all_see(directory: pathlib.Path) -> None:
    """Raises UserError on all hosts where one of them has no such directory: process 0 has made it."""
    there = np.asarray(directory.is_dir())
    if jax.process_count() > 1 and not multihost_utils.process_allgather(there).all():
        raise UserError(
            f"{directory} is not seen by all hosts: a study in an object store is worked on in a copy that they share; "
            "set LAB_CACHE to a directory on a disk that all of them see"
        )


def agreed(values: list[int]) -> list[int]:
    """What process 0 found, on every process."""
    if jax.process_count() == 1:
        return values
    return multihost_utils.broadcast_one_to_all(np.asarray(values, np.int32)).tolist()
