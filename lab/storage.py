"""Where what is made once is kept; files that appear whole or not at all, and JSON kept in them."""

import functools
import hashlib
import json
import logging
import os
import secrets
from pathlib import Path

from lab.errors import UserError

SEAL = "checksum"


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
