"""How likely a model finds given texts: batches of a few shapes, whatever the texts.

B rows, T tokens, C vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lab.coordinates import Coordinates

SHORTEST = 32  # tokens of the smallest shape; each further one has twice as many
LARGEST = 2**28  # logits of a batch


def log_likelihoods(
    model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, rows: int = 8
) -> list[tuple[float, bool]]:
    """For each (context, continuation): the log probability in nats of the continuation after the context, and whether
    every token of it is the likeliest. A context has at least one token.

    Each pair is a single text to the model, as `model(tokens)` takes it. The longest are scored first. Raises UserError
    for one that is longer than the model can read.
    """
    found: list = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    while order:
        T = shape(sum(map(len, pairs[order[0]])) - 1)
        at_once = max(1, min(rows, LARGEST // (T * model.embedding.shape[0])))
        taken = [i for i in order[:at_once] if shape(sum(map(len, pairs[i])) - 1) == T]
        order = order[len(taken) :]
        for i, likely in zip(taken, score(model, [pairs[i] for i in taken], at_once, T), strict=True):
            found[i] = likely
    return found


def shape(tokens: int) -> int:
    """Tokens of the smallest shape that holds so many."""
    return max(SHORTEST, 1 << (tokens - 1).bit_length())


def score(model, pairs, rows: int, T: int) -> list[tuple[float, bool]]:
    """The same of at most so many pairs of at most T + 1 tokens."""
    tokens_BT, labels_BT = np.zeros((rows, T), np.int32), np.full((rows, T), -1, np.int32)
    at = Coordinates.single(rows, T)
    at.segment[:] = -1
    for row, (context, continuation) in enumerate(pairs):
        text = [*context, *continuation]
        read = len(text) - 1
        tokens_BT[row, :read], at.segment[row, :read] = text[:-1], 0
        labels_BT[row, len(context) - 1 : read] = continuation
    jax.eval_shape(lambda: model.embed(tokens_BT, at))  # refuses places that the model has no weights for
    log_p_BT, likeliest_BT = jax.device_get(scored(model, tokens_BT, labels_BT, at))
    asked_BT = labels_BT >= 0
    return [
        (float(log_p_T[asked_T].astype(np.float64).sum()), bool(likeliest_T[asked_T].all()))
        for log_p_T, likeliest_T, asked_T in zip(log_p_BT, likeliest_BT, asked_BT, strict=True)
    ][: len(pairs)]


@jax.jit
def scored(model, tokens_BT, labels_BT, at: Coordinates):
    """Log probability of each label, and whether it is the likeliest token."""
    z_BTC = model(tokens_BT, at)
    log_p_BT = jnp.take_along_axis(z_BTC, jnp.maximum(labels_BT, 0)[..., None], axis=-1)[..., 0]
    return log_p_BT - jax.nn.logsumexp(z_BTC, axis=-1), jnp.argmax(z_BTC, axis=-1) == labels_BT
