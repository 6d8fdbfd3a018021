"""Checkpoints of a run, by Orbax: asynchronous, the last few kept, an unreadable newest one passed over."""

import errno
import logging
import pathlib
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import nnx

from lab.errors import UserError
from lab.model import parameter
from lab.train.step import State

_UNREADABLE = (ValueError, OSError, KeyError, RuntimeError)  # what Orbax and TensorStore raise for a damaged one


class Position(NamedTuple):
    """Where a run stands: updates made, and the texts read for them."""

    step: int
    texts: int


def _tree(state: State) -> dict:
    """The trained part of a state under plain names; tables are rebuilt from the config."""
    model = nnx.to_pure_dict(parameter.split(state.model)[1])
    return {
        "model": _text_keys(model),
        "optimizer": {str(i): x for i, x in enumerate(jax.tree.leaves(state.optimizer))},
    }


def _text_keys(tree):
    return {str(k): _text_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _rebuild(tree: dict, like: State) -> State:
    structure, trainable, rest = parameter.split(like.model)
    values = jax.tree.unflatten(jax.tree.structure(trainable), jax.tree.leaves(tree["model"]))
    leaves = [tree["optimizer"][str(i)] for i in range(len(tree["optimizer"]))]
    optimizer = jax.tree.unflatten(jax.tree.structure(like.optimizer), leaves)
    return State(nnx.merge(structure, values, rest), optimizer)


def _restorable(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class Checkpoints:
    """The checkpoints of one run. Every host calls every method."""

    def __init__(self, directory: pathlib.Path, keep: int):
        self.directory = pathlib.Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, position: Position, state: State) -> None:
        """Begins to save; the arrays may be donated as soon as it returns. A checkpoint that stands is kept."""
        if position.step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_tree(state)), position=ocp.args.JsonSave(position._asdict())
        )
        self._named_if_full(lambda: self._manager.save(position.step, args=items))

    def wait(self) -> None:
        """Returns when what was begun is on disk."""
        self._named_if_full(self._manager.wait_until_finished)

    def restore(self, like: State) -> tuple[Position, State] | None:
        """The newest checkpoint that can be read, laid over devices as `like` is; None where there is none."""
        target = ocp.args.Composite(
            state=ocp.args.StandardRestore(_restorable(_tree(like))), position=ocp.args.JsonRestore()
        )
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._manager.restore(step, args=target)
                return Position(**found["position"]), _rebuild(found["state"], like)
            except _UNREADABLE as error:
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
                logging.warning(
                    "checkpoint %s cannot be read (%s): taking the one before", self.directory / str(step), reason
                )
                self._manager.delete(step)
        return None

    def close(self) -> None:
        self._manager.close()

    def _named_if_full(self, action) -> None:
        try:
            action()
        except Exception as error:  # Orbax wraps what its threads raise in many kinds
            if not is_disk_full(error):
                raise
            raise DiskFull(self.directory) from error


class DiskFull(UserError):
    """A checkpoint could not be written for want of space."""

    exit_code = 1

    def __init__(self, directory: pathlib.Path):
        super().__init__(
            f"the disk is full: no room for a checkpoint in {directory}; free space and run the same command again: "
            "finished cells are kept and this one goes on from its last checkpoint"
        )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that no space is left."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
