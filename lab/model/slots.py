"""Where new tokens lie in a cache: a row of S slots holds tokens in any order, and coordinates say which they are.

A free slot has segment -1. A token of segment -1 takes none: whatever slot it is given, nothing of it is written.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lab.coordinates import Coordinates
from lab.errors import UserError


def choose(coordinates: Coordinates, used_B, length: int, slots_BT=None) -> tuple[jax.Array, jax.Array]:
    """(the slot of each new token, int32 [B, T]; how many slots of each row are used then, int32 [B]).

    slots None: each row's next free ones, from `used` on. What is not to be written has a slot beyond the cache, as has
    a token for which there is none left; no two of a row are alike. `used` is one past the last slot that was given.
    """
    real_BT = jnp.asarray(coordinates.segment) >= 0
    if slots_BT is None:
        slots_BT = used_B[:, None] + jnp.cumsum(real_BT, axis=1) - 1
    slots_BT = jnp.where(real_BT, slots_BT, -1).astype(jnp.int32)
    used_B = jnp.maximum(used_B, 1 + slots_BT.max(axis=1, initial=-1))
    inside_BT = (slots_BT >= 0) & (slots_BT < length)
    beyond_T = length + jnp.arange(slots_BT.shape[1], dtype=jnp.int32)
    return jnp.where(inside_BT, slots_BT, beyond_T), used_B


def put(old, new, slots_BT):
    """An array of the cache [B, S, ...] with what new tokens have [B, T, ...] in their slots; beyond S nothing is."""
    write = lambda old, new, slots: old.at[slots].set(new, mode="drop", unique_indices=True)  # noqa: E731
    new = jnp.asarray(new).astype(old.dtype)
    if slots_BT.size == 1:  # XLA makes a slice of a single one, and copies the cache for each of its readers
        beyond = jnp.full_like(slots_BT, old.shape[1] + 1)
        new, slots_BT = jnp.repeat(new, 2, axis=1), jnp.concatenate([slots_BT, beyond], axis=1)
    return jax.vmap(write)(old, new, slots_BT)


def take(x, slots_BT):
    """Of an array of the cache [B, S, ...], what lies in these slots [B, T, ...]; 0 beyond S."""
    return jax.vmap(lambda x, slots: x.at[slots].get(mode="fill", fill_value=0, unique_indices=True))(x, slots_BT)


def check(coordinates: Coordinates, used_B, length: int, slots_BT=None) -> None:
    """Refuses tokens that have no slot, as far as their count, `used` and the slots are known and not traced."""
    segment_BT, given_BT = known(coordinates.segment), known(slots_BT)
    real_BT = np.ones(coordinates.shape, bool) if segment_BT is None else segment_BT >= 0
    counted = slots_BT is None and segment_BT is not None
    used_B = known(used_B) if counted else None
    used_B = np.zeros(len(real_BT), np.int32) if used_B is None else used_B
    for row, (used, tokens) in enumerate(zip(used_B, real_BT.sum(1), strict=True)):
        if used + tokens > length:
            raise UserError(
                f"{tokens} tokens do not fit into row {row} of a cache of {length} slots a row, {used} of them used; "
                "choose a longer cache, or slots_BT that are free"
            )
    if slots_BT is not None and np.shape(slots_BT) != coordinates.shape:
        raise UserError(
            f"slots_BT is {np.shape(slots_BT)} for tokens {coordinates.shape}; choose a slot for each token"
        )
    if given_BT is not None:
        check_given(given_BT, given_BT >= 0 if segment_BT is None else real_BT, length)


def check_given(slots_BT: np.ndarray, real_BT: np.ndarray, length: int) -> None:
    """Refuses slots outside the cache, and those that two tokens of a row are given."""
    for row, (slots, real) in enumerate(zip(slots_BT, real_BT, strict=True)):
        found, count = np.unique(slots[real], return_counts=True)
        if (outside := found[(found < 0) | (found >= length)]).size:
            raise UserError(f"slots_BT has {outside[0]} in row {row}: a row of the cache has slots 0 to {length - 1}")
        if (twice := found[count > 1]).size:
            raise UserError(f"slots_BT has {twice[0]} twice in row {row}; choose another slot for each token")


def known(x) -> np.ndarray | None:
    """The numbers of an array, None where it is traced or there is none."""
    return None if x is None or isinstance(x, jax.core.Tracer) else np.asarray(x)
