"""Checkpoints of a run, by Orbax: asynchronous, the last few kept, an unreadable newest one passed over."""

import errno
import logging
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from lab.errors import UserError
from lab.model import parameter
from lab.train.step import State


class Position(NamedTuple):
    """Where a run stands: updates made, and the texts read for them."""

    step: int
    texts: int


def _named(tree) -> dict:
    """Leaves by the dotted path to each."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _unnamed(named: dict, like):
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in _named(like)])


def _saved(state: State) -> dict:
    """What a checkpoint holds of a state: tables are not in it, they are rebuilt from the config."""
    return {"model": _named(parameter.split(state.model)[1]), "optimizer": _named(state.optimizer)}


def _restorable(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@jax.jit
def _checksum(tree) -> jax.Array:
    """uint32 over the bits of every number: Orbax notices a torn file, but not a flipped byte.

    A sum modulo 2^32 in which every word has an odd weight, so that one bit changed anywhere, the highest included,
    changes it; the weights differ from place to place, so that numbers exchanged change it too.
    """

    def weighed(x, number):
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
        places = sum(
            (jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(math.prod(words.shape[axis + 1 :])))
            for axis in range(words.ndim)
        )
        return jnp.sum(words * (2 * places + jnp.uint32(2 * number + 1)), dtype=jnp.uint32)

    return sum(weighed(x, 7919 * number) for number, x in enumerate(jax.tree.leaves(tree)))


def _with_weights(model, named: dict):
    structure, trainable, rest = parameter.split(model)
    return nnx.merge(structure, _unnamed(named, trainable), rest)


def read_model(directory: pathlib.Path, model, step: int | None = None):
    """`model` with the weights of a checkpoint, the newest by default. Raises UserError where there is none."""
    manager = ocp.CheckpointManager(pathlib.Path(directory).absolute())
    steps = manager.all_steps()
    if not steps or (step is not None and step not in steps):
        raise UserError(
            f"{directory} has no checkpoint{'' if step is None else f' {step}'}; there are: {sorted(steps)}"
        )
    target = {"model": _restorable(_named(parameter.split(model)[1]))}
    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    only_model = ocp.args.PyTreeRestore(target, restore_args=arguments, partial_restore=True)
    found = manager.restore(max(steps) if step is None else step, args=ocp.args.Composite(state=only_model))
    return _with_weights(model, found["state"]["model"])


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
        saved = _saved(state)
        about = position._asdict() | {"checksum": int(_checksum(saved))}
        items = ocp.args.Composite(state=ocp.args.StandardSave(saved), position=ocp.args.JsonSave(about))
        self._named_if_full(lambda: self._manager.save(position.step, args=items))

    def wait(self) -> None:
        """Returns when what was begun is on disk."""
        self._named_if_full(self._manager.wait_until_finished)

    def restore(self, like: State) -> tuple[Position, State] | None:
        """The newest checkpoint that can be read, laid over devices as `like` is; None where there is none."""
        target = ocp.args.Composite(
            state=ocp.args.StandardRestore(_restorable(_saved(like))), position=ocp.args.JsonRestore()
        )
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._manager.restore(step, args=target)
                checksum = found["position"].pop("checksum")
                if found["position"]["step"] != step or checksum != int(_checksum(found["state"])):
                    raise ValueError("its numbers are not those that were saved")
                model = _with_weights(like.model, found["state"]["model"])
                optimizer = _unnamed(found["state"]["optimizer"], like.optimizer)
                return Position(**found["position"]), State(model, optimizer)
            except Exception as error:  # Orbax raises many kinds for a damaged one, and a bare Exception among them
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
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would tell of every write that failed
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
