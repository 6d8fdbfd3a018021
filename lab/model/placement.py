"""Where norms stand around a sublayer f of the residual stream: add(x, after(f(before(x))))."""

from typing import ClassVar

import jax
from flax import nnx

from lab.model import norm
from lab.model.branch import BRANCHES


class Placement(nnx.Module):
    """Of one sublayer; each kind says on which side it has a norm. What the sublayer gives is also multiplied as
    model.branch says, after its norm.

    reads_normed: whether it is given what is normed already, and so has no norm before it.
    """

    options: ClassVar[dict] = {}
    norms_input: ClassVar[bool] = False
    norms_output: ClassVar[bool] = False
    norms_sum: ClassVar[bool] = False  # then the stream is normed after the last layer, and the head needs no norm

    def __init__(self, model, reads_normed: bool = False):
        self.input_norm = norm.make(model, model.dim) if self.norms_input and not reads_normed else None
        self.output_norm = norm.make(model, model.dim) if self.norms_output else None
        self.sum_norm = norm.make(model, model.dim) if self.norms_sum else None
        self.branch = BRANCHES[model.branch.name](model)

    def before(self, x_BTD: jax.Array) -> jax.Array:
        """What the sublayer reads of the stream."""
        return x_BTD if self.input_norm is None else self.input_norm(x_BTD)

    def after(self, y_BTD: jax.Array) -> jax.Array:
        """What the stream is given of the sublayer's output."""
        return self.branch(y_BTD if self.output_norm is None else self.output_norm(y_BTD))

    def add(self, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        """The stream x once it has been given y."""
        return x_BTD + y_BTD


class Pre(Placement):
    """x + f(n(x)) (arXiv 2002.04745)."""

    norms_input = True


class Output(Placement):
    """x + n(f(x)): the stream itself is never normed (OLMo 2, arXiv 2501.00656, equation 1)."""

    norms_output = True


class Sandwich(Placement):
    """x + n2(f(n1(x))) (arXiv 2105.13290, section 3.2)."""

    norms_input = norms_output = True


class Post(Placement):
    """n(x + f(x)) (arXiv 1706.03762, section 3.1)."""

    norms_sum = True

    def add(self, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        return self.sum_norm(x_BTD + y_BTD)


class DeepNorm(Placement):
    """n(alpha x + f(x)), alpha = (2 M)^1/4 for M layers (DeepNet, arXiv 2203.00555, table 1: decoders)."""

    norms_sum = True

    def __init__(self, model, reads_normed: bool = False):
        super().__init__(model, reads_normed)
        self.alpha = (2 * model.layers) ** 0.25

    def add(self, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        return self.sum_norm(self.alpha * x_BTD + y_BTD)


PLACEMENTS = {"pre": Pre, "output": Output, "sandwich": Sandwich, "post": Post, "deepnorm": DeepNorm}
OF_SUBLAYERS = tuple(name for name, placement in PLACEMENTS.items() if not placement.norms_sum)  # under any stream
