"""Several hosts of one program: process 0 looks at the files, and all do what it found."""

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


def agreed(values: list[int]) -> list[int]:
    """What process 0 found, on every process."""
    if jax.process_count() == 1:
        return values
    return multihost_utils.broadcast_one_to_all(np.asarray(values, np.int32)).tolist()
