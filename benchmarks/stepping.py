"""What the benchmarks of training steps share."""


def stepper(run, state, numbers, batch):
    """A function that makes one step of a compiled program and waits for it."""

    def one() -> None:
        nonlocal state
        state, metrics = run(state, numbers, batch)
        metrics.loss.block_until_ready()

    return one
