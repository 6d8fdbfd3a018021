"""The feed-forward sublayer: gated and ungated, each with any activation."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lab.model import init, parameter
from lab.options import Option


def bilinear(x):
    """x: the gate of arXiv 2002.05202, equation 5."""
    return x


def squared_relu(x):
    """max(x, 0)^2 (Primer, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


def gelu(x):
    """x Phi(x), Phi by the error function (arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x):
    """The same by its approximation with a tanh."""
    return jax.nn.gelu(x, approximate=True)


GATES = {
    "swiglu": jax.nn.silu,
    "geglu": gelu,
    "geglu-tanh": gelu_tanh,
    "reglu": jax.nn.relu,
    "glu": jax.nn.sigmoid,
    "bilinear": bilinear,
}
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": gelu,
    "gelu-tanh": gelu_tanh,
    "swish": jax.nn.silu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "squared-relu": squared_relu,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
}


OPTIONS = {
    "width": Option(256, "of the inner layer", least=1),
    "bias": Option(False, "adds a learned bias to what each matrix gives"),
}


class Gated(nnx.Module):
    """(g(x W_gate) * x W_up) W_down (arXiv 2002.05202, equations 5 and 6), with g of GATES.

    feedforward.bias adds biases, zero at the start, to what each of the three matrices gives.
    """

    options: ClassVar[dict[str, Option]] = OPTIONS

    def __init__(self, model, key: jax.Array):
        D, F, biased = model.dim, model.feedforward.width, model.feedforward.bias
        gate, up, down = jax.random.split(key, 3)
        self.name = model.feedforward.name
        self.gate = init.matrix(model, "value", gate, (D, F), ("embed", "ffn"))
        self.up = init.matrix(model, "value", up, (D, F), ("embed", "ffn"))
        self.down = init.matrix(model, "output", down, (F, D), ("ffn", "embed"))
        self.gate_bias, self.up_bias = (parameter.bias(F, "ffn") if biased else None for _ in range(2))
        self.down_bias = parameter.bias(D) if biased else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = GATES[self.name](affine(x_BTD, self.gate, self.gate_bias))
        return affine(gate_BTF * affine(x_BTD, self.up, self.up_bias), self.down, self.down_bias)


class Ungated(nnx.Module):
    """g(x W_up) W_down (arXiv 2002.05202, equation 2), with g of ACTIVATIONS, and biases likewise."""

    options: ClassVar[dict[str, Option]] = OPTIONS

    def __init__(self, model, key: jax.Array):
        D, F, biased = model.dim, model.feedforward.width, model.feedforward.bias
        up, down = jax.random.split(key)
        self.name = model.feedforward.name
        self.up = init.matrix(model, "value", up, (D, F), ("embed", "ffn"))
        self.down = init.matrix(model, "output", down, (F, D), ("ffn", "embed"))
        self.up_bias = parameter.bias(F, "ffn") if biased else None
        self.down_bias = parameter.bias(D) if biased else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        inner_BTF = ACTIVATIONS[self.name](affine(x_BTD, self.up, self.up_bias))
        return affine(inner_BTF, self.down, self.down_bias)


FEEDFORWARDS = dict.fromkeys(GATES, Gated) | dict.fromkeys(ACTIVATIONS, Ungated)


def affine(x_BTD: jax.Array, weight_DF: nnx.Param, bias_F: nnx.Param | None) -> jax.Array:
    """x W + b in the precision of x; b None: none."""
    y_BTF = x_BTD @ weight_DF[...].astype(x_BTD.dtype)
    return y_BTF if bias_F is None else y_BTF + bias_F[...].astype(y_BTF.dtype)


def gated_width(width: int, multiple: int = 8) -> int:
    """The width at which a gated layer has the parameters of an ungated one of `width`: 2/3 of it, to the nearest
    multiple and at least one (arXiv 2002.05202, section 2)."""
    return multiple * max(1, round(2 * width / (3 * multiple)))
