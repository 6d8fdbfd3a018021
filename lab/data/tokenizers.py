"""Tokenizers: raw bytes, byte-level BPE trained on the corpus, or any tokenizer.json."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from ml_collections import ConfigDict
from tokenizers import decoders, models, pre_tokenizers, trainers

from lab.data import cache
from lab.data.corpora import Corpus
from lab.errors import UserError
from lab.storage import write_atomically

FILE = "tokenizer.json"
_EOS = "<|endoftext|>"
# How published tokenizers call the end of a text, most specific first.
_EOS_NAMES = (_EOS, "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
_BYTES = json.dumps({"lab": "bytes"})
_SYMBOLS = '{"lab": "symbols"'  # how the file begins
_LEAST_BPE = 257  # every byte, and the end of text
_TRAINING_CHARACTERS = 2**26


class Tokenizer(Protocol):
    """Ids are 0..size-1; eos is the id that ends a text, None if the tokenizer has none."""

    size: int
    eos: int | None
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """int32 ids [n], without eos."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text; may use all cores."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text; special ids are left out, broken UTF-8 becomes U+FFFD."""

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json, which `load` reads."""


class Bytes:
    """UTF-8 bytes 0-255, the end of text 256, and 257, which pads the vocabulary to 258."""

    size = 258
    eos = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", "replace")

    def save(self, directory: Path) -> None:
        write_atomically(Path(directory) / FILE, _BYTES.encode())


class Symbols:
    """Ids written as decimal numbers, joined by spaces: what probes are made of."""

    eos = None
    fingerprint = "symbols"

    def __init__(self, size: int):
        self.size = size

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(number) for number in text.split()], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def save(self, directory: Path) -> None:
        write_atomically(Path(directory) / FILE, json.dumps({"lab": "symbols", "size": self.size}).encode())


class Json:
    """A tokenizer of the `tokenizers` library, from the text of its tokenizer.json."""

    def __init__(self, text: str):
        self._text = text
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # A corpus that spells out a special token must not end its texts with it.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values()) + 1
        self.eos = next((vocabulary[name] for name in _EOS_NAMES if name in vocabulary), None)
        self.fingerprint = cache.digest(text)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, directory: Path) -> None:
        write_atomically(Path(directory) / FILE, self._text.encode())


def open(data: ConfigDict, corpus: Corpus) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; a BPE is trained on the corpus once, then read from the cache."""
    check(data.tokenizer)
    if data.tokenizer == "bytes":
        return Bytes()
    if size := _bpe_size(data.tokenizer):
        return _trained(corpus, size)
    return _from_file(Path(data.tokenizer).expanduser())


def check(name: str) -> None:
    """Raises UserError unless `name` is bytes, bpe:<size> with room for every byte, or a file."""
    size = _bpe_size(name)
    if size is not None and size < _LEAST_BPE:
        raise UserError(f"data.tokenizer = {name!r} is too small; choose at least bpe:{_LEAST_BPE}")
    if size is None and name != "bytes" and not Path(name).expanduser().is_file():
        raise UserError(f"data.tokenizer = {name!r} is neither bytes, bpe:<size>, nor the path of a tokenizer.json")


def load(directory: Path) -> Tokenizer:
    """The tokenizer that `save` wrote there. Raises UserError if there is none."""
    path = Path(directory) / FILE
    if not path.is_file():
        raise UserError(f"{directory} holds no {FILE}: not the directory of a cell?")
    text = path.read_text("utf-8")
    if text == _BYTES:
        return Bytes()
    return Symbols(json.loads(text)["size"]) if text.startswith(_SYMBOLS) else _from_file(path)


def _bpe_size(name: str) -> int | None:
    match = re.fullmatch(r"bpe:(\d+)", name)
    return int(match[1]) if match else None


def _from_file(path: Path) -> Json:
    try:
        return Json(path.read_text("utf-8"))
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"{path} is not a tokenizer.json: {error}") from error


def _trained(corpus: Corpus, size: int) -> Json:
    entry = cache.root() / "tokenizers" / f"bpe-{size}-{corpus.fingerprint}.json"
    if not entry.is_file():
        with cache.explained():
            write_atomically(entry, _train(_training_texts(corpus), size).encode())
    return _from_file(entry)


def _training_texts(corpus: Corpus) -> Iterator[str]:
    """The first texts of the training split: merges settle long before a large corpus ends."""
    left = _TRAINING_CHARACTERS
    for document in corpus.read():
        if left <= 0:
            return
        if not document.validation:
            yield document.text
            left -= len(document.text)


def _train(texts: Iterable[str], size: int) -> str:
    """Byte-level BPE (Sennrich et al. 2016, over bytes as GPT-2): the text of its tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer.to_str()
