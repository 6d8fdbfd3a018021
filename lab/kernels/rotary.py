"""Rotation of heads by the coordinates of their tokens: F = R / 2 pairs, of the last R of the K dimensions."""

import jax
import jax.numpy as jnp

from lab.coordinates import Coordinates


def angles(coordinates: Coordinates, frequencies_3F):
    """index w_0 + branch w_1 + time w_2 in radians, float32: [..., F] for coordinates [..., 1]."""
    w_index, w_branch, w_time = frequencies_3F
    return coordinates.index * w_index + coordinates.branch * w_branch + coordinates.time * w_time


def rotation(coordinates: Coordinates, frequencies_3F) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the angles, float32 [B, T, 1, F]."""
    angle = angles(coordinates.map(lambda x: x[..., None, None]), frequencies_3F)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHK: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The last R dimensions with each pair (p, p + R/2) of them turned by its angle."""
    cos, sin = (r.astype(x_BTHK.dtype) for r in rotation)
    F = cos.shape[-1]
    still, a, b = jnp.split(x_BTHK, [x_BTHK.shape[-1] - 2 * F, x_BTHK.shape[-1] - F], axis=-1)
    turned = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([still, *turned] if still.shape[-1] else turned, axis=-1)
