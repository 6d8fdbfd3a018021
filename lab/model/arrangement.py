"""The order in which a batch's tokens reach a model: free, since attention and everything else reads coordinates."""

import jax
import numpy as np

from lab import kernels
from lab.kernels import order
from lab.model import position, stretched
from lab.model.mixers import MIXERS
from lab.model.relative import Relative
from lab.model.spec import biased, layer_specs


class Arrangement:
    """Puts the tokens of each row where the rules of a model leave the fewest tiles of attention to compute.

    Rows have `length` tokens. drops: whether attention drops probabilities. Asks nothing of JAX once it is made: it may
    be called in any thread or process.
    """

    def __init__(self, model, run, length: int, drops: bool = False):
        specs = layer_specs(model)
        self._rules = [stretched.rule(spec) for spec in specs if position.of(spec).added is not Relative]
        self._free = not any(MIXERS[spec.mixer.name].in_order for spec in specs)
        sizes = kernels.tile_sizes(run.implementation, length, biased(model), drops)
        self._sizes = sizes if self._rules else None  # relative attention computes every pair

    def __call__(self, batch):
        """(the batch of [B, T] arrays with its `coordinates`, rearranged; the share of tiles that are computed)"""
        at, share = order.arrange(batch.coordinates, self._rules, self._sizes, self._free)
        return jax.tree.map(lambda x: np.take_along_axis(np.asarray(x), at, axis=1), batch), share
