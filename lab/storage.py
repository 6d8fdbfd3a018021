"""Where what is made once is kept; files that appear whole or not at all, and JSON kept in them."""

import functools
import json
import logging
import os
import secrets
from pathlib import Path

from lab.errors import UserError


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


def write_json(path: Path, value) -> None:
    """Indented, with a newline at the end."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path, kind: type = dict):
    """What a file holds, a `kind`. Raises UserError where it holds something else."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, kind):
        raise UserError(f"{path} is no JSON {kind.__name__}, but {type(found).__name__}")
    return found


def find_json(path: Path, kind: type = dict):
    """What a file holds, a `kind`; None where there is no such file, and where it is damaged, as a machine that crashed
    leaves one. That is said once."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, kind):
        return found
    _say_damaged(path)
    return None


@functools.cache
def _say_damaged(path: Path) -> None:
    logging.warning("%s is damaged: it is taken as missing", path)
