"""Where what is made once is kept; files that appear whole or not at all, and JSON kept in them; and the door to
object stores, whose directories are worked on in copies here (`lab.remote`)."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
import typing
from collections.abc import Callable
from pathlib import Path

from lab.errors import UserError

if typing.TYPE_CHECKING:
    from lab.remote.fetching import Directory
    from lab.remote.mirror import Mirror

SEAL = "checksum"
_mirrors: dict[Path, Mirror] = {}  # of this process, by the directories of their copies


def cache_directory() -> Path:
    """Of texts, tokenizers and compiled programs: $LAB_CACHE; ~/.cache/lab if that is empty. It need not exist yet."""
    try:
        return Path(os.environ.get("LAB_CACHE") or "~/.cache/lab").expanduser()
    except RuntimeError as error:  # there is no home
        raise UserError(f"the cache has no place ({error}); set LAB_CACHE to a directory with room") from error


def write_atomically(path: Path, content: bytes) -> Path:
    """A reader, or a program killed here, finds the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def write_json(path: Path, value: dict) -> None:
    """Indented, sealed, with a newline at the end."""
    write_atomically(path, (json.dumps(sealed(value), indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    """What `write_json` wrote. Raises UserError where the file holds something else."""
    try:
        return unsealed(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def find_json(path: Path) -> dict | None:
    """What `write_json` wrote; None where there is no such file, and where it is damaged, as a disk or a machine that
    crashed leaves one. That is said once."""
    try:
        return unsealed(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        say_damaged(path)
        return None


def sealed(value: dict) -> dict:
    """With a checksum: a digit that a disk has changed makes JSON of another number."""
    return value | {SEAL: _checksum(value)}


def unsealed(value) -> dict:
    """What was sealed. Raises ValueError for what is no object, or not what it was; what has no seal passes."""
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    bare = {name: part for name, part in value.items() if name != SEAL}
    if SEAL in value and value[SEAL] != _checksum(bare):
        raise ValueError("its checksum is that of something else")
    return bare


def _checksum(value: dict) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


@functools.cache
def say_damaged(path: Path, told: str = "is damaged: it is taken as missing") -> None:
    """Once for each file."""
    logging.warning("%s %s", path, told)


def is_remote(path: str | Path) -> bool:
    """Whether a path is in an object store."""
    return "://" in str(path)


def mirrored(url: str, name: str = "", owner: bool = True) -> Mirror:
    """The directory at a URL of an object store, not opened yet. Its copy is in the cache, and goes when this process
    ends. name: of the room of the copy, where several processes share it, of which one is the owner. Raises UserError
    for an unknown scheme, and where what speaks to the store is not installed."""
    from lab.remote.mirror import Mirror  # nothing of it is loaded for a directory of this machine

    scheme, _, place = url.partition("://")
    local = _room(name or _own_name(), owner) / scheme / place.strip("/")
    if local not in _mirrors:
        _mirrors[local] = Mirror(url, local)
    return _mirrors[local]


def mirror(path: Path) -> Mirror | None:
    """Of the copy that a path is in; None of a path that is in no copy."""
    return next((one for one in _mirrors.values() if path.is_relative_to(one.local)), None)


def opened(path: str | Path) -> Path:
    """The directory of a study, or its copy where it is in an object store."""
    return mirrored(str(path)).open().local if is_remote(path) else home(path)


def home(path: str | Path) -> Path:
    """With the home directory for ~, as no shell has it behind --workdir=. Raises UserError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} has no place ({error}); write the directory out") from error


def refresh(path: Path) -> None:
    """Fetches what is new in the store, if a path is in a copy."""
    if one := mirror(path):
        one.refresh()


def flush(path: Path) -> None:
    """Returns when the store has all that was written, if a path is in a copy."""
    if one := mirror(path):
        one.flush()


def told(text: object) -> str:
    """A text that names copies, with the URLs of what they are copies of."""
    text = str(text)
    for one in sorted(_mirrors.values(), key=lambda one: -len(str(one.local))):
        text = text.replace(str(one.local), one.store.url)
    return text


def local(path: str | Path) -> Path:
    """Where a cell, one of its seeds or one checkpoint can be read: of an object store it is fetched first."""
    if not is_remote(path):
        return home(path)
    from lab.remote.mirror import fetch

    return fetch(str(path), functools.partial(mirrored, name=f"{_own_name()}-fetched"))


def directory(url: str, digest: Callable[[Path], str], writes: bool = False) -> Directory:
    """A directory in an object store whose files are known by digests. Raises UserError as `mirrored` does."""
    from lab.remote import fetching, store

    return fetching.Directory(url, digest, store.ALL_RIGHTS if writes else fetching.RIGHTS)


def room() -> Path:
    """A directory for what is on its way to an object store; it goes when this process ends."""
    return _room(_own_name(), True)


@functools.cache
def _own_name() -> str:
    return secrets.token_hex(8)


@functools.cache
def _room(name: str, owner: bool) -> Path:
    """A directory for copies, which goes when its owner ends. Those of owners that were killed go now: the stores have
    what is in them."""
    root = cache_directory() / "mirrors"
    if not owner:
        return root / name
    import filelock

    root.mkdir(parents=True, exist_ok=True)
    for path in root.glob("*.lock"):
        with contextlib.suppress(filelock.Timeout, OSError), filelock.FileLock(path, blocking=False):
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)
    lock = filelock.FileLock(root / f"{name}.lock")
    lock.acquire()
    atexit.register(lock.release)
    atexit.register(shutil.rmtree, root / name, ignore_errors=True)  # what is registered last is done first
    return root / name
