"""The optimizer from optax, with every number a value of the call: cells that differ in numbers share a program."""

from typing import NamedTuple

import numpy as np
import optax

from lab.errors import UserError, choose
from lab.model import parameter


class Numbers(NamedTuple):
    """What a study may vary without another program; float32 scalars, given to every call of the step."""

    learning_rate: np.float32
    weight_decay: np.float32
    b1: np.float32
    b2: np.float32
    eps: np.float32
    clip: np.float32
    z_loss: np.float32


def adamw(numbers: Numbers, decay_mask) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101)."""
    return optax.adamw(
        numbers.learning_rate, numbers.b1, numbers.b2, numbers.eps, weight_decay=numbers.weight_decay, mask=decay_mask
    )


OPTIMIZERS = {"adamw": adamw}


def transformation(name: str, decay: str, numbers: Numbers, trainable) -> optax.GradientTransformation:
    """Clipping by the global norm, then the optimizer that a config names."""
    mask = parameter.decay_mask(trainable, everything=decay == "all")
    return optax.chain(optax.clip_by_global_norm(numbers.clip), OPTIMIZERS[name](numbers, mask))


def wsd(train, left: int) -> optax.Schedule:
    """Stable, then falling over the last train.cooldown of the steps (arXiv 2404.06395, section 4)."""
    cooling = max(round(train.cooldown * train.steps), 1)
    stable = optax.constant_schedule(train.learning_rate)
    decay = optax.linear_schedule(train.learning_rate, train.final_learning_rate, cooling)
    return optax.join_schedules([stable, decay], [max(left - cooling, 0)])


def cosine(train, left: int) -> optax.Schedule:
    """Half a cosine from the peak to the final rate."""
    peak, final = train.learning_rate, train.final_learning_rate
    return optax.cosine_decay_schedule(peak, left, alpha=final / peak if peak else 0.0)


# What follows the warm-up, over the `left` steps that remain.
SCHEDULES = {
    "constant": lambda train, left: optax.constant_schedule(train.learning_rate),
    "cosine": cosine,
    "linear": lambda train, left: optax.linear_schedule(train.learning_rate, train.final_learning_rate, left),
    "wsd": wsd,
}


def schedule(train) -> np.ndarray:
    """The learning rate of every step, float32 [steps]: linear warm-up, then the schedule that a config names."""
    warmup = train.warmup
    chosen = SCHEDULES[choose("train.schedule", train.schedule, SCHEDULES)](train, max(train.steps - warmup, 1))
    # A step's rate is the schedule at its end of the warm-up: the first step moves.
    rising = lambda step: train.learning_rate * (step + 1) / max(warmup, 1)  # noqa: E731
    return np.asarray(optax.join_schedules([rising, chosen], [warmup])(np.arange(train.steps)), np.float32)


def numbers_by_step(train):
    """A function step -> Numbers, evaluated on the host."""
    rates = schedule(train)
    fixed = [np.float32(train[name]) for name in Numbers._fields[1:]]
    return lambda step: Numbers(rates[step], *fixed)


def check(train) -> None:
    """Refuses training settings that mean nothing."""
    choose("train.optimizer", train.optimizer, OPTIMIZERS)
    choose("train.schedule", train.schedule, SCHEDULES)
    choose("train.decay", train.decay, ("declared", "all"))
    for field in ("steps", "microbatches"):
        if train[field] < 1:
            raise UserError(f"train.{field} = {train[field]} must be at least 1")
    if not 0 <= train.warmup <= train.steps:
        raise UserError(f"train.warmup = {train.warmup} must lie in 0..train.steps = {train.steps}")
    if not 0 <= train.cooldown <= 1:
        raise UserError(f"train.cooldown = {train.cooldown} is a share of the steps: choose a value in 0..1")
    if not train.clip > 0:
        raise UserError(f"train.clip = {train.clip} must be positive; inf clips nothing")
