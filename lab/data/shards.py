"""Prepared shards: tokenised texts in files of ArrayRecord, one text a record, and the manifest that tells of them.

A text is found by its number: the shard that holds it, and its place there. Beside the shards lie the lengths of all
texts, so that what a batch holds is known without reading it.
"""

import bisect
import contextlib
import errno
import functools
import hashlib
import itertools
import os
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from lab import storage
from lab.data import cache, reading, texts, tokenizers
from lab.data.corpora import Document
from lab.data.tokenizers import Tokenizer
from lab.errors import UserError
from lab.storage import find_json, is_remote, read_json, write_atomically, write_json

MANIFEST = "manifest.json"
PARTS = "parts"  # what is told of each run of documents, and the lengths of its texts: a command that is killed goes on
SPLITS = ("train", "validation")  # Document.validation is the place of one
LENGTH = np.dtype("<u4")
_WRITE = "group_size:1,uncompressed"  # one text is read at a time, and so short a record gains nothing
# In any order, and in the thread that asks: handing each of so small records to threads took 60 times as long. A shard
# that is open has 8 bytes for each of its texts in memory.
_READ = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 4096  # bytes


class Shards:
    """A split of a prepared directory: texts[i] is int32 [n], 2 <= n <= text_length. Reads what is asked for and no
    more; pickles as its path.

    mean_bytes: of its texts, where bytes cut them; else None. fetches: whether shards may have to come from a store
    first. Raises UserError for a shard that is damaged, when a text of it is read.
    """

    def __init__(self, directory: Path, split: str, most: int = 0, url: str = ""):
        """`most` keeps only the first so many texts; 0 keeps all. The directory has been checked (`read_manifest`).
        url: where its shards lie, if that is an object store."""
        self._opened = directory, split, most, url
        manifest = read_json(directory / MANIFEST)
        self._dtype, self._command = np.dtype(manifest["dtype"]), manifest["command"]
        told = [shard[split] for shard in manifest["shards"] if split in shard]
        self._told, self._url, self._here = told, url, set()  # the last: shards that have been fetched or looked over
        self._paths = [_cached(shard["digest"]) if url else directory / shard["file"] for shard in told]
        self._ends = [*itertools.accumulate(shard["texts"] for shard in told)]
        count = self._ends[-1] if told else 0
        self._count = min(count, most) if most else count
        self.mean_bytes = manifest[split]["bytes"] / count if count and "bytes" in manifest[split] else None
        self._lengths = np.memmap(directory / lengths_of(split), LENGTH, "r").view(np.ndarray) if count else None
        self._reader = functools.lru_cache(_at_once(len(told)))(_reader)
        self._lock = threading.Lock()  # a reader has one place at a time

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < self._count:
            raise IndexError(f"text {i} of {self._count}")
        shard = bisect.bisect_right(self._ends, i)
        place = int(i) - (self._ends[shard - 1] if shard else 0)
        self._bring({shard})
        try:
            with self._lock:
                reader = self._reader(self._paths[shard])
                reader.seek(place)
                record = reader.read()
        except Exception as error:  # the library has errors of its own, of several kinds
            raise self._damaged(shard, place, next(iter(str(error).splitlines()), type(error).__name__)) from error
        if len(record) != int(self._lengths[i]) * self._dtype.itemsize:
            raise self._damaged(shard, place, f"it has {len(record)} bytes, and {self._lengths[i]} tokens are told of")
        return np.frombuffer(record, self._dtype).astype(np.int32)

    @property
    def fetches(self) -> bool:
        return bool(self._url)

    def bring(self, ids: Iterable[int]) -> None:
        """Returns when the shards of so many texts are here; several come at once."""
        if self._url:
            places = np.searchsorted(self._ends, np.fromiter(ids, np.int64), side="right")
            self._bring({*places.tolist()})

    def _bring(self, shards: set[int]) -> None:
        if self._url and (missing := sorted(shards - self._here)):
            told = [self._told[shard] for shard in missing]
            wanted = {one["file"]: (_cached(one["digest"]), one["size"], one["digest"]) for one in told}
            with cache.explained():
                storage.directory(self._url, reading.digest).fetch(wanted, _mend(self._command))
            self._here |= {*missing}

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """Tokens of so many texts, without reading them."""
        return self._lengths[ids]

    def __reduce__(self):
        return Shards, self._opened

    def _damaged(self, shard: int, place: int, why: str) -> UserError:
        mend = "run the same command again: it is fetched again" if self._url else _mend(self._command)
        return UserError(f"{self._paths[shard]}: record {place} cannot be read: {why} ({mend})")


def _at_once(shards: int) -> int:
    """How many of so many shards stay open: to open one takes as long as a thousand texts. At most half of the files
    that this process may have open, once it may have as many as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * shards and soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems have a lower bound that they do not tell of
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return max(1, min(shards, soft // 2)) if soft != resource.RLIM_INFINITY else shards


def _reader(path: Path):
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(os.fspath(path), _READ, file_reader_buffer_size=_BUFFER)


def lengths_of(split: str) -> str:
    """The file of the tokens of each text of a split, in order."""
    return f"{split}.lengths"


def read_manifest(path: str) -> tuple[Path, dict]:
    """Of a prepared directory, once its files are there in the sizes that are told of: where manifest, tokenizer and
    lengths are, of a directory in an object store copies in the cache; and the manifest. Raises UserError.

    A manifest has counts of all documents; of each split texts, tokens, digest of contents, and bytes where these cut
    texts; and of each shard its file, size, digest and counts.
    """
    if not path:
        raise UserError("data.path is empty; corpus prepared needs the directory that python -m lab.prepare has filled")
    if is_remote(path):
        return _fetched_manifest(path)
    directory = Path(path).expanduser()
    if not (directory / MANIFEST).is_file():
        raise _none(path)
    manifest = _finished(read_json(directory / MANIFEST), path)
    _check_sizes(manifest, directory, lambda file: _size(directory / file))
    for split in SPLITS:
        file = directory / lengths_of(split)
        if not file.is_file() or reading.digest(file) != manifest[split]["lengths"]:
            fault = "is not what was prepared" if file.is_file() else "is missing"
            raise UserError(f"{file} {fault} ({_mend(manifest['command'])})")
    return directory, manifest


def _fetched_manifest(url: str) -> tuple[Path, dict]:
    store = storage.directory(url, reading.digest)
    sizes = store.sizes()
    if MANIFEST not in sizes:
        raise _none(url)
    content = store.read(MANIFEST)
    directory = cache.root() / "prepared" / cache.digest(content)
    with cache.explained():
        write_atomically(directory / MANIFEST, content)
    try:
        manifest = read_json(directory / MANIFEST)
    except UserError as error:
        raise UserError(str(error).replace(str(directory), store.url)) from error
    mend = _mend(_finished(manifest, url)["command"])
    _check_sizes(manifest, store.url, sizes.get)
    lengths = {
        lengths_of(split): (directory / lengths_of(split), told["texts"] * LENGTH.itemsize, told["lengths"])
        for split, told in ((split, manifest[split]) for split in SPLITS)
    }
    content = store.read(tokenizers.FILE)
    with cache.explained():
        write_atomically(directory / tokenizers.FILE, content)
        store.fetch(lengths, mend)
    return directory, manifest


def _none(path: str) -> UserError:
    return UserError(f"data.path = {path!r} has no {MANIFEST}: python -m lab.prepare fills such a directory")


def _finished(manifest: dict, path: str) -> dict:
    if "shards" not in manifest:
        raise UserError(f"data.path = {path!r} is not finished; run its command again: {manifest.get('command')}")
    return manifest


def _check_sizes(manifest: dict, place: str | Path, size: Callable[[str], int | None]) -> None:
    """Raises UserError for a shard that is missing or of another size. size: of a file, None where there is none."""
    for shard in (shard[split] for shard in manifest["shards"] for split in SPLITS if split in shard):
        if fault := _other_size(size(shard["file"]), shard["size"]):
            raise UserError(f"{place}/{shard['file']} {fault} ({_mend(manifest['command'])})")


def _cached(digest: str) -> Path:
    """Where a shard of a directory in a store is kept."""
    return cache.root() / "shards" / f"{digest}.array_record"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise reading.unreadable(path, error) from error


def _other_size(there: int | None, size: int) -> str:
    if there is None:
        return "is missing"
    return f"has {there} bytes, not {size}" if there != size else ""


def _mend(command: str) -> str:
    return f"the command that made it makes it again: {command}"


def dtype_of(tokenizer: Tokenizer) -> str:
    """Of the tokens of a record."""
    return "<u2" if tokenizer.size <= 2**16 else "<i4"


def write(directory: Path, number: int, documents: list[Document], tokenizer: Tokenizer, cut: dict) -> dict:
    """Writes the shards of one run of documents, one for each split that it has texts of, and gives what is told of
    them.

    cut: text_length, long_texts and text_bytes, as lab.data.texts takes them. Every file appears whole, and what is
    told of them as the last. Raises UserError for what cannot be cut so, and OSError.
    """
    count, lost = Counter(), Counter()
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(contextlib.closing(_ShardWriter(directory, split, number, dtype_of(tokenizer))))
            for split in SPLITS
        ]
        for chunk in texts.chunks(documents):
            characters, missed, made = texts.tokenised(chunk, tokenizer, **cut)
            lost += missed
            count.update(documents=len(chunk), missing=sum(document.missing for document in chunk))
            count.update(characters=characters, bytes=sum(len(document.text.encode()) for document in chunk))
            for document, of_it in zip(chunk, made, strict=True):
                writers[document.validation].add(*of_it)
        made = {split: writer.finish() for split, writer in zip(SPLITS, writers, strict=True)}
    told = dict(count) | {"lost": dict(sorted(lost.items()))} | {split: one for split, one in made.items() if one}
    write_json(_told_of(directory, number), told)
    return told


def kept(directory: Path, number: int) -> dict | None:
    """What is told of a run of documents whose shards are there and whole; else None. Reads all of them."""
    told = told_of(directory, number)
    for split in SPLITS:
        if told and (shard := told.get(split)):
            files = {directory / shard["file"]: "digest", lengths_of_part(directory, split, number): "lengths"}
            if not all(file.is_file() and reading.digest(file) == shard[part] for file, part in files.items()):
                return None
    return told


def told_of(directory: Path, number: int) -> dict | None:
    """What is told of a run of documents, whether its shards are there or not."""
    return find_json(_told_of(directory, number))


def _told_of(directory: Path, number: int) -> Path:
    return directory / PARTS / f"{number:05d}.json"


def lengths_of_part(directory: Path, split: str, number: int) -> Path:
    """The file of the lengths of a shard's texts."""
    return directory / PARTS / f"{number:05d}.{split}"


@contextlib.contextmanager
def _failures_of(path: Path) -> Iterator[None]:
    """What the library says of a disk, as the system says it."""
    try:
        yield
    except RuntimeError as error:
        number = errno.ENOSPC if os.strerror(errno.ENOSPC) in str(error) else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


class _ShardWriter:
    """The texts of one split, each a record. The file is begun with the first of them, and appears whole."""

    def __init__(self, directory: Path, split: str, number: int, dtype: str):
        self._path = directory / f"{split}-{number:05d}.array_record"
        self._draft = self._path.with_name(f".{self._path.name}")
        self._path_of_lengths = lengths_of_part(directory, split, number)
        self._dtype, self._file, self._bytes, self._lengths = dtype, None, None, []
        self._contents = hashlib.blake2b(digest_size=16)

    def add(self, ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray | None = None) -> None:
        """Texts by the length of each, and by its bytes where they were cut by these."""
        if not len(lengths):
            return
        if self._file is None:
            from array_record.python.array_record_module import ArrayRecordWriter

            with _failures_of(self._path):
                self._file = ArrayRecordWriter(os.fspath(self._draft), _WRITE)
        tokens = ids.astype(self._dtype)
        with _failures_of(self._path):
            for text in np.split(tokens, np.cumsum(lengths)[:-1]):
                self._file.write(text.tobytes())
        self._contents.update(tokens.tobytes() + lengths.astype("<i8").tobytes())
        self._lengths.append(lengths.astype(LENGTH))
        if sizes is not None:
            self._bytes = (self._bytes or 0) + int(sizes.sum())

    def finish(self) -> dict | None:
        """What is told of the shard; None where it has no text."""
        if self._file is None:
            return None
        with _failures_of(self._path):
            self._file.close()  # a full disk may show here alone
        lengths = np.concatenate(self._lengths)
        write_atomically(self._path_of_lengths, lengths.tobytes())
        told = dict(
            file=self._path.name,
            size=self._draft.stat().st_size,
            digest=reading.digest(self._draft),
            lengths=reading.digest(self._path_of_lengths),
            texts=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            contents=self._contents.hexdigest(),
        )
        os.replace(self._draft, self._path)
        return told if self._bytes is None else told | {"bytes": self._bytes}

    def close(self) -> None:
        self._draft.unlink(missing_ok=True)
