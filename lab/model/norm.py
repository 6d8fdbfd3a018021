"""Norms, all built in one place: `make`."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lab.errors import UserError
from lab.model import parameter
from lab.options import Option


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * w, computed in float32 or wider (arXiv 1910.07467, equation 4).

    norm.bias adds b, zero at the start, to each channel.
    """

    options: ClassVar[dict[str, Option]] = {
        "eps": Option(1e-5, "added to the mean square before its root", above=0),
        "bias": Option(False, "adds a learned bias to each channel"),
    }

    def __init__(self, size: int, norm):
        self.weight = parameter.scale(size)
        self.bias = parameter.bias(size) if norm.bias else None
        self.eps = norm.eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        y_BTD = self.standard(x_BTD) * self.multiplier()
        return (y_BTD if self.bias is None else y_BTD + self.bias[...]).astype(x_BTD.dtype)

    def standard(self, x_BTD: jax.Array) -> jax.Array:
        """Vectors of mean square 1, float32 or wider."""
        return rms_normed(x_BTD, self.eps)

    def multiplier(self) -> jax.Array:
        """Of each channel [D]."""
        return self.weight[...]


class LayerNorm(RMSNorm):
    """(x - mean(x)) / sqrt(var(x) + eps) * w (arXiv 1607.06450, equation 3), with norm.bias + b."""

    def standard(self, x_BTD: jax.Array) -> jax.Array:
        wide = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        return rms_normed(wide - jnp.mean(wide, axis=-1, keepdims=True), self.eps)


class ZeroCentredRMSNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + w), w zero at the start (Gemma, arXiv 2403.08295, in its code)."""

    def __init__(self, size: int, norm):
        super().__init__(size, norm)
        self.weight = parameter.scale(size, 0.0)

    def multiplier(self) -> jax.Array:
        return 1 + self.weight[...]


class NoNorm(nnx.Module):
    """x."""

    options: ClassVar[dict[str, Option]] = {}

    def __init__(self, size: int, norm):
        pass

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "rms-zero": ZeroCentredRMSNorm, "none": NoNorm}


def check(model) -> None:
    """Refuses to norm all heads at once where queries and keys are not normed."""
    if model.mixer.qk_norm_over != "head" and not model.mixer.qk_norm:
        raise UserError(
            f"model.mixer.qk_norm_over = {model.mixer.qk_norm_over!r} means nothing beside model.mixer.qk_norm = "
            "False; choose 'head', or model.mixer.qk_norm = True"
        )


def make(model, size: int) -> nnx.Module:
    """The norm that `model.norm` describes, of vectors of `size` numbers."""
    return NORMS[model.norm.name](size, model.norm)


def rms_normed(x, eps: float):
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
