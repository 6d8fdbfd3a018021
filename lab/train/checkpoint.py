"""Checkpoints of a run, by Orbax: asynchronous, the last few kept, a damaged newest one set aside.

What is damaged stays on the disk, in SET_ASIDE beside the checkpoints. What cannot be read for now, for want of rights
or of a disk that answers, is not damaged: it stops the command.
"""

import errno
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from lab import watch
from lab.errors import UserError
from lab.model import parameter
from lab.storage import find_json, sealed, unsealed
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


def _shapes(named: dict) -> str:
    """A digest of the names and shapes of weights: of a model, whatever its numbers."""
    return hashlib.sha256(json.dumps(sorted((name, x.shape) for name, x in named.items())).encode()).hexdigest()[:16]


def _with_weights(model, named: dict):
    structure, trainable, rest = parameter.split(model)
    return nnx.merge(structure, _unnamed(named, trainable), rest)


def _sum_of_frozen(model) -> int | None:
    """Of the weights of a model that are not saved with it; None where there are none."""
    frozen = _named(parameter.frozen(model))
    return int(_checksum(frozen)) if frozen else None


CHANGED = "its numbers are not those that were saved"
SET_ASIDE = "set_aside"  # beside the directory of checkpoints
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # what a damaged checkpoint gives; any other error may pass
PASSING = ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")  # as TensorStore spells such errors


def locate(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path, int | None]:
    """(the directory of the cell, that of the checkpoints, a step; None: the newest) of a cell, of one of its seeds or
    of one checkpoint; of a cell the first seed is taken. Raises UserError where there is none."""
    path = pathlib.Path(path)
    cell = next((p for p in (path, *path.parents) if (p / "config.json").is_file()), None)
    if cell is None:
        raise UserError(
            f"{path} is in no cell: neither it nor a directory above it has a config.json; "
            "choose one such as runs/STUDY/cells/NAME-IDENTITY"
        )
    if "model_type" in (find_json(cell / "config.json") or {}):
        raise UserError(
            f"{cell} is of Hugging Face's format; convert it first: python -m lab.convert from-hf {cell} OUT"
        )
    if path == cell:
        seeds = [int(seed.name[5:]) for seed in cell.glob("seed-*") if seed.name[5:].isdecimal()]
        path = cell / f"seed-{min(seeds, default=0)}"
    step = int(path.name) if path.name.isdecimal() else None
    directory = path.parent if step is not None else path / "checkpoints"
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist: nothing was saved there yet")
    return cell, directory, step


def _step_of(manager: ocp.CheckpointManager, directory: pathlib.Path, step: int | None) -> int:
    """The step that is asked for, the newest by default. Raises UserError where there is none."""
    steps = manager.all_steps()
    if not steps or (step is not None and step not in steps):
        raise UserError(
            f"{directory} has no checkpoint{'' if step is None else f' {step}'}; there are: {sorted(steps)}"
        )
    return max(steps) if step is None else step


def newest(directory: pathlib.Path, step: int | None = None) -> tuple[int, dict]:
    """(step, what stands beside the numbers) of a checkpoint, the newest by default. Raises UserError as `read_model`
    does."""
    directory = pathlib.Path(directory).absolute()
    manager = ocp.CheckpointManager(directory)
    step = _step_of(manager, directory, step)
    try:
        return step, unsealed(
            manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]
        )
    except Exception as error:  # Orbax raises many kinds for a damaged one, and a bare Exception among them
        place = directory / str(step)
        damaged = UserError(f"checkpoint {place} cannot be read ({_reason(error)})")
        raise passing_error(place, error) or damaged from error


def read_model(directory: pathlib.Path, model, step: int | None = None):
    """`model` with the weights of a checkpoint in the place of its trainable ones, the newest by default. Raises
    UserError where there is none, where it is damaged, and where the model's frozen weights are not those that it was
    saved beside; Unreadable where it cannot be read for now."""
    directory = pathlib.Path(directory).absolute()
    manager = ocp.CheckpointManager(directory)
    step = _step_of(manager, directory, step)
    target = {"model": _restorable(_named(parameter.split(model)[1]))}
    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    only_model = ocp.args.PyTreeRestore(target, restore_args=arguments, partial_restore=True)
    try:
        found = manager.restore(step, args=ocp.args.Composite(state=only_model, position=ocp.args.JsonRestore()))
        about = unsealed(found["position"])
        if about["weights"] != int(_checksum(found["state"]["model"])):
            raise ValueError(CHANGED)
        if about.get("frozen") != _sum_of_frozen(model):
            raise OtherBase(directory / str(step))
        return _with_weights(model, found["state"]["model"])
    except Exception as error:  # Orbax raises many kinds for a damaged one, and a bare Exception among them
        place = directory / str(step)
        damaged = UserError(f"checkpoint {place} cannot be read ({_reason(error)})")
        raise passing_error(place, error) or damaged from error


class _Manager(ocp.CheckpointManager):
    """Does not ask whether to stop: the loop does. What the hosts agree on is a number of their calls, and Orbax would
    write numbers of steps among them: a host that has passed the number which is agreed on would never stop."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run. Every host calls every method."""

    def __init__(self, directory: pathlib.Path, keep: int):
        self.directory = pathlib.Path(directory).absolute()
        tell_failures_once()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = _Manager(self.directory, options=options)

    def steps(self) -> list[int]:
        """The checkpoints that stand, by the updates before each."""
        return sorted(self._manager.all_steps())

    def save(self, position: Position, state: State) -> None:
        """Begins to save; the arrays may be donated as soon as it returns. A checkpoint that stands is kept."""
        if position.step in self.steps():
            return
        saved = _saved(state)
        sums = {"numbers": int(_checksum(saved)), "weights": int(_checksum(saved["model"]))}
        sums["shapes"] = _shapes(saved["model"])
        if (frozen := _sum_of_frozen(state.model)) is not None:
            sums["frozen"] = frozen
        about = ocp.args.JsonSave(sealed(position._asdict() | sums))
        items = ocp.args.Composite(state=ocp.args.StandardSave(saved), position=about)
        self._named_if_full(lambda: self._manager.save(position.step, args=items))

    def wait(self) -> None:
        """Returns when what was begun is on disk."""
        self._named_if_full(self._manager.wait_until_finished)

    def restore(self, like: State) -> tuple[Position, State] | None:
        """The newest checkpoint that can be read, laid over devices as `like` is; None where there is none. Damaged
        ones are set aside. Raises Unreadable where one cannot be read for now, OtherBase and OtherModel."""
        for step in reversed(self.steps()):
            place, found, failed = self.directory / str(step), None, None
            try:
                found = self._read(step, like)
            except Exception as error:  # Orbax raises many kinds for a damaged one, and a bare Exception among them
                failed = error
            if not _any_host(failed is not None):
                return found
            if _any_host(failed is not None and self._of_another_model(step, like)):
                raise OtherModel(place)
            passing = failed and passing_error(place, failed)
            if _any_host(bool(passing)):
                raise passing or Unreadable(place, "another host cannot")
            reason = _reason(failed) if failed else "another host cannot"
            logging.warning("checkpoint %s cannot be read (%s): taking the one before", place, reason)
            self._set_aside(step)
        return None

    def _of_another_model(self, step: int, like: State) -> bool:
        """Whether a checkpoint that cannot be laid into `like` is whole beside that, and says of what shapes it is."""
        try:
            about = unsealed(
                self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]
            )
        except Exception:  # it is damaged
            return False
        return about.get("shapes") not in (None, _shapes(_saved(like)["model"]))

    def take_back(self, step: int, why: str) -> None:
        """Sets aside the checkpoints of more than `step` updates, and says why."""
        for later in [one for one in self.steps() if one > step]:
            logging.warning("checkpoint %s is set aside: %s", self.directory / str(later), why)
            self._set_aside(later)

    def _read(self, step: int, like: State) -> tuple[Position, State]:
        target = ocp.args.Composite(
            state=ocp.args.StandardRestore(_restorable(_saved(like))), position=ocp.args.JsonRestore()
        )
        found = self._manager.restore(step, args=target)
        about = unsealed(found["position"])
        if about["step"] != step or about["numbers"] != int(_checksum(found["state"])):
            raise ValueError(CHANGED)
        if about.get("frozen") != _sum_of_frozen(like.model):
            raise OtherBase(self.directory / str(step))
        model = _with_weights(like.model, found["state"]["model"])
        return Position(step, about["texts"]), State(model, _unnamed(found["state"]["optimizer"], like.optimizer))

    def _set_aside(self, step: int) -> None:
        """Moves a checkpoint out of the way, so that its step is saved again; process 0 does for all hosts."""
        if jax.process_index() == 0:
            place = self.directory.parent / SET_ASIDE
            place.mkdir(exist_ok=True)
            names = (place / f"{step}-{number}" for number in itertools.count(1))
            os.rename(self.directory / str(step), next(name for name in names if not name.exists()))
        _any_host(False)  # all wait for it
        self._manager.reload()
        _any_host(False)  # and for those that still look: another may be moved next

    def close(self) -> None:
        """Waits for what was begun."""
        self._named_if_full(self._manager.close)

    def _named_if_full(self, action) -> None:
        try:
            with watch.phase("saves"):
                action()
        except Exception as error:  # Orbax wraps what its threads raise in many kinds
            if not is_disk_full(error):
                raise
            raise DiskFull(self.directory) from error


def tell_failures_once() -> None:
    """Orbax raises what its threads meet. asyncio would besides tell of every write that failed, and TensorStore of
    every one that outlives a save that failed: at any time later, a traceback each."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable


def _unraisable(met) -> None:
    if met.exc_type is not RuntimeError or str(met.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(met)


def _any_host(mine: bool) -> bool:
    """Whether it is so on any host; every host asks."""
    return mine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(mine)).any())


def _reason(error: BaseException) -> str:
    """The first line of an error, and no more of it than fits on one."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


class Unreadable(UserError):
    """A checkpoint is there, and cannot be read for now."""

    exit_code = 1

    def __init__(self, place: pathlib.Path, reason: str):
        super().__init__(
            f"checkpoint {place} cannot be read for now ({reason}): nothing is changed; mend that and run the same "
            "command again"
        )


class OtherBase(UserError):
    """A checkpoint of a part of a model is whole, and the rest is not what it was trained upon."""

    def __init__(self, place: pathlib.Path):
        super().__init__(
            f"checkpoint {place} cannot be read: it is a part of a model, and was trained upon other weights than "
            "those of its base; put the base back, or say where it is: lab.load(path, base=...)"
        )


class OtherModel(UserError):
    """A checkpoint is whole, and of a model of other shapes."""

    def __init__(self, place: pathlib.Path):
        super().__init__(
            f"checkpoint {place} is of another model: its weights have other names or shapes than those of this run; "
            f"move {place.parent} away, and run the same command again"
        )


def passing_error(place: pathlib.Path, error: BaseException) -> BaseException | None:
    """What to raise where a checkpoint could not be read for a reason that may pass; None where it is damaged.

    Orbax takes what it may not look at for missing, so all files are looked at here.
    """
    for one in _chain(error):
        if isinstance(one, OtherBase):
            return one
        if isinstance(one, MemoryError) or "RESOURCE_EXHAUSTED" in str(one):
            return error  # of the memory of a host or a device
        if isinstance(one, OSError) and one.errno is not None and one.errno not in MISSING:
            return Unreadable(place, _reason(one))
        if str(one).startswith(PASSING):
            return Unreadable(place, _reason(one))
    try:
        for directory, _, files in os.walk(place, onerror=_raise):
            for name in files:
                with open(os.path.join(directory, name), "rb") as file:
                    while file.read(2**20):
                        pass
    except OSError as found:
        return None if found.errno in MISSING else Unreadable(place, _reason(found))
    return None


def _raise(error: OSError) -> None:
    raise error


def _chain(error: BaseException | None):
    """An error, and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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
    return any(
        getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(one)
        for one in _chain(error)
    )
