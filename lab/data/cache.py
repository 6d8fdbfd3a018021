"""Where prepared texts and tokenizers are kept. Entries appear whole or not at all, and are looked over when opened."""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from lab.errors import UserError, shown
from lab.storage import cache_directory as root

_SUMS = "sums.json"  # of an entry: its name, and for each file its bytes and their CRC-32
_BLOCK = 2**22  # bytes


def digest(*parts) -> str:
    """32 hexadecimal digits that name the parts (bytes, or anything with an exact str), in order."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        # The length keeps ("ab", "c") apart from ("a", "bc").
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()


def kept(entry: Path, build: Callable[[Path], None]) -> Path:
    """The entry, a directory that `build` fills unless it is there and whole. A damaged one is told, and built anew.

    Raises UserError for a cache that cannot be read or written, and whatever `build` does.
    """
    if _damage(entry):
        _drop_damaged(entry)
    if not entry.exists():
        with publishing(entry) as building:
            build(building)
    return entry


@contextlib.contextmanager
def publishing(entry: Path) -> Iterator[Path]:
    """Yields an empty directory that becomes `entry` when the block succeeds and is removed when it fails.

    Two processes may build one entry at once: the first to finish wins, the other's copy is dropped.
    """
    building = entry.parent / f".building-{secrets.token_hex(8)}"
    with explained():
        building.mkdir(parents=True)
    try:
        yield building
        with explained():
            _seal(building, entry.name)
            try:
                os.replace(building, entry)
            except OSError:
                if not entry.exists():
                    raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextlib.contextmanager
def explained(what: str = "fill", wanted: str = "with room") -> Iterator[None]:
    """Turns a full or forbidden disk into a UserError that says which directory to move. For what reads and writes the
    cache alone: an OSError of a corpus is no fault of the cache."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {what} the cache {root()}: {error}; set LAB_CACHE to a directory {wanted}") from error


def _seal(directory: Path, name: str) -> None:
    files = {path.name: [path.stat().st_size, _sum(path)] for path in sorted(directory.iterdir())}
    (directory / _SUMS).write_text(json.dumps(dict(entry=name, files=files)), "utf-8")


def _damage(entry: Path) -> str:
    """What is wrong with an entry; "" of a whole one, and of none. Reads all of it: about a second for a GB in memory.

    A CRC finds what disks, crashes and hands do to a file. It is no guard against who means to deceive.
    """
    if not os.path.lexists(entry):
        return ""
    try:
        sums = json.loads((entry / _SUMS).read_text("utf-8"))
        if sums["entry"] != entry.name:
            return f"it is a copy of {sums['entry']!r}"
        held = {path.name for path in entry.iterdir()}
        for name, (size, crc) in sums["files"].items():
            if name not in held:  # asked before it is looked for: a damaged name may be any, and no file's
                return f"{shown(name)} is not there"
            if (there := (entry / name).stat().st_size) != size:
                return f"{name} has {there} bytes, not {size}"
            if _sum(entry / name) != crc:
                return f"{name} is not what was written"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{_SUMS} is not what was written"
    except OSError as error:
        with explained("read", "that can be read"):
            raise error
    return ""


def _sum(path: Path) -> int:
    crc = 0
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def _drop_damaged(entry: Path) -> None:
    with explained(), filelock.FileLock(entry.parent / f".{entry.name}.lock"):
        # Another process may have built it anew meanwhile.
        if fault := _damage(entry):
            logging.warning("the cache's %s is damaged (%s): it is made again", entry, fault)
            aside = entry.parent / f".damaged-{secrets.token_hex(8)}"
            os.replace(entry, aside)
            shutil.rmtree(aside) if aside.is_dir() and not aside.is_symlink() else aside.unlink()
