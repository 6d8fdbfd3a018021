"""Where what is made once is kept; files that appear whole or not at all, and JSON kept in them."""

import json
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


def read_json(path: Path) -> dict:
    """Raises UserError where the file is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
