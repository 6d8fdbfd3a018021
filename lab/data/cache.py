"""Where prepared texts and tokenizers are kept: $LAB_CACHE, else ~/.cache/lab. Entries appear whole or not at all."""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from lab.errors import UserError


def root() -> Path:
    """The cache directory, not necessarily existing."""
    return Path(os.environ.get("LAB_CACHE") or Path.home() / ".cache" / "lab").expanduser()


def digest(*parts) -> str:
    """32 hexadecimal digits that name the parts (bytes, or anything with an exact str), in order."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        # The length keeps ("ab", "c") apart from ("a", "bc").
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()


@contextlib.contextmanager
def publishing(entry: Path) -> Iterator[Path]:
    """Yields an empty directory that becomes `entry` when the block succeeds and is removed when it fails.

    Two processes may build one entry at once: the first to finish wins, the other's copy is dropped.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    building = entry.parent / f".building-{secrets.token_hex(8)}"
    building.mkdir()
    try:
        yield building
        try:
            os.replace(building, entry)
        except OSError:
            if not entry.exists():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns a full or forbidden disk into a UserError that says which directory to move."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot fill the cache {root()}: {error}; set LAB_CACHE to a directory with room") from error
