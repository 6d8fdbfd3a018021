"""The optimizer from optax, with every number a value of the call: cells that differ in numbers share a program."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import optax

from lab import model as lab_model
from lab.errors import UserError
from lab.model import parameter
from lab.options import Option, Part, Room, leaves
from lab.train import dropout, others, partition
from lab.train import muon as lab_muon

Numbers = dict  # {dotted name below config.train: float32}: what a study may vary without another program


class Optimizer(NamedTuple):
    """make(numbers, static, decay_mask): `numbers` are the values of a call, `static` what is compiled in, both those
    of `options`, and of other optimizers what `reads` names. A number is an option whose default is a float.

    elementwise: whether it scales every entry of an update to about the rate by itself, as Adam does: what a
    parametrization says of rates is meant for these. evaluated(numbers, state, trainable): the weights at which the
    trained model is evaluated, where they are others than those that it trains at.
    """

    make: Callable[[Numbers, Mapping[str, object], object], optax.GradientTransformation]
    options: Mapping[str, Option]
    reads: tuple[str, ...] = ()
    elementwise: bool = False
    evaluated: Callable | None = None


def adamw(numbers: Numbers, static, decay_mask) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101)."""
    b1, b2, eps = (numbers[f"adamw.{name}"] for name in ADAMW)
    return optax.adamw(numbers["learning_rate"], b1, b2, eps, weight_decay=numbers["weight_decay"], mask=decay_mask)


def muon(numbers: Numbers, static, decay_mask) -> optax.GradientTransformation:
    """Muon on matrices (arXiv 2502.16982), and AdamW with a rate and a decay of its own on the rest.

    Of optax's parts: in optax.contrib.muon that AdamW has Nesterov momentum, decays norms, and shares Muon's eps.
    """
    scaling, steps, per_head, on = (static[f"muon.{name}"] for name in ("scaling", "steps", "per_head", "on"))
    matrices = optax.chain(
        lab_muon.orthogonalised(numbers["muon.momentum"], scaling, steps, per_head, on),
        optax.add_decayed_weights(numbers["weight_decay"], decay_mask),
        optax.scale_by_learning_rate(numbers["learning_rate"]),
    )
    rate = numbers["learning_rate"] * numbers["muon.adam_rate"]
    rest = adamw(numbers | {"learning_rate": rate, "weight_decay": numbers["muon.adam_decay"]}, static, decay_mask)
    return optax.partition({"muon": matrices, "adamw": rest}, lambda tree: lab_muon.groups(tree, on))


ADAMW = {
    "b1": Option(0.9, "decay of the mean of gradients", least=0, below=1),
    "b2": Option(0.95, "decay of the mean of their squares", least=0, below=1),
    "eps": Option(1e-8, "added to the root of that", above=0),
}
OPTIMIZERS = {
    "adamw": Optimizer(adamw, ADAMW, elementwise=True),
    "muon": Optimizer(muon, lab_muon.OPTIONS, reads=tuple(f"adamw.{name}" for name in ADAMW)),
    "lion": Optimizer(others.lion, others.LION, elementwise=True),
    "adafactor": Optimizer(others.adafactor, others.ADAFACTOR),
    "ademamix": Optimizer(others.ademamix, others.ADEMAMIX, elementwise=True),
    "adopt": Optimizer(others.adopt, others.ADOPT, elementwise=True),
    "schedule_free_adamw": Optimizer(
        others.schedule_free_adamw, others.SCHEDULE_FREE, evaluated=others.schedule_free_evaluated
    ),
}


def transformation(
    name: str, decay: str, numbers: Numbers, trainable, static: tuple[tuple[str, object], ...] = ()
) -> optax.GradientTransformation:
    """Clipping by the global norm, then the optimizer that a config names; where parameters declare factors of the rate
    and of the decay, once for each pair of them."""
    mask = parameter.decay_mask(trainable, everything=decay == "all")
    make = lambda numbers: OPTIMIZERS[name].make(numbers, dict(static), mask)  # noqa: E731
    factors, labels = parameter.factors(trainable)
    each = {label: make(_multiplied(numbers, *pair)) for label, pair in factors.items()}
    chosen = optax.partition(each, labels) if len(each) > 1 else each.popitem()[1]
    return optax.chain(optax.clip_by_global_norm(numbers["clip"]), chosen)


def _multiplied(numbers: Numbers, rate: float, decay: float) -> Numbers:
    """With the rate and the decay times so much; as they are where it is one."""
    if (rate, decay) == (1.0, 1.0):
        return numbers
    return numbers | {
        "learning_rate": rate * numbers["learning_rate"],
        "weight_decay": decay * numbers["weight_decay"],
    }


def evaluated(name: str, numbers: Numbers, state: optax.OptState, trainable):
    """The weights at which what was trained is evaluated. state: of `transformation`."""
    _, of_chosen = state
    return OPTIMIZERS[name].evaluated(numbers, of_chosen, trainable)


class Schedule(NamedTuple):
    """make(config.train, steps after the warm-up): what follows the warm-up."""

    make: Callable[..., optax.Schedule]
    options: Mapping[str, Option] = {}


def wsd(train, left: int) -> optax.Schedule:
    """Stable, then falling over the last train.cooldown of the steps (arXiv 2404.06395, section 4)."""
    cooling = max(round(train.cooldown * train.steps), 1)
    stable = optax.constant_schedule(train.learning_rate)
    decay = COOLDOWN_SHAPES[train.cooldown_shape](train.learning_rate, train.final_learning_rate, cooling)
    return optax.join_schedules([stable, decay], [max(left - cooling, 0)])


def one_minus_root(peak: float, final: float, steps: int) -> optax.Schedule:
    """At the share x of the steps, the share 1 - sqrt(x) of the fall is left (arXiv 2405.18392)."""
    return lambda step: peak + (final - peak) * np.sqrt(np.clip(step / steps, 0, 1))


def exponential(train, left: int) -> optax.Schedule:
    """By the same factor each step, from the peak to the final rate: most of the fall is early."""
    peak, final = train.learning_rate, train.final_learning_rate
    return optax.exponential_decay(peak, left, final / peak)


def cosine(train, left: int) -> optax.Schedule:
    """Half a cosine from the peak to the final rate."""
    peak, final = train.learning_rate, train.final_learning_rate
    return optax.cosine_decay_schedule(peak, left, alpha=final / peak if peak else 0.0)


FALLING = {"final_learning_rate": Option(3e-4, "of the last step", least=0)}
COOLDOWN_SHAPES = {"linear": optax.linear_schedule, "sqrt": one_minus_root}
COOLDOWN = {
    "cooldown": Option(0.2, "share of the steps that the rate spends falling", least=0, most=1),
    "cooldown_shape": Option("linear", "how it falls; sqrt: 1 - sqrt(x), steeply at first",
                             choices=tuple(COOLDOWN_SHAPES)),
}  # fmt: skip
SCHEDULES = {
    "constant": Schedule(lambda train, left: optax.constant_schedule(train.learning_rate)),
    "cosine": Schedule(cosine, FALLING),
    "linear": Schedule(
        lambda train, left: optax.linear_schedule(train.learning_rate, train.final_learning_rate, left), FALLING
    ),
    "exponential": Schedule(exponential, FALLING),
    "wsd": Schedule(wsd, FALLING | COOLDOWN),
}
OWN = {
    "steps": Option(250, "updates", least=1),
    "learning_rate": Option(3e-3, "at the end of the warm-up", least=0),
    "warmup": Option(30, "steps over which the rate rises", least=0),
    "weight_decay": Option(0.01, "of what decays, in units of the rate", least=0),
    "decay": Option("declared", "what decays; declared: not norms, biases, scales", choices=("declared", "all")),
    "clip": Option(1.0, "of the global gradient norm; inf: none", above=0, infinite=True),
    "z_loss": Option(0.0, "weight of log^2 Z in the objective", least=0),
    **dropout.OPTIONS,
    "freeze": partition.FREEZE,
}
TRAIN = Room(
    OWN,
    (
        Part("optimizer", OPTIMIZERS, "adamw", "what makes an update of a gradient", at="{}."),
        Part("schedule", SCHEDULES, "cosine", "the learning rate after the warm-up", at=""),
    ),
)
OF_EVERY = ("learning_rate", "weight_decay", "clip", "z_loss")  # the numbers that every optimizer is given


@functools.cache
def _of_optimizer(name: str) -> tuple[dict[str, Option], dict[str, Option]]:
    """(numbers, what is compiled in): the options of an optimizer by their names below config.train."""
    declared = TRAIN.declared()
    every = {option: declared[option] for option in declared if option in TRAIN.parts[0].options(name)}
    every |= {option: declared[option] for option in OPTIMIZERS[name].reads}
    is_number = lambda option: isinstance(option.default, float)  # noqa: E731
    numbers = {option: one for option, one in every.items() if is_number(one)}
    return numbers, {option: one for option, one in every.items() if not is_number(one)}


def static_options(train) -> tuple[tuple[str, object], ...]:
    """What is compiled into the optimizer that a config names, beside its name."""
    values = leaves(train)
    return tuple((name, values[name]) for name in _of_optimizer(train.optimizer)[1])


def ones(optimizer: str) -> Numbers:
    """Numbers of the shape that an optimizer is given: the structure of its state does not depend on them."""
    return dict.fromkeys((*OF_EVERY, *_of_optimizer(optimizer)[0]), 1.0)


def schedule(train) -> np.ndarray:
    """The learning rate of every step, float32 [steps]: linear warm-up, then the schedule that a config names."""
    warmup = train.warmup
    chosen = SCHEDULES[train.schedule].make(train, max(train.steps - warmup, 1))
    # A step's rate is the schedule at its end of the warm-up: the first step moves.
    rising = lambda step: train.learning_rate * (step + 1) / max(warmup, 1)  # noqa: E731
    return np.asarray(optax.join_schedules([rising, chosen], [warmup])(np.arange(train.steps)), np.float32)


def numbers_by_step(train) -> Callable[[int], Numbers]:
    """A function step -> Numbers, evaluated on the host."""
    rates, values = schedule(train), leaves(train)
    fixed = {name: np.float32(values[name]) for name in ones(train.optimizer)}
    return lambda step: fixed | {"learning_rate": rates[step]}


def check(train, begun: bool = False) -> None:
    """Refuses training settings that mean nothing. begun: from weights that are there, so that no step is a choice."""
    if begun and train.steps == 0:
        return TRAIN.check(leaves(train) | {"steps": 1}, "train.")
    TRAIN.check(leaves(train), "train.")
    if train.warmup > train.steps:
        raise UserError(f"train.warmup = {train.warmup} must lie in 0..train.steps = {train.steps}")
    read = TRAIN.read(leaves(train))
    if "cooldown" in read and train.warmup + round(train.cooldown * train.steps) > train.steps:
        raise UserError(
            f"train.cooldown = {train.cooldown} of train.steps = {train.steps} begins within train.warmup = "
            f"{train.warmup}: the rate would never reach its last; choose at most {1 - train.warmup / train.steps:.3g}"
        )
    if "final_learning_rate" in read and train.final_learning_rate > train.learning_rate:
        raise UserError(
            f"train.final_learning_rate = {train.final_learning_rate} is above train.learning_rate = "
            f"{train.learning_rate}: the rate would rise; choose at most that, or train.schedule = 'constant'"
        )
    if train.schedule == "exponential" and train.final_learning_rate < np.finfo(np.float32).tiny:
        raise UserError(
            f"train.final_learning_rate = {train.final_learning_rate}: no factor of a step leads there under "
            "train.schedule = 'exponential'; choose one above 0, or train.schedule = 'linear'"
        )


def check_parameters(train, model) -> None:
    """Refuses names of parameters in train.muon.on that the model does not have, or that are no matrices, and an
    optimizer for which the model's parametrization says nothing of rates."""
    named = model.parametrization.name
    if named != "standard" and not OPTIMIZERS[train.optimizer].elementwise:
        known = ", ".join(name for name, row in OPTIMIZERS.items() if row.elementwise)
        raise UserError(
            f"train.optimizer = {train.optimizer!r} has no rates under model.parametrization.name = {named!r}; choose "
            f"one of: {known}, or model.parametrization.name = 'standard'"
        )
    if train.optimizer == "muon" and train.muon.on:
        lab_muon.check_names(train.muon.on, parameter.split(lab_model.abstract(model))[1])
