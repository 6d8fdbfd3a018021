"""Arithmetic intensity of attention: operations for each number that is read or written, of training and of decoding.

A processor reaches its peak only above some such ratio, hundreds on an accelerator; below it waits for memory. Orders
of growth, as multi-query attention has them (arXiv 1911.02150, sections 2 and 3; groups: arXiv 2305.13245): factors
such as the 4 of the projections or the 2 of keys and values are left out. b rows of n tokens, width d, h heads of
k = d / h.
"""


def training(b: float, n: float, d: float, h: float) -> float:
    """Of all tokens at once: b n d^2 operations over b n d + b h n^2 + d^2 numbers, (1/k + 1/(b n))^-1 at n = d."""
    return 1 / (h / d + 1 / (b * n))


def decoding(b: float, n: float, d: float, h: float, g: float) -> float:
    """Of n steps of one token: b n d^2 operations, while every step reads the cache of g groups and all weights.

    Many heads (g = h): b n^2 d + n d^2 numbers, (n/d + 1/b)^-1. Groups: b n^2 k g for the cache, (n g/(d h) + 1/b)^-1.
    One group (g <= 1): b n d more, of what enters, is no longer small beside it: (1/d + n/(d h) + 1/b)^-1.
    """
    return 1 / (n * g / (d * h) + 1 / b + (1 / d if g <= 1 else 0))
