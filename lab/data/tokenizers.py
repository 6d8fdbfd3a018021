"""Tokenizers: raw bytes, byte-level BPE trained on the corpus, or any tokenizer.json."""

import functools
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from ml_collections import ConfigDict
from tokenizers import decoders, models, pre_tokenizers, trainers

from lab.data import cache
from lab.data import chat as chats
from lab.data.corpora import Corpus
from lab.errors import SHOWN, UserError
from lab.storage import find_json, write_atomically, write_json

FILE = "tokenizer.json"
_EOS = "<|endoftext|>"
# How published tokenizers call the end of a text, most specific first.
_EOS_NAMES = (_EOS, "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
_BYTES = json.dumps({"lab": "bytes"})
_SYMBOLS = '{"lab": "symbols"'  # how the file begins
_LEAST_BPE = 257  # every byte, and the end of text
_MOST_BPE = 2**20  # several times the largest that were published; room for all is reserved before training
_TRAINING_CHARACTERS = 2**26
# The letters that byte-level tokenizers write bytes as: those that can be seen, and others from U+0100 on for the rest.
_SEEN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTES_OF = {chr(byte): byte for byte in _SEEN}
_BYTES_OF |= {chr(0x100 + n): byte for n, byte in enumerate(byte for byte in range(0x100) if byte not in _SEEN)}
_SPACE = "▁"  # what SentencePiece writes for one
_UNKNOWN = "\0unknown"  # no text has it


class Tokenizer(Protocol):
    """Ids are 0..size-1; eos is the id that ends a text, bos the one that its maker put before each, None if the
    tokenizer has none; name is for messages.

    bytes_of_ids: int64 [size], how many bytes of UTF-8 text each id stands for, 0 of special ones; None of a tokenizer
    whose ids stand for no number of bytes by themselves. chat: the template that came with it; None where none did.
    """

    name: str
    size: int
    eos: int | None
    bos: int | None
    fingerprint: str
    bytes_of_ids: np.ndarray | None
    chat: chats.Chat | None

    def encode(self, text: str) -> np.ndarray:
        """int32 ids [n], without bos and eos."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text; may use all cores."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text; special ids are left out, broken UTF-8 becomes U+FFFD."""

    def written(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for, as many as `bytes_of_ids` says; of tokenizers that have these."""

    def lost(self, texts: Sequence[str], ids: Sequence[np.ndarray]) -> Counter[str]:
        """The visible characters of texts that their ids do not hold, and how often."""

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json, which `load` reads."""


class Bytes:
    """UTF-8 bytes 0-255, the end of text 256, and 257, which pads the vocabulary to 258."""

    name = "bytes"
    size = 258
    eos = 256
    bos = None
    fingerprint = "bytes"
    chat = None
    bytes_of_ids = (np.arange(size) < 256).astype(np.int64)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self.written(ids).decode("utf-8", "replace")

    def written(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in map(int, ids) if i < 256)

    def lost(self, texts: Sequence[str], ids: Sequence[np.ndarray]) -> Counter[str]:
        return Counter()

    def save(self, directory: Path) -> None:
        write_atomically(Path(directory) / FILE, _BYTES.encode())


class Symbols:
    """Ids written as decimal numbers, joined by spaces: what probes are made of."""

    name = "symbols"
    eos = None
    bos = None
    fingerprint = "symbols"
    chat = None
    bytes_of_ids = None

    def __init__(self, size: int):
        self.size = size

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(number) for number in text.split()], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def lost(self, texts: Sequence[str], ids: Sequence[np.ndarray]) -> Counter[str]:
        return Counter()

    def save(self, directory: Path) -> None:
        write_atomically(Path(directory) / FILE, json.dumps({"lab": "symbols", "size": self.size}).encode())


class Json:
    """A tokenizer of the `tokenizers` library, from the text of its tokenizer.json."""

    def __init__(self, text: str, eos: str = "", name: str = FILE, beside: Path | None = None):
        """`eos`: the token that ends a text; empty: the first of the usual names that it has. beside: the directory of
        what came with it."""
        self._text, self.name, self._beside = text, name, beside
        self._tokenizer = _plain(text)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError("it has no tokens")
        self.size = max(vocabulary.values()) + 1
        usual = next((name for name in _EOS_NAMES if name in vocabulary), None)
        if eos and eos not in vocabulary:
            special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
            raise UserError(
                f"data.eos = {eos!r} is no token of {name}; "
                + (f"its special tokens are: {', '.join(special[:SHOWN])}" if special else "it has no special tokens")
            )
        self.eos = vocabulary.get(eos or usual)
        self.bos = _first(self._tokenizer)
        self._unknown = _unknown(json.loads(text)["model"], vocabulary)
        self.fingerprint = cache.digest(text) if eos in ("", usual) else cache.digest(text, eos)

    @functools.cached_property
    def chat(self) -> chats.Chat | None:
        """Raises UserError for one that is damaged."""
        return chats.find(self._beside) if self._beside else None

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """The ids that end what a model says, its own eos among them."""
        named = chats.ends(self._beside) if self._beside else []
        return tuple(dict.fromkeys([*[self.eos] * (self.eos is not None), *named]))

    def encode_chat(self, text: str) -> np.ndarray:
        """int32 ids [n] of what a chat template has written: its special tokens are such."""
        try:
            return np.array(self._special.encode(text, add_special_tokens=False).ids, np.int32)
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(f"the tokenizer {self.name!r} cannot write the messages: {error}") from error

    @functools.cached_property
    def _special(self) -> tokenizers.Tokenizer:
        made = _plain(self._text)
        made.encode_special_tokens = False
        return made

    @functools.cached_property
    def bytes_of_ids(self) -> np.ndarray | None:
        """Exact of byte-level tokenizers, where each character of a token is a byte; None of others."""
        added = self._tokenizer.get_added_tokens_decoder()
        learned = {id: token for token, id in self._tokenizer.get_vocab(False).items() if id not in added}
        alphabet = {*pre_tokenizers.ByteLevel.alphabet()}
        decoder = json.loads(self._text).get("decoder") or {}
        byte_level = "ByteLevel" in [step.get("type") for step in decoder.get("decoders", [decoder])]
        if not byte_level or any({*token} - alphabet for token in learned.values()):
            return None
        counts = np.zeros(self.size, np.int64)
        for id, token in learned.items():
            counts[id] = len(token)
        for id, token in added.items():
            counts[id] = 0 if token.special or id == self.eos else len(token.content.encode())
        return counts

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(
                f"data.tokenizer = {self.name!r} cannot write the corpus: {error}; give it an unknown token, or choose "
                "bytes or bpe:<size>"
            ) from error
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def written(self, ids: Iterable[int]) -> bytes:
        added, parts = self._tokenizer.get_added_tokens_decoder(), []
        for id in map(int, ids):
            if not self.bytes_of_ids[id]:
                continue
            token = self._tokenizer.id_to_token(id)
            parts.append(token.encode() if id in added else bytes(_BYTES_OF[letter] for letter in token))
        return b"".join(parts)

    def lost(self, texts: Sequence[str], ids: Sequence[np.ndarray]) -> Counter[str]:
        """Those that are gone when a text is written and read again. What a normalizer writes otherwise, as capitals or
        composed letters, is not, nor is what cannot be seen."""
        again = self._tokenizer.decode_batch([one.tolist() for one in ids], skip_special_tokens=True)
        doubtful = [text for text, decoded in zip(texts, again, strict=True) if text != decoded]
        found: Counter[str] = Counter()
        tokenizer, unknown = self._marking if doubtful else (self._tokenizer, None)  # slow, and mostly there are none
        for text, encoding in zip(doubtful, tokenizer.encode_batch(doubtful, add_special_tokens=False), strict=True):
            if not _covers(text, encoding, unknown):  # a decoder may only spell it otherwise
                written = Counter(tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text)
                found += written - Counter(self.decode(id for id in encoding.ids if id != unknown))
        return Counter({character: count for character, count in found.items() if _visible(character)})

    @functools.cached_property
    def _marking(self) -> tuple[tokenizers.Tokenizer, int | None]:
        """One that has an id for what it cannot write, and that id. A BPE without an unknown token leaves such letters
        out, and tells of the next ones that they stand in their places."""
        if self._unknown is not None or not isinstance(self._tokenizer.model, models.BPE):
            return self._tokenizer, self._unknown
        made = json.loads(self._text)
        made["model"] |= {"unk_token": _UNKNOWN, "vocab": made["model"]["vocab"] | {_UNKNOWN: self.size}}
        return _plain(json.dumps(made)), self.size

    def save(self, directory: Path) -> None:
        write_atomically(Path(directory) / FILE, self._text.encode())


def open(data: ConfigDict, corpus: Corpus) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; a BPE is trained on the corpus once, then read from the cache."""
    check(data.tokenizer, data.eos)
    if data.tokenizer == "bytes":
        return Bytes()
    if size := _bpe_size(data.tokenizer):
        return _trained(corpus, size, data.eos)
    return from_file(Path(os.path.expanduser(data.tokenizer)), data.eos)


def check(name: str, eos: str = "") -> None:
    """Raises UserError unless `name` is bytes, which have an eos, bpe:<size> with room for every byte, or a file."""
    size = _bpe_size(name)
    if size is not None and size < _LEAST_BPE:
        raise UserError(f"data.tokenizer = {name!r} is too small; choose at least bpe:{_LEAST_BPE}")
    if size is not None and size > _MOST_BPE:
        raise UserError(f"data.tokenizer = {name!r} is too large; choose at most bpe:{_MOST_BPE}")
    if size is None and name != "bytes" and not os.path.isfile(os.path.expanduser(name)):
        raise UserError(f"data.tokenizer = {name!r} is neither bytes, bpe:<size>, nor the path of a tokenizer.json")
    if name == "bytes" and eos:
        raise UserError(
            f"data.eos = {eos!r} is no token of data.tokenizer = 'bytes', which has its own; leave it empty"
        )


def end_unknown(tokenizer: Tokenizer) -> str:
    """A line about a tokenizer that does not end texts."""
    return (
        f"data.tokenizer = {tokenizer.name!r} has none of {', '.join(_EOS_NAMES)}: nothing ends a text; "
        "if another token of it does, set data.eos to that"
    )


def _first(tokenizer: tokenizers.Tokenizer) -> int | None:
    """The id that its post-processor puts before a text; None where there is none."""
    try:
        plain, processed = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    except Exception:  # the library raises plain Exceptions; of a tokenizer that cannot write an a
        return None
    return processed[0] if processed and processed[:1] != plain[:1] else None


def load(directory: Path, eos: str = "") -> Tokenizer:
    """The tokenizer that `save` wrote there; `eos` is config.data.eos. Raises UserError if there is none."""
    path = Path(directory) / FILE
    if not path.is_file():
        raise UserError(f"{directory} holds no {FILE}: not the directory of a cell?")
    content = path.read_bytes()
    if content == _BYTES.encode():
        return Bytes()
    if not content.startswith(_SYMBOLS.encode()):
        return from_file(path, eos)
    try:
        return Symbols(int(json.loads(content)["size"]))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def name_of(directory: Path) -> str | None:
    """The data.tokenizer that is the one which `save` wrote there; None for that of a probe, which no text has."""
    saved = load(directory)
    if isinstance(saved, Symbols):
        return None
    return saved.name if isinstance(saved, Bytes) else str((Path(directory) / FILE).absolute())


def _bpe_size(name: str) -> int | None:
    match = re.fullmatch(r"bpe:0*([0-9]+)", name)
    return int(match[1][:20]) if match else None  # more digits say nothing more


def _plain(text: str) -> tokenizers.Tokenizer:
    """A tokenizer that writes a text whole, unpadded and always alike: how its maker fed a model is no part of that."""
    made = tokenizers.Tokenizer.from_str(text)
    made.encode_special_tokens = True  # a corpus that spells out a special token must not end its texts with it
    made.no_truncation()
    made.no_padding()
    if getattr(made.model, "dropout", None):
        made.model.dropout = None
    return made


def _covers(text: str, encoding: tokenizers.Encoding, unknown: int | None) -> bool:
    """Whether every visible character belongs to a token that is not the unknown one."""
    edges = np.zeros(len(text) + 1, np.int64)
    for id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if id != unknown:
            edges[begin] += 1
            edges[end] -= 1
    return not any(_visible(text[i]) for i in np.flatnonzero(np.cumsum(edges)[:-1] == 0))


def _visible(character: str) -> bool:
    """Whether it is a character that a reader would miss."""
    return character.isprintable() and not character.isspace() and character != _SPACE


def _unknown(model: Mapping, vocabulary: Mapping[str, int]) -> int | None:
    """The id that stands for what has none."""
    return model["unk_id"] if "unk_id" in model else vocabulary.get(model.get("unk_token"))


def from_file(path: Path, eos: str = "") -> Json:
    """The tokenizer of a tokenizer.json. Raises UserError for what is none."""
    try:
        return Json(path.read_text("utf-8"), eos, str(path), path.parent)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"{path} is not a tokenizer.json: {error}") from error


def _trained(corpus: Corpus, size: int, eos: str) -> Json:
    entry = cache.root() / "tokenizers" / f"bpe-{size}-{corpus.fingerprint}.sealed.json"
    if entry.is_dir():
        logging.warning("the cache's %s is damaged: it is made again", entry)
        shutil.rmtree(entry)
    text = (find_json(entry) or {}).get("tokenizer")
    if text is None:
        text = _train(_training_texts(corpus), size)
        with cache.explained():
            write_json(entry, {"tokenizer": text})
    return Json(text, eos, str(entry))


def _training_texts(corpus: Corpus) -> Iterator[str]:
    """The first texts of the training split: merges settle long before a large corpus ends."""
    left = _TRAINING_CHARACTERS
    for document in corpus.read():
        if left <= 0:
            return
        if not document.validation and not document.missing:
            yield document.text
            left -= len(document.text)


def _train(texts: Iterable[str], size: int) -> str:
    """Byte-level BPE (Sennrich et al. 2016, over bytes as GPT-2): the text of its tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = dict(special_tokens=[_EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=size, **settings)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer.to_str()
