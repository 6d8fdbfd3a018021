"""Where norms stand around a sublayer f of the residual stream: x + after(f(before(x)))."""

from typing import ClassVar

import jax
from flax import nnx

from lab.model import norm


class Placement(nnx.Module):
    """Of one sublayer; each kind says on which side it has a norm."""

    options: ClassVar[dict] = {}
    norms_input: ClassVar[bool] = False
    norms_output: ClassVar[bool] = False

    def __init__(self, model):
        self.input_norm = norm.make(model, model.dim) if self.norms_input else None
        self.output_norm = norm.make(model, model.dim) if self.norms_output else None

    def before(self, x_BTD: jax.Array) -> jax.Array:
        """What the sublayer reads of the stream."""
        return x_BTD if self.input_norm is None else self.input_norm(x_BTD)

    def after(self, y_BTD: jax.Array) -> jax.Array:
        """What the stream is given of the sublayer's output."""
        return y_BTD if self.output_norm is None else self.output_norm(y_BTD)


class Pre(Placement):
    """x + f(n(x)) (arXiv 2002.04745)."""

    norms_input = True


class Output(Placement):
    """x + n(f(x)): the stream itself is never normed (OLMo 2, arXiv 2501.00656, equation 1)."""

    norms_output = True


class Sandwich(Placement):
    """x + n2(f(n1(x))) (arXiv 2105.13290, section 3.2)."""

    norms_input = norms_output = True


PLACEMENTS = {"pre": Pre, "output": Output, "sandwich": Sandwich}
