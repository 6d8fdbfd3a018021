"""Loss spikes: what one is, said here alone."""

from collections.abc import Sequence

import numpy as np

WINDOW = 64  # losses before a step that it is compared with
LEAST = 16  # of them: before that a loss falls too fast for a spread
TIMES = 6.0  # spreads above the median


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss is above the median of the last WINDOW losses `before` it by more than TIMES their spread.

    The spread is 1.4826 times the median absolute deviation, the standard deviation of normal noise: a spike that went
    before moves neither.
    """
    recent = np.asarray(before[-WINDOW:], np.float64)
    if len(recent) < LEAST:
        return False
    median = np.median(recent)
    return bool(loss > median + TIMES * 1.4826 * np.median(np.abs(recent - median)))


def spikes(losses: Sequence[float]) -> list[int]:
    """The places of all spikes among the losses of consecutive steps."""
    return [place for place, loss in enumerate(losses) if is_spike(loss, losses[max(place - WINDOW, 0) : place])]
