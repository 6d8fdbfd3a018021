"""The directory of a study: whether it can be used, and that one config at a time uses it."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator

import filelock
from ml_collections import ConfigDict

from lab.errors import UserError
from lab.storage import mirror, read_json
from lab.study.define import identity
from lab.train.checkpoint import is_disk_full

OURS = (".plan.json.", ".runs.")  # of files that a killed command leaves in a directory without a plan


def check(workdir: pathlib.Path, config: ConfigDict) -> dict:
    """The plan of the study that is there, {} of none. Raises UserError where the directory holds anything else."""
    path = workdir / "plan.json"
    if path.exists():
        try:
            there = read_json(path)
        except UserError as error:
            raise UserError(f"{error}; delete it, or choose another --workdir") from None
        if not isinstance(there.get("study"), str):
            raise UserError(f"{path} is no plan of a study; delete it, or choose another --workdir")
        if there["study"] != config.study.name:
            raise UserError(
                f"--workdir={workdir} holds the study {there['study']!r}, not {config.study.name!r}; "
                "choose another directory"
            )
        return there
    if any(workdir.glob(f"cells/*/{identity.FILE}")):  # its plan was deleted
        return {}
    if workdir.is_dir() and any(not entry.name.startswith(OURS) for entry in workdir.iterdir()):
        raise UserError(f"--workdir={workdir} holds other files and no study; choose an empty or new directory")
    return {}


@contextlib.contextmanager
def writable(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the directory. Raises UserError where it, or what the block writes in it, cannot be."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"--workdir={workdir} cannot be used ({error.strerror or error}); choose a directory that can be written"
        ) from error


@contextlib.contextmanager
def held(workdir: pathlib.Path, config: ConfigDict) -> Iterator[None]:
    """Keeps commands of another config out of the directory while the block runs: each would end with the report of
    whichever began last. How a study runs may differ. Raises UserError where another one is running."""
    ours = hashlib.sha256(json.dumps(_about(_plain(config)), sort_keys=True).encode()).hexdigest()[:12]
    with writable(workdir):
        lock = _first_free(workdir, ours)
    store = mirror(workdir)
    try:
        there = [path for path in workdir.glob(".runs.*") if path.name.split(".")[2] != ours and not _left(path)]
        with store.announced(ours) if store else contextlib.nullcontext(set()) as elsewhere:
            if there or elsewhere - {ours}:
                raise UserError(
                    f"--workdir={workdir}: another config of the study {config.study.name!r} is running there; give "
                    "this one a --workdir of its own, or wait for the other"
                )
            yield
    finally:
        pathlib.Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def replaced(there: dict, config: ConfigDict) -> str:
    """A line that the report will be of another config than the one before; "" if it will not."""
    before = there.get("config")
    if not isinstance(before, dict) or _about(before) == _about(_plain(config)):
        return ""
    return (
        f"the report here was of {there.get('command', 'another command')} and will be of this one, and the cells of "
        "both stay; --workdir=DIR keeps the reports apart"
    )


def _plain(config: ConfigDict) -> dict:
    return json.loads(config.to_json_best_effort())


def _about(config: dict) -> dict:
    """A config, but for how it runs."""
    return {room: values for room, values in config.items() if room != "run"}


def _first_free(workdir: pathlib.Path, ours: str) -> filelock.BaseFileLock:
    """A lock of this command's own, among those of others of the same config."""
    number = 0
    while True:
        lock = filelock.FileLock(workdir / f".runs.{ours}.{number}")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            number += 1
            continue
        if pathlib.Path(lock.lock_file).exists():
            return lock
        lock.release()  # of a file that another command has deleted since it was opened here: nobody would see it


def _left(path: pathlib.Path) -> bool:
    """Whether nobody holds a lock: a command that was killed leaves the file of its own."""
    try:
        with filelock.FileLock(path, blocking=False):
            return True
    except filelock.Timeout:
        return False
