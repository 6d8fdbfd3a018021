"""Parts of a layer in float64 numpy, as their formulas say."""

import math

import numpy as np

from lab.coordinates import Coordinates

NORMED_SIDES = {  # of a sublayer
    "pre": ("input",), "output": ("output",), "sandwich": ("input", "output"), "post": (), "deepnorm": (),
}  # fmt: skip


def weights(variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


def normed(x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + eps) * weight_D


def through(norm, layer, x_TD: np.ndarray, config) -> np.ndarray:
    """Of a norm of any kind; layer: of those that are stacked, ... of one alone."""
    if config.norm.name == "none":
        return x_TD
    centre = x_TD.mean(-1, keepdims=True) if config.norm.name == "layer" else 0.0
    multiplier_D = weights(norm.weight)[layer] + (config.norm.name == "rms-zero")
    return normed(x_TD - centre, multiplier_D, config.norm.eps) + (
        weights(norm.bias)[layer] if config.norm.bias else 0.0
    )


def placed(placement, side: str, layer: int, x_TD: np.ndarray, config) -> np.ndarray:
    """What a placement makes of what a sublayer reads (side: input) or gives (output): normed, where it has a norm."""
    if side not in NORMED_SIDES[config.placement.name]:
        return x_TD
    return through(getattr(placement, f"{side}_norm"), layer, x_TD, config)


def branched(placement, layer: int, y_TD: np.ndarray, config) -> np.ndarray:
    """The output of a sublayer, multiplied as the model's branch is."""
    if config.branch.name == "plain":
        return y_TD
    return y_TD * weights(placement.branch.a if config.branch.name == "rezero" else placement.branch.w)[layer]


def layered(block, layer: int, x_TD: np.ndarray, config, mix, feed) -> np.ndarray:
    """The stream after a layer of a plain or parallel stream; mix and feed: what its sublayers compute."""
    placements = block.mixer_placement, block.feedforward_placement

    def given(place: int, n_TD: np.ndarray) -> np.ndarray:
        """What the stream is given by a sublayer that reads n."""
        y_TD = placed(placements[place], "output", layer, (mix, feed)[place](n_TD), config)
        return branched(placements[place], layer, y_TD, config)

    if config.stream.name.startswith("parallel"):
        of_feed = placements[0] if config.stream.name == "parallel" else placements[1]
        read = [placed(placement, "input", layer, x_TD, config) for placement in (placements[0], of_feed)]
        return x_TD + given(0, read[0]) + given(1, read[1])
    for place, placement in enumerate(placements):
        y_TD = given(place, placed(placement, "input", layer, x_TD, config))
        if config.placement.name == "post":
            x_TD = through(placement.sum_norm, layer, x_TD + y_TD, config)
        elif config.placement.name == "deepnorm":
            x_TD = through(placement.sum_norm, layer, (2 * config.layers) ** 0.25 * x_TD + y_TD, config)
        else:
            x_TD = x_TD + y_TD
    return x_TD


def turned(x_THK: np.ndarray, at: Coordinates, config) -> np.ndarray:
    """Rotary pairs as complex numbers: the n slowest by branch and time in turn, the others by the index."""
    K, rotary = config.mixer.head_dim, config.position
    F = K // 2
    n, angle_TF = round(F * rotary.ratio), np.zeros((len(x_THK), F))
    for p in range(F):
        speed = rotary.theta ** (-2 * p / K)
        of = at.index if p < F - n else rotary.stride * at.branch if (p - (F - n)) % 2 == 0 else at.time
        angle_TF[:, p] = of * speed
    z_THF = (x_THK[..., :F] + 1j * x_THK[..., F:]) * np.exp(1j * angle_TF)[:, None]
    return np.concatenate([z_THF.real, z_THF.imag], axis=-1)


def swiglu(feedforward, layer: int, x_TD: np.ndarray) -> np.ndarray:
    return fed("swiglu", *(weights(w)[layer] for w in (feedforward.up, feedforward.down, feedforward.gate)), x_TD)


def fed(name: str, up_DF, down_FD, gate_DF, x_TD: np.ndarray, biases=(0.0, 0.0, 0.0)) -> np.ndarray:
    """A feed-forward sublayer by its name; biases: of up, down and gate. gate_DF None: it has none."""
    up_TF = x_TD @ up_DF + biases[0]
    inner_TF = ACTIVATIONS[name](up_TF) if gate_DF is None else ACTIVATIONS[name](x_TD @ gate_DF + biases[2]) * up_TF
    return inner_TF @ down_FD + biases[1]


def feedforward(module, layer, x_TD: np.ndarray, config) -> np.ndarray:
    """The same of a module; layer: of those that are stacked, ... of one alone."""
    of = lambda name: None if getattr(module, name, None) is None else weights(getattr(module, name))[layer]  # noqa: E731
    biases = [0.0 if of(f"{name}_bias") is None else of(f"{name}_bias") for name in ("up", "down", "gate")]
    return fed(config.feedforward.name, of("up"), of("down"), of("gate"), x_TD, biases)


def logistic(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def elu(x, alpha: float = 1.0):
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


ACTIVATIONS = {  # of what feed-forwards are called; of the gate, if they have one
    "swiglu": lambda x: x * logistic(x),
    "geglu": gelu,
    "geglu-tanh": gelu_tanh,
    "reglu": lambda x: np.maximum(x, 0),
    "glu": logistic,
    "bilinear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "gelu-tanh": gelu_tanh,
    "swish": lambda x: x * logistic(x),
    "elu": elu,
    "selu": lambda x: 1.0507009873554805 * elu(x, 1.6732632423543772),
    "squared-relu": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": logistic,
    "softplus": lambda x: np.log1p(np.exp(x)),
}
