"""What positions add to scores: the buckets of T5 (arXiv 1910.10683, section 2.1) and ALiBi (arXiv 2108.12409).

H: maps of attention, N: buckets.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lab.errors import UserError
from lab.kernels.bias import Bias
from lab.kernels.expressions import Term
from lab.kernels.rules import k, maximum, minimum, q
from lab.model import parameter
from lab.options import Option


class Added(nnx.Module):
    """What a layer's scores are given besides q k: a module of (config.model, H, (K, V), key); called, it makes it."""

    options: ClassVar[dict[str, Option]] = {}
    makes: ClassVar[type] = Bias
    work_per_head: ClassVar[int] = 0  # multiplications for a token and a head, beside those of keys

    def __init__(self, model, heads: int, widths: tuple[int, int], key: jax.Array):
        pass

    @classmethod
    def check(cls, model) -> None:
        """Refuses options that mean nothing."""

    @classmethod
    def shares(cls, model) -> bool:
        """Whether the layers have one in common."""
        return False

    def __call__(self) -> Any:
        raise NotImplementedError


class Buckets(Added):
    """A learned number for each head and bucket of max(q.time - k.time, 0). It does not decay, as no bias does.

    Shorter distances than N / 2 have a bucket each; longer ones share N / 2 whose widths grow, up to position.distance,
    from where on the last one serves all. Drawn from N(0, 1/D), as `transformers` does. T5 also leaves scores unscaled,
    which is mixer.softmax_scale = 1.
    """

    options: ClassVar[dict[str, Option]] = {
        "buckets": Option(32, "of distances, each with a learned bias: an even number", least=4, most=2**12),
        "distance": Option(128, "time steps from which on all share the last bucket", least=2, most=2**20),
        "shared": Option(True, "all layers share one table, as in T5"),
    }

    def __init__(self, model, heads: int, widths: tuple[int, int], key: jax.Array):
        N, spread = model.position.buckets, model.dim**-0.5
        self.table = parameter.table(key, (heads, N), ("heads", "bucket"), spread, decay=False)
        distance, thresholds = maximum(q.time - k.time, 0), wide_buckets(N, model.position.distance)
        self.index = (minimum(distance, N // 2) + distance.reached(thresholds)).tree

    @classmethod
    def check(cls, model) -> None:
        N, distance = model.position.buckets, model.position.distance
        if N % 2:
            raise UserError(f"model.position.buckets = {N} must be even: half of them are of one distance each")
        begins = wide_buckets(N, distance) if distance > N // 2 else (0, 0)
        if any(a >= b for a, b in zip((N // 2, *begins), begins, strict=False)):
            raise UserError(
                f"model.position.distance = {distance} leaves some of model.position.buckets = {N} without a distance; "
                "choose a longer distance, or fewer buckets"
            )

    @classmethod
    def shares(cls, model) -> bool:
        return model.position.shared

    def __call__(self) -> Bias:
        return Bias(Term(self.index), self.table[...])


def wide_buckets(N: int, distance: int) -> tuple[int, ...]:
    """Where the buckets N / 2 + 1 to N - 1 begin: the bucket of n >= N / 2 is N / 2 plus the whole part of
    ln(2 n / N) / ln(2 distance / N) * N / 2, rounded in float32 as `transformers` rounds it."""
    narrow = N // 2
    n = np.arange(narrow, distance + 1)
    share = np.log(n.astype(np.float32) / np.float32(narrow)) / np.float32(np.log(distance / narrow))
    bucket = np.minimum(narrow + (share * np.float32(narrow)).astype(np.int64), N - 1)
    return tuple(int(n[np.argmax(bucket >= b)]) for b in range(narrow + 1, N))


class Slopes(Added):
    """ALiBi: a fixed slope of each head times k.time - q.time, after the scale."""

    def __init__(self, model, heads: int, widths: tuple[int, int], key: jax.Array):
        self.slopes = parameter.FixedTable(jnp.asarray(alibi_slopes(heads), jnp.float32))

    def __call__(self) -> Bias:
        return Bias(k.time - q.time, slope_H=self.slopes[...])


def alibi_slopes(heads: int) -> np.ndarray:
    """[H]: 2^(-8 k / H) for k = 1..H, if H is a power of two; else those of the power h below H, and then every other
    one of those of 2 h."""
    power = 2 ** (heads.bit_length() - 1)
    own = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * (heads - power), 2) / (2 * power))
    return np.concatenate([own, between])
