"""MurmurHash3_x86_32 of 32-bit words in NumPy's uint64, as its description reads: none of the code under test."""

import numpy as np

MASK = np.uint64(2**32 - 1)


def _words(x):
    return np.asarray(x).astype(np.int64).astype(np.uint64) & MASK


def _times(x, factor: int):
    return (x * np.uint64(factor)) & MASK


def _left(x, bits: int):
    return ((x << np.uint64(bits)) | (x >> np.uint64(32 - bits))) & MASK


def state(seed, *words):
    """After each of the words, which broadcast; before the end."""
    h = _words(seed)
    for word in words:
        k = _times(_left(_times(_words(word), 0xCC9E2D51), 15), 0x1B873593)
        h = (_times(_left(h ^ k, 13), 5) + np.uint64(0xE6546B64)) & MASK
    return h


def hashed(seed, *words):
    h = state(seed, *words) ^ np.uint64(4 * len(words))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = _times(h ^ (h >> np.uint64(shift)), factor)
    return h ^ (h >> np.uint64(16))


def factors(rate: float, seed, *words):
    """What a number is multiplied with, float64: 0, or 1 / (1 - rate) in float32."""
    rate = np.float32(rate)
    kept = hashed(seed, *words) >= np.uint64(np.float64(rate) * 2.0**32)
    return np.where(kept, np.float64(np.float32(1) / (np.float32(1) - rate)), 0.0)


def tokens(seed, step, rows, at):
    """Words of tokens [B, T]."""
    return hashed(seed, step, rows, at.segment, at.branch, at.time)
