"""Corpora: where text comes from, and which of it is held out for validation."""

import codecs
import functools
import hashlib
import io
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ml_collections import ConfigDict

from lab.data import cache, packing, reading
from lab.data.packing import LONGEST_ROW
from lab.errors import UserError, choose
from lab.options import Option

OPTIONS = {
    "tokenizer": Option("bytes", "bytes, bpe:<size>, or the path of a tokenizer.json"),
    "long_texts": Option(
        "split", "what becomes of a document over text_length", choices=("split", "truncate", "refuse")
    ),
    "text_bytes": Option(
        0,
        "0: tokens cut documents into texts; N: texts of at most N bytes, the same for every tokenizer, each behind an "
        "end of text",
        least=0,
        most=LONGEST_ROW,
    ),
    "texts": Option(0, "training texts: the first so many; 0: all", least=0),
    "eos": Option("", "the token that ends a text; empty: the tokenizer's own, by its usual names"),
    "lossy": Option("refuse", "what becomes of text that the tokenizer cannot write", choices=("refuse", "keep")),
}
VALIDATION_SHARE = 0.05
_BLOCKS = 20  # one block in so many of a single text is validation: the same share
_NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document(NamedTuple):
    """One text as its source holds it.

    ends: False for a block that the same text continues. missing: a row without text, which is skipped: "".
    """

    name: str
    text: str
    validation: bool
    ends: bool = True
    missing: bool = False


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
    fingerprint = cache.digest(*(part for name in names for part in (name, reading.digest(root / name))))

    def read():
        for name in names:
            try:
                text = (root / name).read_bytes().decode()
            except UnicodeDecodeError:
                continue
            except OSError as error:
                raise reading.unreadable(root / name, error) from error
            yield Document(name, text, _share(name.encode()) < VALIDATION_SHARE)

    return Corpus(fingerprint, f"stdlib ({root})", read)


def files(data: ConfigDict) -> Corpus:
    """Text files by globs, one document each; a single file is cut into blocks, so that some can be held out."""
    paths = reading.matching(data.path, data.corpus)
    fingerprint = cache.digest("files", *map(reading.digest, paths))
    return Corpus(fingerprint, f"files ({data.path})", lambda: _read_files(paths))


def jsonl(data: ConfigDict) -> Corpus:
    """One JSON object a line; `data.field` holds the text."""
    return _rows_of_files(data, reading.jsonl)


def parquet(data: ConfigDict) -> Corpus:
    """Tables of rows; the column `data.field` holds the text."""
    return _rows_of_files(data, functools.partial(reading.parquet, field=data.field))


def huggingface(data: ConfigDict) -> Corpus:
    """The train split of a dataset of the Hugging Face hub, as NAME or NAME:SUBSET, streamed."""
    if not data.path:
        raise UserError("data.path is empty; corpus huggingface needs a dataset's name there, as NAME or NAME:SUBSET")
    fingerprint = cache.digest("huggingface", data.path, data.field, *_skipping(data))
    read = functools.partial(_documents, lambda: reading.huggingface(data.path), data.field, data.missing)
    return Corpus(fingerprint, f"huggingface ({data.path})", read, streamed=True)


def prepared(data: ConfigDict) -> Corpus:
    """Texts that lab.prepare has cut and tokenised: lab.data.dataset opens them, and they are documents no more."""
    others = ", ".join(each for each in CORPORA if each != data.corpus)
    raise UserError(f"data.corpus = 'prepared' is tokenised already; choose one of: {others}")


class CorpusKind(NamedTuple):
    """A row of the table: how a corpus is opened, of config.data, and what that reads."""

    open: Callable[[ConfigDict], Corpus]
    options: Mapping[str, Option]


TEXTS = packing.OPTIONS | OPTIONS  # what every corpus reads
PATH = {"path": Option("", "paths or globs joined by commas, a dataset's name, or a directory that was prepared")}
FIELD = {
    "field": Option("text", "of a JSON line, a parquet column, a dataset; meta.text: in a field of it"),
    "missing": Option("refuse", "what becomes of a row that has no text there", choices=("refuse", "skip")),
}
CORPORA = {
    "stdlib": CorpusKind(stdlib, TEXTS),
    "files": CorpusKind(files, TEXTS | PATH),
    "jsonl": CorpusKind(jsonl, TEXTS | PATH | FIELD),
    "parquet": CorpusKind(parquet, TEXTS | PATH | FIELD),
    "huggingface": CorpusKind(huggingface, TEXTS | PATH | FIELD),
    "prepared": CorpusKind(prepared, TEXTS | PATH),
}


def _stdlib_names(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_SOURCES]
        for name in names:
            # _sysconfigdata is made by each build of Python and holds its paths.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _share(content: bytes) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64


def _bound(shares: Iterable[float]) -> float | None:
    """The documents whose share lies below it are held out: below VALIDATION_SHARE or, where that would leave a split
    without any, below that of all but one. None: there is one text alone. Reads on until it is sure."""
    few: list[float] = []  # the two lowest and the highest
    for share in shares:
        few = sorted({*few, share})
        few = [*few[:2], *few[2:][-1:]]
        if few[0] < VALIDATION_SHARE <= few[-1]:
            return VALIDATION_SHARE
    return few[1] if len(few) > 1 else None


def _read_files(paths: list[Path]) -> Iterator[Document]:
    contents = [_share(reading.content_digest(path).encode()) for path in paths] if len(paths) > 1 else []
    bound = _bound(contents)
    if bound is None:
        for path in paths:
            yield from _read_blocks(path)
        return
    for path, share in zip(paths, contents, strict=True):
        try:
            with reading.unpacked(path) as handle:
                text = handle.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _not_text(path) from error
        except OSError as error:
            raise reading.unreadable(path, error) from error
        yield Document(str(path), text, share < bound)


def _read_blocks(path: Path) -> Iterator[Document]:
    size = reading.size(path)
    try:
        with reading.unpacked(path) as handle:
            yield from _blocks(str(path), handle, size, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(path) from error
    except OSError as error:
        raise reading.unreadable(path, error) from error


def _blocks(name: str, handle: BinaryIO, size: int, encoding: str = "utf-8") -> Iterator[Document]:
    """A text of `size` bytes in blocks so small that even a short one has some for validation, and a large one fits in
    memory."""
    read = functools.partial(handle.read, min(max(size // (2 * _BLOCKS), 1), 2**20))
    pieces = codecs.iterdecode(iter(read, b""), encoding)
    number, block = 0, next(pieces, "")
    while block:
        following = next(pieces, "")
        validation = number % _BLOCKS == _BLOCKS - 1
        yield Document(f"{name} (block {number})", block, validation, ends=not following)
        number, block = number + 1, following


def _not_text(path: Path) -> UserError:
    return UserError(f"{path} is not UTF-8 text; convert it, or leave it out of data.path")


def _rows_of_files(data: ConfigDict, rows_of: Callable[[Path], reading.Rows]) -> Corpus:
    paths = reading.matching(data.path, data.corpus)
    fingerprint = cache.digest(data.corpus, data.field, *map(reading.digest, paths), *_skipping(data))

    def rows():
        for path in paths:
            yield from rows_of(path)

    read = functools.partial(_documents, rows, data.field, data.missing)
    return Corpus(fingerprint, f"{data.corpus} ({data.path})", read)


def _skipping(data: ConfigDict) -> list[str]:
    return [f"missing {data.missing}"] if data.missing != "refuse" else []


def _documents(rows: Callable[[], reading.Rows], field: str, missing: str) -> Iterator[Document]:
    """The texts of rows that can be read twice; equal ones land in the same split."""
    # The first pass ends after a few rows, unless there are but few.
    bound = _bound(_share(text) for _, text in _texts(rows(), field, missing) if text is not None)
    for name, text in _texts(rows(), field, missing):
        if text is None:
            yield Document(name, "", False, missing=True)
        elif bound is None:
            yield from _blocks(name, io.BytesIO(text), len(text))
        else:
            yield Document(name, text.decode(), _share(text) < bound)


def _texts(rows: reading.Rows, field: str, missing: str) -> Iterator[tuple[str, bytes | None]]:
    """(name, text in UTF-8) of every row, None for a text that is missing and skipped."""
    for name, row in rows:
        try:
            text = reading.value(row, field)
        except KeyError:
            text, fault = None, f"no field {field!r} (data.field); it has: {reading.listed(row)}"
        else:
            fault = f"field {field!r} (data.field) is null"
        if isinstance(text, str):
            try:
                yield name, text.encode()
                continue
            except UnicodeEncodeError as error:  # JSON can spell what is no text
                text, fault = None, f"field {field!r} (data.field) has a lone surrogate at character {error.start}"
        if text is not None:
            raise UserError(
                f"{name}: field {field!r} (data.field) is {type(text).__name__}, not a string; "
                f"the fields are: {reading.listed(row)}"
            )
        if missing == "refuse":
            raise UserError(f"{name}: {fault}; mend it, or set data.missing to skip such rows (now refuse)")
        yield name, None
