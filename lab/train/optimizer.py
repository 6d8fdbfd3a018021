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


def schedule(train) -> np.ndarray:
    """The learning rate of every step, float32 [steps]: linear warm-up, then the schedule that a config names."""
    peak, final, steps, warmup = train.learning_rate, train.final_learning_rate, train.steps, train.warmup
    left = max(steps - warmup, 1)
    cooling = max(round(train.cooldown * steps), 1)
    after_warmup = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, left, alpha=final / peak if peak else 0.0),
        "linear": lambda: optax.linear_schedule(peak, final, left),
        "wsd": lambda: optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, cooling)], [max(left - cooling, 0)]
        ),
    }
    chosen = after_warmup[choose("train.schedule", train.schedule, after_warmup)]()
    # A step's rate is the schedule at its end of the warm-up: the first step moves.
    whole = optax.join_schedules([lambda step: peak * (step + 1) / max(warmup, 1), chosen], [warmup])
    return np.asarray(whole(np.arange(steps)), np.float32)


def numbers_by_step(train):
    """A function step -> Numbers, evaluated on the host."""
    rates = schedule(train)
    fixed = [np.float32(train[name]) for name in Numbers._fields[1:]]
    return lambda step: Numbers(rates[step], *fixed)


def check(train) -> None:
    """Refuses training settings that mean nothing."""
    choose("train.optimizer", train.optimizer, OPTIMIZERS)
    choose("train.decay", train.decay, ("declared", "all"))
    for field in ("steps", "microbatches"):
        if train[field] < 1:
            raise UserError(f"train.{field} = {train[field]} must be at least 1")
    if not 0 <= train.warmup <= train.steps:
        raise UserError(f"train.warmup = {train.warmup} must lie in 0..train.steps = {train.steps}")
    if not 0 <= train.cooldown <= 1:
        raise UserError(f"train.cooldown = {train.cooldown} is a share of the steps: choose a value in 0..1")
    schedule(train.copy_and_resolve_references())
