"""Several hosts of one program: process 0 looks at the files, and all do what it found."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def agreed(values: list[int]) -> list[int]:
    """What process 0 found, on every process."""
    if jax.process_count() == 1:
        return values
    return multihost_utils.broadcast_one_to_all(np.asarray(values, np.int32)).tolist()
