"""What the benchmarks of training steps share."""

import time
from collections.abc import Callable


def stepper(run, state, numbers, batch):
    """A function that makes one step of a compiled program and waits for it."""

    def one() -> None:
        nonlocal state
        state, metrics = run(state, numbers, batch)
        metrics.loss.block_until_ready()

    return one


def turns(one: Callable, other: Callable, rounds: int) -> list[tuple[float, float]]:
    """(seconds of one, its ratio to those of the other) of each turn; either goes first in every other turn, and a
    first turn warms up."""
    found = []
    for turn in range(rounds + 1):
        seconds = {}
        for peer in (one, other) if turn % 2 else (other, one):
            start = time.perf_counter()
            peer()
            seconds[peer] = time.perf_counter() - start
        found.append((seconds[one], seconds[one] / seconds[other]))
    return found[1:]
