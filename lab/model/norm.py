"""Norms, all built in one place: `make`."""

import jax
import jax.numpy as jnp
from flax import nnx

from lab.model import parameter
from lab.options import Option


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * w, computed in float32 or wider (arXiv 1910.07467, equation 4)."""

    options = {"eps": Option(1e-5, "added to the mean square before its root", above=0)}

    def __init__(self, size: int, norm):
        self.weight = parameter.scale(size)
        self.eps = norm.eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return (rms_normed(x_BTD, self.eps) * self.weight[...]).astype(x_BTD.dtype)


NORMS = {"rms": RMSNorm}


def make(model, size: int) -> nnx.Module:
    """The norm that `model.norm` describes, of vectors of `size` numbers."""
    return NORMS[model.norm.name](size, model.norm)


def rms_normed(x, eps: float):
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
