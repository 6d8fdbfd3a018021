"""A preparation that is written to an object store: its small files have copies in a room here, from which a command
that was stopped goes on; a shard leaves that room as soon as the store has it."""

import concurrent.futures
import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from lab import storage
from lab.data import cache, reading, shards, tokenizers
from lab.data.shards import MANIFEST, PARTS, SPLITS
from lab.errors import UserError

_AT_ONCE = 8  # requests under way
_OURS = re.compile(rf"(?:{'|'.join(SPLITS)})-\d+\.array_record|{PARTS}/\d+\.\w+")


def taken(out: str | Path) -> UserError:
    """That a directory is not ours to fill."""
    return UserError(f"--out={out} holds other files and no preparation; choose an empty or new directory")


@contextlib.contextmanager
def room(url: str) -> Iterator[Path]:
    """A directory with the small files of what is there already. Raises UserError where that is anything else."""
    store = _store(url)
    names = store.sizes()
    if names and MANIFEST not in names and any(not name.startswith(f"{PARTS}/") for name in names):
        raise taken(url)
    here = storage.room() / "prepared" / cache.digest(store.url)
    with cache.explained():
        (here / PARTS).mkdir(parents=True)
    try:
        light = [name for name in names if name == MANIFEST or name.startswith(f"{PARTS}/")]
        _all(lambda name: store.get(name, here / name), light)
        yield here
    finally:
        shutil.rmtree(here, ignore_errors=True)


def kept(here: Path, url: str, number: int) -> dict | None:
    """As of `shards.kept`, of a run in the store: its shards are fetched and looked over, and do not stay here."""
    told, store = shards.told_of(here, number), _store(url)
    files = [shard["file"] for shard in _of_splits(told or {})]
    try:
        _all(lambda name: store.get(name, here / name), files)
        return shards.kept(here, number)
    except FileNotFoundError:
        return None
    finally:
        for name in files:
            (here / name).unlink(missing_ok=True)


def put_run(here: Path, url: str, number: int, told: dict) -> None:
    """What was made of one run, and what is told of it as the last."""
    made = _of_splits(told)
    put(here, url, *(shard["file"] for shard in made), *_parts(number, told))
    for shard in made:
        (here / shard["file"]).unlink()


def put(here: Path, url: str, *names: str) -> None:
    """In this order."""
    for name in names:
        _store(url).put(here / name, name)


def finish(here: Path, url: str, manifest: dict) -> None:
    """Takes away what belongs to the preparation no longer, and writes the manifest as the last."""
    store, lengths = _store(url), [shards.lengths_of(split) for split in SPLITS]
    put(here, url, *lengths)
    ours = {MANIFEST, tokenizers.FILE, *lengths}
    for number, told in enumerate(manifest["shards"]):
        ours |= {*(shard["file"] for shard in _of_splits(told)), *_parts(number, told)}
    _all(store.delete, [name for name in store.sizes() if name not in ours and _OURS.fullmatch(name)])
    put(here, url, MANIFEST)


def _parts(number: int, told: dict) -> list[str]:
    return [f"{PARTS}/{number:05d}.{split}" for split in SPLITS if split in told] + [f"{PARTS}/{number:05d}.json"]


def _of_splits(told: dict) -> list[dict]:
    return [told[split] for split in SPLITS if split in told]


def _store(url: str):
    return storage.directory(url, reading.digest, writes=True)


def _all(action, names: list[str]) -> None:
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(action, names))
