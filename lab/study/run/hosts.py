"""Several hosts of one program: process 0 looks at the files, and all do what it found."""

import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from lab.errors import UserError


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
