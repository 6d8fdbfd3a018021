"""What a pair's coordinates add to its score: score = softcap(scale q k) + bias.

The bias of a pair is that of an integer, made of the coordinates of query and key: a row of a table (T5's buckets,
arXiv 1910.10683), or so many times a slope (ALiBi, arXiv 2108.12409), for each head. H heads, N entries of a table.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels.expressions import Term


@jax.tree_util.register_pytree_node_class
class Bias:
    """`index` looks up table_HN, or is multiplied by slope_H: one of the two. A pytree of that one array.

    An index outside 0..N-1 adds nothing. Gradients flow to the array. T5: `maximum(q.time - k.time, 0)` in buckets
    (`Term.reached`); ALiBi: `k.time - q.time` with its positive slopes.
    """

    def __init__(self, index: Term, table_HN: jax.Array | None = None, *, slope_H: jax.Array | None = None):
        if (table_HN is None) == (slope_H is None):
            raise ValueError("a bias has a table or slopes; give one of the two")
        self.index, self.table_HN, self.slope_H = index, table_HN, slope_H

    def tree_flatten(self):
        return (self.table_HN, self.slope_H), self.index.tree

    @classmethod
    def tree_unflatten(cls, tree: tuple, children: tuple) -> "Bias":
        made = object.__new__(cls)  # JAX puts what it likes in the place of arrays
        made.index, (made.table_HN, made.slope_H) = Term(tree), children
        return made

    def __repr__(self) -> str:
        return f"Bias({self.index.tree}, table_HN={self.table_HN}, slope_H={self.slope_H})"


def check(bias: Bias, H: int) -> None:
    """Raises UserError for numbers of other heads."""
    array, wanted = (bias.slope_H, (H,)) if bias.table_HN is None else (bias.table_HN, (H, "N"))
    if array.ndim != len(wanted) or array.shape[0] != H:
        raise UserError(f"a bias of shape {array.shape} does not fit {H} query heads; choose {wanted}".replace("'", ""))


def dense(bias: Bias, q: Coordinates, k: Coordinates, dtype):
    """[H, *] for coordinates [*] that broadcast to the shape of pairs: a product, and so is its derivative."""
    index = _index(bias, q, k)
    if bias.table_HN is None:
        return jnp.multiply.outer(bias.slope_H.astype(dtype), index.astype(dtype))
    return jnp.tensordot(bias.table_HN.astype(dtype), _one_hot(bias, index, dtype), (1, -1), precision="highest")


def looked_up(bias: Bias, q: Coordinates, k: Coordinates, dtype):
    """The same in less time, for whoever takes the derivative from `of_dense`: that of a look-up would be a scatter."""
    if bias.table_HN is None:
        return dense(bias, q, k, dtype)
    index, table_HN = _index(bias, q, k), bias.table_HN.astype(dtype)
    H, N = table_HN.shape

    def of_one():
        entry_H = jnp.take(table_HN, _first(index), axis=1, mode="clip")
        return jnp.broadcast_to(entry_H.reshape(H, *[1] * index.ndim), (H, *index.shape))

    def of_many():
        return jnp.take(table_HN, index, axis=1, mode="clip")

    return jnp.where((index >= 0) & (index < N), jax.lax.cond(_is_one(index), of_one, of_many), 0)


def of_dense(bias: Bias, d_H, q: Coordinates, k: Coordinates) -> Bias:
    """The gradients of the arrays, from those of pairs [H, *]: a product with one-hot rows, or with the index."""
    index, pairs = _index(bias, q, k), tuple(range(1, d_H.ndim))
    if bias.table_HN is None:
        return Bias(bias.index, slope_H=(d_H * index.astype(d_H.dtype)).sum(pairs))

    def of_one():
        return jnp.outer(d_H.sum(pairs), _one_hot(bias, _first(index), d_H.dtype))

    def of_many():
        one_hot = _one_hot(bias, index, d_H.dtype)
        return jnp.tensordot(d_H, one_hot, (pairs, tuple(range(one_hot.ndim - 1))), precision="highest")

    return Bias(bias.index, jax.lax.cond(_is_one(index), of_one, of_many))


def _index(bias: Bias, q: Coordinates, k: Coordinates):
    return jnp.broadcast_to(jnp.asarray(bias.index.values(q, k)), np.broadcast_shapes(q.shape, k.shape))


def _is_one(index):
    """Whether all pairs have one index, as they do in most tiles far from the diagonal."""
    return index.min() == index.max()


def _first(index):
    return index.reshape(-1)[0]


def _one_hot(bias: Bias, index, dtype):
    return jax.nn.one_hot(index, bias.table_HN.shape[-1], dtype=dtype)
