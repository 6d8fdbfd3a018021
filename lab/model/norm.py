"""Normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from lab.model import parameter


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * w, computed in float32 (arXiv 1910.07467, equation 4)."""

    def __init__(self, dim: int, eps: float):
        self.weight = parameter.scale(dim)
        self.eps = eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x32 = x_BTD.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (normed * self.weight[...]).astype(x_BTD.dtype)
