"""Files and rows that hold texts: found by globs, unpacked, and read. What is wrong is told by file and line.

Every function raises UserError for a file that is missing, damaged or of another kind, and for a lost connection.
"""

import glob
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lab.errors import UserError

Rows = Iterator[tuple[str, Mapping]]  # where a row stands, and its fields

_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # how such a file begins, and no text in UTF-8 does
_DAMAGED = "the file is damaged, or its disk or connection fails"


def matching(path: str, corpus: str) -> list[Path]:
    """The files that `data.path` names for a corpus, sorted, each once: a glob, or several joined by commas. Every one
    must match. What exists under its very name, brackets and commas included, is meant by it."""
    patterns = [pattern.strip() for pattern in path.split(",") if pattern.strip()]
    if not patterns:
        raise UserError(f"data.path is empty; corpus {corpus} needs globs there, joined by commas")
    if _found(path.strip()):
        patterns = [path.strip()]
    found: set[Path] = set()
    for pattern in patterns:
        files = _found(pattern)
        if not files:
            all_of_them = f", of data.path = {path!r}," if len(patterns) > 1 else ""
            raise UserError(
                f"data.path = {pattern!r}{all_of_them} matches no file (corpus {corpus}, searched from {os.getcwd()})"
            )
        found |= files
    once: dict[str, Path] = {}
    for file in sorted(found):
        once.setdefault(os.path.realpath(file), file)
    return [*once.values()]


def _found(pattern: str) -> set[Path]:
    pattern = os.path.expanduser(pattern)
    there = pattern
    while there and not os.path.lexists(there):
        there = os.path.dirname(there)
    found = glob.glob(glob.escape(there) + pattern[len(there) :], recursive=True)
    return {Path(name) for name in found if os.path.isfile(name)}


def packing(path: Path) -> str | None:
    """How a file is compressed, by its first bytes: gzip, zstd or None."""
    try:
        with path.open("rb") as handle:
            begins = handle.read(4)
    except OSError as error:
        raise unreadable(path, error) from error
    return next((codec for magic, codec in _PACKED.items() if begins.startswith(magic)), None)


def unpacked(path: Path) -> BinaryIO:
    """The bytes of a file, without its compression. Raises OSError too, and so does reading them."""
    codec = packing(path)
    if codec is None:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(os.fspath(path), compression=codec))


def digest(path: Path) -> str:
    """Of a file as it lies on disk."""
    return _digest(path, path.open)


def content_digest(path: Path) -> str:
    """Of a file without its compression: that of the plain file."""
    return _digest(path, lambda mode: unpacked(path))


def _digest(path: Path, opened) -> str:
    try:
        with opened("rb") as handle:
            return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def size(path: Path) -> int:
    """Bytes of a file without its compression."""
    try:
        if packing(path) is None:
            return path.stat().st_size
        with unpacked(path) as handle:
            return sum(map(len, iter(lambda: handle.read(2**20), b"")))
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(place: object, error: Exception, why: str = _DAMAGED) -> UserError:
    """What the system or a library says of a file that cannot be read, in one line."""
    said = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "") or type(error).__name__
    return UserError(f"cannot read {place}: {said.rstrip('.')} ({why})")


def value(row: Mapping, field: str) -> Any:
    """row[field]; of a field with dots that the row does not have, what lies under its parts. Raises KeyError."""
    if field in row:
        return row[field]
    found: Any = row
    for part in field.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise KeyError(field)
        found = found[part]
    return found


def jsonl(path: Path) -> Rows:
    """One object a line; empty lines are none."""
    number = 0
    try:
        with unpacked(path) as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield f"{path}, line {number}", _parsed(line, f"{path}, line {number}")
    except OSError as error:
        raise unreadable(f"{path} after line {number}", error) from error


def _parsed(line: bytes, place: str) -> Mapping:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    except RecursionError as error:
        raise UserError(f"{place}: lists or objects lie too deep in each other to be read") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: {type(row).__name__}, not a JSON object with fields")
    return row


def parquet(path: Path, field: str) -> Rows:
    """Rows with the column of a field, or that of its first part."""
    import pyarrow
    import pyarrow.parquet

    failures = (pyarrow.ArrowException, OSError, ValueError)  # the last: bytes that are no text
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except failures as error:
        raise UserError(f"{path} is not a parquet file: {next(iter(str(error).splitlines()), '?')}") from error
    number = 0
    with table:
        names = table.schema_arrow.names
        column = field if field in names else field.partition(".")[0]
        if column not in names:
            raise UserError(f"{path}: no column {field!r} (data.field); it has: {listed(names)}")
        try:
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
        except failures as error:
            raise unreadable(f"{path} after row {number}", error) from error


def huggingface(path: str) -> Rows:
    """The train split of NAME or NAME:SUBSET, streamed from the hub."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "data.corpus = 'huggingface' needs the package datasets: pip install datasets; "
            "or choose stdlib, files, jsonl or parquet"
        ) from error
    name, _, subset = path.partition(":")
    number = 0
    try:
        rows: Iterable = datasets.load_dataset(name, subset or None, split="train", streaming=True)
    except Exception as error:  # the hub, the network and each dataset have errors of their own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"data.path = {path!r}: the dataset cannot be opened: {reason}") from error
    rows = iter(rows)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            why = "a lost connection, or a damaged dataset: run the same command again"
            raise unreadable(f"data.path = {path!r} after row {number}", error, why) from error
        if row is None:
            return
        number += 1
        yield f"{path}, row {number}", row


def listed(names: Iterable) -> str:
    """Names for a message."""
    return ", ".join(map(str, names)) or "nothing"
