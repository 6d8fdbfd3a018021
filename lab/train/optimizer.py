"""The optimizer from optax, with every number a value of the call: cells that differ in numbers share a program."""

from typing import NamedTuple

import numpy as np
import optax

from lab import model as lab_model
from lab.errors import UserError, choose
from lab.model import parameter
from lab.train import muon as lab_muon


class Numbers(NamedTuple):
    """What a study may vary without another program; float32 scalars, given to every call of the step."""

    learning_rate: np.float32
    weight_decay: np.float32
    b1: np.float32
    b2: np.float32
    eps: np.float32
    clip: np.float32
    z_loss: np.float32
    momentum: np.float32  # this and the next two: of Muon
    adam_rate: np.float32
    adam_decay: np.float32


def adamw(numbers: Numbers, decay_mask) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101)."""
    return optax.adamw(
        numbers.learning_rate, numbers.b1, numbers.b2, numbers.eps, weight_decay=numbers.weight_decay, mask=decay_mask
    )


def muon(numbers: Numbers, decay_mask, scaling="moonlight", steps="5", per_head="none", on=()):
    """Muon on matrices (arXiv 2502.16982), and AdamW with a rate and a decay of its own on the rest.

    Of optax's parts: in optax.contrib.muon that AdamW has Nesterov momentum, decays norms, and shares Muon's eps.
    """
    matrices = optax.chain(
        lab_muon.orthogonalised(numbers.momentum, scaling, steps, per_head, on),
        optax.add_decayed_weights(numbers.weight_decay, decay_mask),
        optax.scale_by_learning_rate(numbers.learning_rate),
    )
    rate = numbers.learning_rate * numbers.adam_rate
    rest = adamw(numbers._replace(learning_rate=rate, weight_decay=numbers.adam_decay), decay_mask)
    return optax.partition({"muon": matrices, "adamw": rest}, lambda tree: lab_muon.groups(tree, on))


OPTIMIZERS = {"adamw": adamw, "muon": muon}

# The fields of config.train.<optimizer> that are compiled in: further arguments of the optimizer, in this order.
OPTIONS = {"adamw": (), "muon": ("scaling", "steps", "per_head", "on")}


def options(train) -> tuple:
    """What is compiled into the optimizer that a config names, beside its name."""
    return tuple(train[train.optimizer][field] for field in OPTIONS[train.optimizer])


def transformation(name: str, decay: str, numbers: Numbers, trainable, options=()) -> optax.GradientTransformation:
    """Clipping by the global norm, then the optimizer that a config names."""
    mask = parameter.decay_mask(trainable, everything=decay == "all")
    return optax.chain(optax.clip_by_global_norm(numbers.clip), OPTIMIZERS[name](numbers, mask, *options))


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
    settings = {**train.muon, **train}
    fixed = [np.float32(settings[name]) for name in Numbers._fields[1:]]
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
    lab_muon.check(train.muon)


def check_parameters(train, model) -> None:
    """Refuses names of parameters in train.muon.on that the model does not have, or that are no matrices."""
    if train.optimizer == "muon" and train.muon.on:
        lab_muon.check_names(train.muon.on, parameter.split(lab_model.abstract(model))[1])
