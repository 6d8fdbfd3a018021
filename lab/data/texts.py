"""Tokenised texts on local disk: documents cut to at most `text_length` tokens, read at random."""

import contextlib
import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lab.data import bytewise, cache
from lab.data.corpora import Corpus, Document
from lab.data.tokenizers import Tokenizer
from lab.errors import UserError

_FORMAT = 2  # of an entry's files; a change makes new entries
_LEAST = 2  # tokens: a shorter text has nothing to predict
_CHUNK_CHARACTERS = 2**20
_META = "meta.json"
_SHOWN = 8  # characters that were lost, in a message


class Texts:
    """A split of an entry: texts[i] is int32 [n], 2 <= n <= text_length. Memory-mapped; pickles as its path.

    mean_bytes: of its texts, where bytes cut them; else None.
    """

    def __init__(self, entry: Path, split: str, most: int = 0):
        """`most` keeps only the first so many texts; 0 keeps all."""
        self._opened = entry, split, most
        meta = read_meta(entry)
        self._offsets = np.load(entry / f"{split}.offsets.npy", mmap_mode="r")
        count = len(self._offsets) - 1
        self._count = min(count, most) if most else count
        self.mean_bytes = meta[split]["bytes"] / count if count and "bytes" in meta[split] else None
        # The base class: slices of np.memmap are several times slower.
        self._tokens = np.memmap(entry / f"{split}.tokens", meta["dtype"], "r").view(np.ndarray) if count else None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < self._count:
            raise IndexError(f"text {i} of {self._count}")
        return self._tokens[self._offsets[i] : self._offsets[i + 1]].astype(np.int32)

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """Tokens of so many texts, without reading them."""
        return self._offsets[ids + 1] - self._offsets[ids]

    def __reduce__(self):
        return Texts, self._opened


def read_meta(entry: Path) -> dict:
    """What was recorded with an entry: dtype; for each split texts, tokens, digest, and bytes of texts that were cut by
    bytes; documents that were read, how many had no text, their characters, how many of these were lost, and the
    commonest of those."""
    return json.loads((entry / _META).read_text("utf-8"))


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    text_length: int,
    long_texts: str,
    most=(None, None),
    lossy: str = "refuse",
    text_bytes: int = 0,
) -> Path:
    """The entry of the corpus' texts, tokenised now unless an earlier call did. Bounded memory: one chunk of documents.

    text_bytes: 0, or what cuts documents into texts in the place of text_length (lab.data.bytewise).
    most: (training, validation) texts to keep, None for all; when both are reached, reading stops at the next chunk.
    Raises UserError for a document over the budget under long_texts = refuse, for characters that the tokenizer cannot
    write under lossy = refuse, for a corpus that cannot be read and for a cache that cannot be written.
    """
    if text_bytes:
        bytewise.check(tokenizer, text_bytes)
    by_bytes = ["bytes", text_bytes] if text_bytes else []
    key = cache.digest(_FORMAT, corpus.fingerprint, tokenizer.fingerprint, text_length, long_texts, *most, *by_bytes)

    def check(meta: dict) -> None:
        check_lost(lossy, meta, corpus.searched, tokenizer)

    entry = cache.kept(
        cache.root() / "texts" / key,
        lambda building: _build(building, corpus, tokenizer, text_length, long_texts, most, check, text_bytes),
    )
    check(read_meta(entry))
    return entry


def check_lost(lossy: str, meta: dict, searched: str, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer that cannot write some characters of a corpus, unless they may be lost."""
    if lossy == "refuse" and meta["lost"]:
        told = loss(meta, searched, tokenizer)
        raise UserError(f"{told}; choose a tokenizer that has them, or set data.lossy to keep (now refuse)")


def loss(meta: dict, searched: str, tokenizer: Tokenizer) -> str:
    """Which share of the characters the tokenizer lost, in words."""
    shown = ", ".join(map(repr, meta["lost_most"]))
    return (
        f"data.tokenizer = {tokenizer.name!r} loses {meta['lost']} of {meta['characters']} characters "
        f"({meta['lost'] / meta['characters']:.2%}) of the corpus {searched}, such as {shown}"
    )


def cut(ids: np.ndarray, name: str, text_length: int, long_texts: str) -> tuple[np.ndarray, np.ndarray]:
    """A document's ids [n] (eos included) as texts: the ids kept, and the length of each text, in order.

    split: consecutive pieces, a last one of a single token dropped. truncate: the first piece. refuse: UserError.
    """
    if long_texts == "refuse" and len(ids) > text_length:
        raise UserError(
            f"{name} has {len(ids)} tokens, over data.text_length = {text_length}; raise it, "
            "or set data.long_texts to split or truncate (now refuse)"
        )
    if long_texts == "truncate":
        ids = ids[:text_length]
    whole, rest = divmod(len(ids), text_length)
    lengths = np.full(whole + (rest >= _LEAST), text_length, np.int64)
    if rest >= _LEAST:
        lengths[-1] = rest
    return ids[: lengths.sum()], lengths


class _Writer:
    """Appends texts of one split to its files."""

    def __init__(self, entry: Path, split: str, dtype: np.dtype, most: int | None):
        self._offsets_path = entry / f"{split}.offsets.npy"
        self._file = (entry / f"{split}.tokens").open("wb")
        self._dtype = dtype
        self._most = most
        self._count, self._bytes = 0, None
        self._lengths = [np.zeros(1, np.int64)]
        self._digest = hashlib.blake2b(digest_size=16)

    @property
    def full(self) -> bool:
        return self._most is not None and self._count >= self._most

    def add(self, ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray | None = None) -> None:
        """Texts by the length of each, and by its bytes where they were cut by these."""
        if self._most is not None:
            lengths = lengths[: self._most - self._count]
        if sizes is not None:
            self._bytes = (self._bytes or 0) + int(sizes[: len(lengths)].sum())
        data = ids[: lengths.sum()].astype(self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data + lengths.tobytes())
        self._lengths.append(lengths)
        self._count += len(lengths)

    def finish(self) -> dict:
        offsets = np.cumsum(np.concatenate(self._lengths))
        np.save(self._offsets_path, offsets)
        self._file.close()  # a full disk may show here alone
        found = dict(texts=self._count, tokens=int(offsets[-1]), digest=self._digest.hexdigest())
        return found if self._bytes is None else found | {"bytes": self._bytes}

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what was written in vain: it was told then
            self._file.close()


def _build(
    entry: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    text_length: int,
    long_texts: str,
    most,
    check: Callable,
    text_bytes: int,
) -> None:
    """Fills an entry; `check` looks at what is known after every chunk."""
    dtype = np.dtype(np.uint16 if tokenizer.size <= 2**16 else np.int32)
    meta = dict(searched=corpus.searched, dtype=dtype.name)
    count, lost = Counter(), Counter()
    with contextlib.ExitStack() as stack:
        with cache.explained():
            writers = [
                stack.enter_context(contextlib.closing(_Writer(entry, split, dtype, limit)))
                for split, limit in zip(("train", "validation"), most, strict=True)
            ]
        for chunk in chunks(_watched(corpus)):
            wanted = [document for document in chunk if not writers[document.validation].full]
            characters, missed, made = tokenised(wanted, tokenizer, text_length, long_texts, text_bytes)
            lost += missed
            count.update(documents=len(chunk), missing=sum(d.missing for d in chunk), characters=characters)
            meta.update(count, **told_of(lost))
            check(meta)
            for document, texts in zip(wanted, made, strict=True):
                with cache.explained():
                    writers[document.validation].add(*texts)
            if all(writer.full for writer in writers):
                break
        with cache.explained():
            meta["train"], meta["validation"] = (writer.finish() for writer in writers)
            (entry / _META).write_text(json.dumps(meta, indent=1), "utf-8")


def tokenised(
    documents: list[Document], tokenizer: Tokenizer, text_length: int, long_texts: str, text_bytes: int
) -> tuple[int, Counter[str], Iterator[tuple[np.ndarray, ...]]]:
    """Characters that were read; those that the tokenizer lost, and how often; and the texts of each document: their
    ids in a row, the tokens of each, and, where bytes cut them, its bytes."""
    pieces = [bytewise.pieces(d.text, text_bytes) if text_bytes else [d.text] for d in documents]
    written = list(itertools.chain.from_iterable(pieces))
    encoded = tokenizer.encode_batch(written)

    def made() -> Iterator[tuple[np.ndarray, ...]]:
        following = iter(encoded)
        for document, of_it in zip(documents, pieces, strict=True):
            ids = list(itertools.islice(following, len(of_it)))
            if text_bytes:
                yield bytewise.framed(document, of_it, ids, tokenizer, text_length)
            else:
                yield cut(_ended(document, ids[0], tokenizer.eos), document.name, text_length, long_texts)

    return sum(map(len, written)), tokenizer.lost(written, encoded), made()


def told_of(lost: Counter[str]) -> dict:
    """What is kept of the characters that were lost: how many, and the commonest."""
    return dict(lost=lost.total(), lost_most=[character for character, _ in lost.most_common(_SHOWN)])


def _ended(document: Document, ids: np.ndarray, eos: int | None) -> np.ndarray:
    return np.append(ids, np.int32(eos)) if document.ends and eos is not None else ids


def chunks(documents: Iterable[Document], most: int | None = None) -> Iterator[list[Document]]:
    """Documents, in order, some at a time: until they have so many characters or more. The last may be none."""
    chunk, characters, most = [], 0, most or _CHUNK_CHARACTERS
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= most:
            yield chunk
            chunk, characters = [], 0
    yield chunk


def _watched(corpus: Corpus, quiet_seconds: float = 2.0) -> Iterator[Document]:
    """The corpus' documents, with a progress line once reading them has lasted a while."""
    columns = (
        SpinnerColumn(),
        TextColumn("tokenising {task.description}: {task.completed} documents"),
        TimeElapsedColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(corpus.searched, total=None)
    begun, shown = time.monotonic(), False
    try:
        for document in corpus.read():
            if not shown and time.monotonic() - begun > quiet_seconds:
                progress.start()
                shown = True
            progress.advance(task)
            yield document
    finally:
        if shown:
            progress.stop()
