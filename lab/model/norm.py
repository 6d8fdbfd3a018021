"""Normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from lab.model import parameter


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * w, computed in float32 or wider (arXiv 1910.07467, equation 4)."""

    def __init__(self, dim: int, eps: float):
        self.weight = parameter.scale(dim)
        self.eps = eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return (rms_normed(x_BTD, self.eps) * self.weight[...]).astype(x_BTD.dtype)


def rms_normed(x, eps: float):
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
