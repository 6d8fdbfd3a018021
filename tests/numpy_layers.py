"""Parts of a layer in float64 numpy, as their formulas say."""

import numpy as np

from lab.coordinates import Coordinates


def weights(variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


def normed(x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + eps) * weight_D


def turned(x_THK: np.ndarray, at: Coordinates, config) -> np.ndarray:
    """Rotary pairs as complex numbers: the n slowest by branch and time in turn, the others by the index."""
    F = config.head_dim // 2
    n, angle_TF = round(F * config.rotary.ratio), np.zeros((len(x_THK), F))
    for p in range(F):
        speed = config.rotary.theta ** (-2 * p / config.head_dim)
        of = at.index if p < F - n else config.rotary.stride * at.branch if (p - (F - n)) % 2 == 0 else at.time
        angle_TF[:, p] = of * speed
    z_THF = (x_THK[..., :F] + 1j * x_THK[..., F:]) * np.exp(1j * angle_TF)[:, None]
    return np.concatenate([z_THF.real, z_THF.imag], axis=-1)


def swiglu(feedforward, layer: int, x_TD: np.ndarray) -> np.ndarray:
    gate, up, down = (weights(w)[layer] for w in (feedforward.gate, feedforward.up, feedforward.down))
    g = x_TD @ gate
    return (g / (1 + np.exp(-g)) * (x_TD @ up)) @ down
