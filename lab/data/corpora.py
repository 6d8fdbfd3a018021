"""Corpora: where text comes from, and which of it is held out for validation."""

import functools
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from lab.data import cache, packing
from lab.errors import UserError, choose
from lab.options import Option

OPTIONS = {
    "tokenizer": Option("bytes", "bytes, bpe:<size>, or the path of a tokenizer.json"),
    "long_texts": Option(
        "split", "what becomes of a document over text_length", choices=("split", "truncate", "refuse")
    ),
    "texts": Option(0, "training texts: the first so many; 0: all", least=0),
}
VALIDATION_SHARE = 0.05
_BLOCKS = 20  # one block in so many of a single file is validation: the same share
_NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document(NamedTuple):
    """One text as its source holds it. `ends` is False for a block that the same file continues."""

    name: str
    text: str
    validation: bool
    ends: bool = True


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read again and again, in one order.

    fingerprint: of the names and contents; of a streamed corpus, which cannot be hashed before it is read, of its name.
    searched: what was looked at, for messages.
    read: starts a pass over all documents.
    streamed: reading costs a download, so a pass stops as soon as it has what was asked for.
    """

    fingerprint: str
    searched: str
    read: Callable[[], Iterator[Document]]
    streamed: bool = False


def open(data: ConfigDict) -> Corpus:
    """The corpus that `config.data` names. Raises UserError if it is unknown or nothing is found."""
    return CORPORA[choose("data.corpus", data.corpus, CORPORA)].open(data)


def stdlib(data: ConfigDict) -> Corpus:
    """The running interpreter's own Python sources, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(_stdlib_names(root))
    if not names:
        raise UserError(f"data.corpus = 'stdlib': no .py file under {root}; set data.corpus to files, jsonl or parquet")
    fingerprint = cache.digest(*(part for name in names for part in (name, _file_digest(root / name))))

    def read():
        for name in names:
            try:
                text = (root / name).read_bytes().decode()
            except UnicodeDecodeError:
                continue
            yield Document(name, text, _share(name.encode()) < VALIDATION_SHARE)

    return Corpus(fingerprint, f"stdlib ({root})", read)


def files(data: ConfigDict) -> Corpus:
    """Text files by globs, one document each; a single file is cut into blocks, so that some can be held out."""
    paths = _matching(data)
    digests = [_file_digest(path) for path in paths]
    if len(paths) == 1:
        read = functools.partial(_read_blocks, paths[0])
    else:
        read = functools.partial(_read_files, paths, _held_out(digests), digests)
    return Corpus(cache.digest("files", *digests), f"files ({data.path})", read)


def jsonl(data: ConfigDict) -> Corpus:
    """One JSON object a line; `data.field` holds the text."""
    return _rows_of_files(data, _jsonl_rows)


def parquet(data: ConfigDict) -> Corpus:
    """Tables of rows; the column `data.field` holds the text."""
    return _rows_of_files(data, functools.partial(_parquet_rows, field=data.field))


def huggingface(data: ConfigDict) -> Corpus:
    """The train split of a dataset of the Hugging Face hub, as NAME or NAME:SUBSET, streamed."""
    if not data.path:
        raise UserError("data.path is empty; corpus huggingface needs a dataset's name there, as NAME or NAME:SUBSET")
    fingerprint = cache.digest("huggingface", data.path, data.field)
    return Corpus(
        fingerprint,
        f"huggingface ({data.path})",
        lambda: _documents(_huggingface_rows(data.path), data.field),
        streamed=True,
    )


class CorpusKind(NamedTuple):
    """A row of the table: how a corpus is opened, of config.data, and what that reads."""

    open: Callable[[ConfigDict], Corpus]
    options: Mapping[str, Option]


TEXTS = packing.OPTIONS | OPTIONS  # what every corpus reads
PATH = {"path": Option("", "globs joined by commas, or a dataset's name")}
FIELD = {"field": Option("text", "of a JSON line, a parquet column, a dataset")}
CORPORA = {
    "stdlib": CorpusKind(stdlib, TEXTS),
    "files": CorpusKind(files, TEXTS | PATH),
    "jsonl": CorpusKind(jsonl, TEXTS | PATH | FIELD),
    "parquet": CorpusKind(parquet, TEXTS | PATH | FIELD),
    "huggingface": CorpusKind(huggingface, TEXTS | PATH | FIELD),
}


def _stdlib_names(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_SOURCES]
        for name in names:
            # _sysconfigdata is made by each build of Python and holds its paths.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _matching(data: ConfigDict) -> list[Path]:
    """The files that the globs of `data.path` name, sorted, each once."""
    patterns = [pattern.strip() for pattern in data.path.split(",") if pattern.strip()]
    if not patterns:
        raise UserError(f"data.path is empty; corpus {data.corpus} needs globs there, joined by commas")
    found = {path for pattern in patterns for path in glob.glob(os.path.expanduser(pattern), recursive=True)}
    paths = sorted(Path(path) for path in found if os.path.isfile(path))
    if not paths:
        raise UserError(
            f"data.path = {data.path!r} matches no file (corpus {data.corpus}, searched from {os.getcwd()})"
        )
    return paths


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _share(content: bytes) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64


def _held_out(digests: list[str]) -> set[str]:
    """The files of the validation split, by content; of a few files, at least one."""
    ranked = sorted(set(digests), key=lambda digest: _share(digest.encode()))
    return {digest for digest in ranked if _share(digest.encode()) < VALIDATION_SHARE} or set(ranked[:1])


def _read_files(paths: list[Path], held_out: set[str], digests: list[str]) -> Iterator[Document]:
    for path, digest in zip(paths, digests, strict=True):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise _not_text(path) from error
        yield Document(str(path), text, digest in held_out)


def _read_blocks(path: Path) -> Iterator[Document]:
    """Blocks small enough that even a short file has some for validation, and a large one fits in memory."""
    characters = min(max(path.stat().st_size // (2 * _BLOCKS), 1), 2**20)
    with path.open(encoding="utf-8", newline="") as handle:
        try:
            block, number = handle.read(characters), 0
            while block:
                following = handle.read(characters)
                validation = number % _BLOCKS == _BLOCKS - 1
                yield Document(f"{path} (block {number})", block, validation, ends=not following)
                block, number = following, number + 1
        except UnicodeDecodeError as error:
            raise _not_text(path) from error


def _not_text(path: Path) -> UserError:
    return UserError(f"{path} is not UTF-8 text; convert it, or leave it out of data.path")


def _rows_of_files(data: ConfigDict, rows_of: Callable[[Path], Iterator]) -> Corpus:
    paths = _matching(data)
    fingerprint = cache.digest(data.corpus, data.field, *map(_file_digest, paths))

    def read():
        for path in paths:
            yield from _documents(rows_of(path), data.field)

    return Corpus(fingerprint, f"{data.corpus} ({data.path})", read)


def _documents(rows: Iterable[tuple[str, Mapping]], field: str) -> Iterator[Document]:
    """Takes the text out of (name, row) pairs; equal texts land in the same split."""
    for name, row in rows:
        if field not in row:
            raise UserError(f"{name}: no field {field!r} (data.field); it has: {_listed(row)}")
        if not isinstance(row[field], str):
            raise UserError(
                f"{name}: field {field!r} (data.field) is {type(row[field]).__name__}, not a string; "
                f"the fields are: {_listed(row)}"
            )
        # JSON can spell lone surrogates, which are no text: they become question marks.
        content = row[field].encode("utf-8", "replace")
        yield Document(name, content.decode(), _share(content) < VALIDATION_SHARE)


def _listed(names: Iterable) -> str:
    return ", ".join(map(str, names)) or "nothing"


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping]]:
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: {type(row).__name__}, not a JSON object with fields")
            yield f"{path}, line {number}", row


def _parquet_rows(path: Path, field: str) -> Iterator[tuple[str, Mapping]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from error
    with table:
        columns = table.schema_arrow.names
        if field not in columns:
            raise UserError(f"{path}: no column {field!r} (data.field); it has: {_listed(columns)}")
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield f"{path}, row {number}", {field: value}


def _huggingface_rows(path: str) -> Iterator[tuple[str, Mapping]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "data.corpus = 'huggingface' needs the package datasets: pip install datasets; "
            "or choose stdlib, files, jsonl or parquet"
        ) from error
    name, _, subset = path.partition(":")
    try:
        rows = datasets.load_dataset(name, subset or None, split="train", streaming=True)
    except Exception as error:  # the hub, the network and each dataset have errors of their own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"data.path = {path!r}: the dataset cannot be opened: {reason}") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row
