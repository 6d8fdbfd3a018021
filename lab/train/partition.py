"""Which part of a model is trained: all of it; all but what train.freeze names; or adapters alone (model.lora).

A partial model has Frozen weights, which are not differentiated, optimised or saved: whoever reads the checkpoint of a
run reads them from the one that training began from.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from lab import model as lab_model
from lab.errors import UserError, shown
from lab.model import lora, parameter
from lab.options import Option, leaves, tuples

FREEZE = Option(
    (), "weights that are not trained, by names on the paths to them, as ('embedding', 'feedforward')",
    kind=tuple[str, ...],
)  # fmt: skip
OPTIONS = {f"model.{name}": option for name, option in lora.OPTIONS.items()} | {"train.freeze": FREEZE}


class Partition(NamedTuple):
    """Options of model.lora, and train.freeze."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    freeze: tuple[str, ...]

    @classmethod
    def of(cls, config: ConfigDict | Mapping[str, Any]) -> "Partition":
        """That of a config, or of a stored one, which may lack them. Raises UserError for what they cannot be."""
        fields = leaves(config)
        values = {name: tuples(fields.get(name, option.default)) for name, option in OPTIONS.items()}
        for name, option in OPTIONS.items():
            option.check(name, values[name])
        return cls(*values.values())

    @property
    def partial(self) -> bool:
        """Whether some weights are not trained."""
        return bool(self.rank or self.freeze)


def parted(model, partition: Partition, key: jax.Array):
    """A whole model as it is trained; `key` draws adapters. Raises UserError for names that it does not have."""
    if partition.rank:
        return lora.adapted(model, partition.rank, partition.alpha, partition.targets, key)
    if not partition.freeze:
        return model
    weights = [path for path, v in parameter.by_parts(model).items() if isinstance(v, nnx.Param)]
    taken = {*parameter.chosen("a name in train.freeze", partition.freeze, weights)}
    return parameter.freeze(model, lambda path, weight: path in taken)


def whole(model):
    """A partial model as one that is called, saved and loaded like any other: adapters merged, nothing frozen."""
    return parameter.thaw(lora.merged(model)) if is_partial(model) else model


def is_partial(model) -> bool:
    """Whether some of its weights are Frozen."""
    return any(isinstance(v, parameter.Frozen) for v in parameter.by_parts(model).values())


def abstract(config: ConfigDict):
    """The model of a config as it is trained, by shapes alone."""

    def made(key):
        return parted(lab_model.build(config.model, key, config.run), Partition.of(config), key)

    return jax.eval_shape(made, jax.eval_shape(lambda: jax.random.key(0)))  # no device is asked


def without_gradient(model) -> int:
    """Of a partial model, the numbers of the matrices, head included, by which tokens are multiplied and for which no
    gradient is made."""
    head = model.embedding if model.head is None else model.head
    found = head.get_raw_value().size if isinstance(head, parameter.Frozen) else 0
    adapted = {*lora.adapters(model)}
    for path, variable in parameter.by_parts(model).items():
        if path[0] == "blocks" and path not in adapted and isinstance(variable, parameter.Frozen):
            shape, looked_up = variable.get_raw_value().shape, variable.get_metadata().get("looked_up")
            found += int(np.prod(shape)) * (len(shape) > 2 and not looked_up)  # the first axis is that of layers
    return int(found)


def _told(partition: Partition) -> str:
    rank, freeze = partition.rank, shown(partition.freeze)
    return f"model.lora.rank = {rank}" if rank else f"train.freeze = {freeze}"


def check_begun(config: ConfigDict) -> None:
    """Refuses to train a part of a model whose rest comes from nowhere: what such a cell costs can be planned."""
    partition = Partition.of(config)
    if partition.partial and not config.checkpoint:
        raise UserError(
            f"{_told(partition)} trains a part of a model, and the rest comes from a checkpoint: give the directory of "
            "an imported model, or of a cell that a study has trained, --config.checkpoint=runs/<study>/cells/<cell>"
        )


def check(config: ConfigDict) -> None:
    """Refuses parts of a model that it does not have, and those that cannot be alone."""
    partition = Partition.of(config)
    if not partition.partial:
        return
    told = _told(partition)
    if not config.train.steps:
        raise UserError(f"{told} means nothing beside train.steps = 0, which trains nothing; leave one of them out")
    if partition.rank and partition.freeze:
        raise UserError(
            f"train.freeze = {shown(partition.freeze)} means nothing beside {told}, which freezes all that is not an "
            "adapter; choose ()"
        )
    if partition.rank and config.train.optimizer == "muon" and config.train.muon.on:
        raise UserError(f"train.muon.on = {shown(config.train.muon.on)} names no adapters, beside {told}; choose ()")
    if partition.rank and config.model.parametrization.name != "standard":
        raise UserError(
            f"{told} has no rates under model.parametrization.name = {config.model.parametrization.name!r}; choose "
            "'standard', or model.lora.rank = 0"
        )
    if not jax.tree.leaves(parameter.split(abstract(config))[1]):
        raise UserError(f"{told} leaves nothing to train; name fewer")
