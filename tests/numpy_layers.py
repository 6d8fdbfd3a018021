"""Parts of a layer in float64 numpy, as their formulas say."""

import numpy as np

from lab.coordinates import Coordinates

NORMED_SIDES = {"pre": ("input",), "output": ("output",), "sandwich": ("input", "output")}  # of a sublayer


def weights(variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


def normed(x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + eps) * weight_D


def placed(placement, side: str, layer: int, x_TD: np.ndarray, config) -> np.ndarray:
    """What a placement makes of what a sublayer reads (side: input) or gives (output): normed, where it has a norm."""
    if side not in NORMED_SIDES[config.placement.name]:
        return x_TD
    return normed(x_TD, weights(getattr(placement, f"{side}_norm").weight)[layer], config.norm.eps)


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
    gate, up, down = (weights(w)[layer] for w in (feedforward.gate, feedforward.up, feedforward.down))
    g = x_TD @ gate
    return (g / (1 + np.exp(-g)) * (x_TD @ up)) @ down
