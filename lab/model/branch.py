"""What the output of a sublayer is multiplied with before the residual stream is given it.

A branch is here one of the residual network, which a sublayer is, and not one of texts.
"""

from typing import ClassVar

import jax
from flax import nnx

from lab.model import parameter
from lab.options import Option


class PlainBranch(nnx.Module):
    """y."""

    options: ClassVar[dict[str, Option]] = {}

    def __init__(self, model):
        pass

    def __call__(self, y_BTD: jax.Array) -> jax.Array:
        return y_BTD


class ReZero(nnx.Module):
    """a y, one number a of each sublayer, zero at the start (arXiv 2003.04887, equation 2)."""

    options: ClassVar[dict[str, Option]] = {}

    def __init__(self, model):
        self.a = parameter.scale(1, 0.0)

    def __call__(self, y_BTD: jax.Array) -> jax.Array:
        return self.a[...].astype(y_BTD.dtype) * y_BTD


class LayerScale(nnx.Module):
    """w y, a number of each channel (CaiT, arXiv 2103.17239, equation 4).

    branch.start 0: as the paper's section 2 has it, 0.1 in models of up to 18 layers, 1e-5 of up to 24, else 1e-6.
    """

    options: ClassVar[dict[str, Option]] = {
        "start": Option(0.0, "of layer scale; 0: 0.1 of up to 18 layers, 1e-5 of up to 24, 1e-6 of more", least=0)
    }

    def __init__(self, model):
        by_depth = 0.1 if model.layers <= 18 else 1e-5 if model.layers <= 24 else 1e-6
        self.w = parameter.scale(model.dim, model.branch.start or by_depth)

    def __call__(self, y_BTD: jax.Array) -> jax.Array:
        return self.w[...].astype(y_BTD.dtype) * y_BTD


BRANCHES = {"plain": PlainBranch, "rezero": ReZero, "layer-scale": LayerScale}
