"""Dropout in training: which rates are in the program, and the numbers of each step that decide what is dropped."""

import dataclasses
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from lab import kernels
from lab.data import Batch
from lab.errors import UserError
from lab.model.dropout import Dropout
from lab.model.mixers import MIXERS
from lab.model.spec import layer_specs
from lab.options import Option

RATES = {
    "attention": "of probabilities, after the softmax",
    "embedding": "of the numbers of the embedding",
    "residual": "of the numbers that each sublayer puts out",
}
OPTIONS = {
    f"dropout.{name}": Option(0.0, f"share {of} that training drops; 0: none", least=0, below=1)
    for name, of in RATES.items()
}


def of_program(train) -> tuple[str, ...]:
    """The rates above 0, by name: those alone are in a program. What they are is a number of the call."""
    return tuple(name for name in RATES if train.dropout[name] > 0)


def of_attention(train) -> bool:
    """Whether an implementation of attention has to drop."""
    return train.dropout.attention > 0


def numbers_by_step(config: ConfigDict) -> Callable[[int], dict]:
    """A function step -> what `noise` reads, Numbers beside the optimizer's; nothing where nothing is dropped."""
    rates = {f"dropout.{name}": np.float32(config.train.dropout[name]) for name in of_program(config.train)}
    return lambda step: rates and rates | {"step": np.int32(step), "model_seed": np.int32(config.model_seed)}


def noise(numbers: dict, names: tuple[str, ...]) -> Dropout | None:
    """What a step drops, of rows still to be named; None if nothing."""
    rates = {name: numbers[f"dropout.{name}"] for name in names}
    return Dropout(numbers["model_seed"], numbers["step"], rates) if rates else None


def numbered(batch: Batch, first: int) -> Batch:
    """A host's rows, which are `first` and those after it of the whole step."""
    rows = np.arange(first, first + len(batch.tokens), dtype=np.int32)
    return dataclasses.replace(batch, rows=np.repeat(rows[:, None], batch.tokens.shape[1], axis=1))


def check(config: ConfigDict) -> None:
    """Refuses dropout of attention for layers that have no probabilities, and for a kernel that does not drop."""
    if not of_attention(config.train):
        return
    told = f"train.dropout.attention = {config.train.dropout.attention}"
    for spec in layer_specs(config.model):
        if not MIXERS[spec.mixer.name].attends:
            able = ", ".join(name for name, mixer in MIXERS.items() if mixer.attends)
            raise UserError(
                f"{told}: model.mixer.name = {spec.mixer.name!r} has no probabilities to drop; choose 0, or among: "
                f"{able}"
            )
    name = config.run.implementation
    if name != "auto" and not kernels.IMPLEMENTATIONS[name].drops:
        able = ", ".join(name for name, row in kernels.IMPLEMENTATIONS.items() if row.drops)
        raise UserError(f"{told}: run.implementation = {name!r} drops no probabilities; choose among: auto, {able}")
