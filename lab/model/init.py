"""How the matrices of sublayers are drawn: the gain of each, by what it makes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from lab.model import parameter
from lab.options import Option


class Initialiser(NamedTuple):
    """Gains as functions of the number of layers; of what is neither, 1.

    value: of values, and of what the inner layer of a feed-forward is made of; output: of what a sublayer gives to the
    residual stream. xavier: gains are those of Xavier draws, whose variance is 2 / (fan_in + fan_out).
    unscaled: queries are narrower by head_dim^-1/2, for scores that are not scaled.
    """

    value: Callable[[int], float]
    output: Callable[[int], float]
    xavier: bool = False
    unscaled: bool = False
    options: dict[str, Option] = {}


def one(layers: int) -> float:
    return 1.0


def deepnorm_beta(layers: int) -> float:
    """(8 M)^-1/4 of M decoder layers (DeepNet, arXiv 2203.00555, table 1)."""
    return (8 * layers) ** -0.25


INITIALISERS = {
    "scaled": Initialiser(value=one, output=lambda layers: (2 * layers) ** -0.5),
    "plain": Initialiser(value=one, output=one),
    "deepnorm": Initialiser(value=deepnorm_beta, output=deepnorm_beta, xavier=True),
    "t5": Initialiser(value=one, output=one, unscaled=True),  # Mesh TensorFlow's, for mixer.softmax_scale = 1
}


def matrix(model, makes: str, key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], inputs: int = 1):
    """`parameter.matrix`, drawn as model.init says.

    makes: "query", "key", "value", "output", or a "latent" that another matrix makes one of these of; what
    keys and values share counts as a value.

    Under "scaled" outputs have the gain (2 L)^-1/2 for L layers (GPT-2, section 2.3), all else 1. The gain g of
    "deepnorm" is of a Xavier draw from N(0, 2 g^2 / (fan_in + fan_out)), which as one from N(0, gain^2 / fan_in) has
    the gain g sqrt(2 fan_in / (fan_in + fan_out)): g where the matrix is square, its heads counted together.
    """
    return parameter.matrix(key, shape, axes, inputs, gain=gain(model, makes, shape, inputs))


def gain(model, makes: str, shape: tuple[int, ...], inputs: int) -> float:
    """Of a draw from N(0, gain^2 / fan_in)."""
    chosen = INITIALISERS[model.init.name]
    found = {"value": chosen.value, "output": chosen.output}.get(makes, one)(model.layers)
    if makes == "query" and chosen.unscaled:
        found *= model.mixer.head_dim**-0.5
    fan_in, fan_out = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    return found * math.sqrt(2 * fan_in / (fan_in + fan_out)) if chosen.xavier else found
