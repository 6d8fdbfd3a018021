"""Opens what config.data names: two splits of texts, a tokenizer, and the fingerprint of both."""

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from lab.data import cache, corpora, shards, texts, tokenizers
from lab.data.checks import check_training
from lab.data.corpora import Corpus
from lab.data.shards import Shards
from lab.data.texts import Texts
from lab.data.tokenizers import Tokenizer
from lab.errors import UserError
from lab.storage import is_remote


class Data(NamedTuple):
    """fingerprint: of the training texts' tokens and of the tokenizer; validation_fingerprint: likewise. Both are the
    same on every machine.

    A probe has no texts: its rows are made from numbers alone.
    """

    train: Texts | Shards | None
    validation: Texts | Shards | None
    tokenizer: Tokenizer
    fingerprint: str
    validation_fingerprint: str


def open(config: ConfigDict) -> Data:
    """The texts of `config.data`, tokenised into the cache if they are not there yet.

    Raises UserError for a field that cannot work, a corpus that is empty or too small, and a tokenizer larger than
    config.model.vocabulary.
    """
    check_training(config)
    data = config.data
    if missing := unnamed(config):
        raise UserError(missing)
    corpus = corpora.open(data)
    tokenizer = tokenizers.open(data, corpus)
    check_vocabulary(config, tokenizer)
    entry = texts.prepare(
        corpus,
        tokenizer,
        data.text_length,
        data.long_texts,
        most(config, corpus),
        data.lossy,
        text_bytes=data.text_bytes,
    )
    splits = Texts(entry, "train", data.texts), Texts(entry, "validation")
    return _checked(config, corpus.searched, tokenizer, texts.read_meta(entry), *splits)


def open_prepared(config: ConfigDict) -> Data:
    """The texts of the directory `config.data.path`, which lab.prepare has filled.

    Raises UserError as `open` does, for a directory that is not whole, and for fields that are not those by which its
    texts were cut.
    """
    check_training(config)
    data = config.data
    directory, manifest = shards.read_manifest(data.path)
    about, url = manifest["about"], data.path if is_remote(data.path) else ""
    place = url or directory
    for name in ("text_length", "long_texts", "text_bytes", "eos"):
        if data[name] != about[name]:
            raise _prepared_otherwise(config, name, about[name])
    tokenizer = tokenizers.load(directory, data.eos)
    if tokenizer.fingerprint != about["tokenizer"]:
        raise UserError(f"{place}/{tokenizers.FILE} is not the tokenizer of {place}/{shards.MANIFEST}")
    if data.tokenizer != manifest["tokenizer"] and not _is(data, tokenizer):
        raise _prepared_otherwise(config, "tokenizer", manifest["tokenizer"])
    check_vocabulary(config, tokenizer)
    searched = f"prepared ({data.path}) from {manifest['searched']}"
    texts.check_lost(data.lossy, manifest, searched, tokenizer)
    splits = Shards(directory, "train", data.texts, url), Shards(directory, "validation", url=url)
    return _checked(config, searched, tokenizer, manifest, *splits)


def _is(data: ConfigDict, tokenizer: Tokenizer) -> bool:
    """Whether data.tokenizer is the path of one."""
    path = os.path.expanduser(data.tokenizer)
    return os.path.isfile(path) and tokenizers.from_file(Path(path), data.eos).fingerprint == tokenizer.fingerprint


def _prepared_otherwise(config: ConfigDict, name: str, there) -> UserError:
    return UserError(
        f"data.path = {config.data.path!r} was prepared with data.{name} = {there!r}, not {config.data[name]!r}; "
        "set that, or prepare another directory"
    )


def check_vocabulary(config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Raises UserError for a tokenizer with more ids than the model has."""
    if tokenizer.size > config.model.vocabulary:
        raise UserError(
            f"data.tokenizer = {config.data.tokenizer!r} has {tokenizer.size} ids, over model.vocabulary = "
            f"{config.model.vocabulary}; raise it to at least {tokenizer.size}"
        )


def most(config: ConfigDict, corpus: Corpus) -> tuple[int | None, int | None]:
    """Training and validation texts to read, None for all. A capped stream stops early; its validation texts are then
    as many as evaluation reads, whatever the cap."""
    data = config.data
    return (data.texts, _of_a_stream(config)) if corpus.streamed and data.texts else (None, None)


def _checked(
    config: ConfigDict,
    searched: str,
    tokenizer: Tokenizer,
    meta: dict,
    train: Sequence,
    validation: Sequence,
) -> Data:
    """The splits, once they are large enough; what a user should know of them is told."""
    if tokenizer.eos is None:
        _say(tokenizers.end_unknown(tokenizer))
    if meta["lost"]:
        _say(f"data.lossy = 'keep': {texts.loss(meta, searched, tokenizer)}")
    if meta["missing"]:
        _say(f"{meta['missing']} of {meta['documents']} rows of {searched} have no text and are skipped")
    _check_enough(config, searched, meta)
    trained, held_out = (
        cache.digest(meta[split]["digest"], len(kept), config.data.text_length, tokenizer.fingerprint)
        for split, kept in (("train", train), ("validation", validation))
    )
    return Data(train, validation, tokenizer, trained, held_out)


def empty(searched: str) -> UserError:
    """That a corpus has nothing to learn from."""
    return UserError(f"the corpus {searched} is empty: no text of at least 2 tokens")


def unnamed(config: ConfigDict) -> str | None:
    """What a config that names no files wants to read; None where it names them, or needs none."""
    data = config.data
    kind = corpora.CORPORA.get(data.corpus)  # None: a probe
    if kind is None or "path" not in kind.options or data.path or not data.texts:
        return None
    held_out = max(ask.texts for _, ask in _of_texts(config)) or "any number of"
    return (
        f"data.path is empty: this config reads {data.texts} training and {held_out} validation texts from corpus "
        f"{data.corpus}; name its files with --config.data.path=... and, if they have fewer, set data.texts lower"
    )


def _of_a_stream(config: ConfigDict) -> int:
    """Validation texts to read from a corpus that has no end."""
    for name, ask in _of_texts(config):
        if not ask.texts:
            raise UserError(
                f"evaluate.{name}.texts = 0 asks of all validation texts, and data.corpus = {config.data.corpus!r} is "
                "read no further than asked; name a number"
            )
    return max(ask.texts for _, ask in _of_texts(config))


def _of_texts(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """The asks, but those that read a file of their own."""
    return [(name, ask) for name, ask in config.evaluate.items() if not ask.squad]


@functools.cache
def _say(line: str) -> None:
    """What a user should know of the data, once: many cells open the same."""
    logging.warning(line)


def _check_enough(config: ConfigDict, searched: str, meta: dict) -> None:
    data = config.data
    found = {split: meta[split]["texts"] for split in ("train", "validation")}
    if not any(found.values()):
        raise empty(searched)
    step = data.rows * data.texts_per_row
    if found["train"] < data.texts:
        raise UserError(
            f"the corpus {searched} gives {found['train']} training texts, fewer than data.texts = {data.texts}; "
            "bring more text, or set data.texts lower (0: all there are)"
        )
    if min(found["train"], data.texts or found["train"]) < step:
        raise UserError(
            f"the corpus {searched} gives {found['train']} training texts (data.texts = {data.texts}), fewer than "
            f"one step of data.rows x texts_per_row = {data.rows} x {data.texts_per_row}"
        )
    for name, ask in _of_texts(config):
        if found["validation"] < ask.texts:
            raise UserError(
                f"the corpus {searched} gives {found['validation']} validation texts, fewer than "
                f"evaluate.{name}.texts = {ask.texts}; bring more text, or set it to 0 (all there are)"
            )
        if not ask.texts and found["validation"] < ask.texts_per_row * ask.rows:
            raise UserError(
                f"the corpus {searched} gives {found['validation']} validation texts, fewer than one call of "
                f"evaluate.{name}.texts_per_row x rows = {ask.texts_per_row} x {ask.rows}"
            )
