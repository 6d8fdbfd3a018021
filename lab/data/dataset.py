"""Opens what config.data names: two splits of texts, a tokenizer, and the fingerprint of both."""

import functools
import logging
from typing import NamedTuple

from ml_collections import ConfigDict

from lab.data import cache, corpora, texts, tokenizers
from lab.data.checks import check_training
from lab.data.texts import Texts
from lab.data.tokenizers import Tokenizer
from lab.errors import UserError


class Data(NamedTuple):
    """fingerprint: of the training texts' tokens and of the tokenizer; validation_fingerprint: likewise. Both are the
    same on every machine.

    A probe has no texts: its rows are made from numbers alone.
    """

    train: Texts | None
    validation: Texts | None
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
    if tokenizer.size > config.model.vocabulary:
        raise UserError(
            f"data.tokenizer = {data.tokenizer!r} has {tokenizer.size} ids, over model.vocabulary = "
            f"{config.model.vocabulary}; raise it to at least {tokenizer.size}"
        )
    # A capped stream stops early; its validation texts are then as many as evaluation reads, whatever the cap.
    most = (data.texts, _of_a_stream(config)) if corpus.streamed and data.texts else (None, None)
    entry = texts.prepare(
        corpus, tokenizer, data.text_length, data.long_texts, most, data.lossy, text_bytes=data.text_bytes
    )
    meta = texts.read_meta(entry)
    if tokenizer.eos is None:
        _say(tokenizers.end_unknown(tokenizer))
    if meta["lost"]:
        _say(f"data.lossy = 'keep': {texts.loss(meta, corpus, tokenizer)}")
    if meta["missing"]:
        _say(f"{meta['missing']} of {meta['documents']} rows of {corpus.searched} have no text and are skipped")
    _check_enough(config, corpus.searched, meta)
    train, validation = Texts(entry, "train", data.texts), Texts(entry, "validation")
    trained, held_out = (
        cache.digest(meta[split]["digest"], len(kept), data.text_length, tokenizer.fingerprint)
        for split, kept in (("train", train), ("validation", validation))
    )
    return Data(train, validation, tokenizer, trained, held_out)


def unnamed(config: ConfigDict) -> str | None:
    """What a config that names no files wants to read; None where it names them, or needs none."""
    data = config.data
    kind = corpora.CORPORA.get(data.corpus)  # None: a probe
    if kind is None or "path" not in kind.options or data.path or not data.texts:
        return None
    held_out = max(ask.texts for _, ask in _of_texts(config)) or "any number of"
    return (
        f"data.path is empty: this config reads {data.texts} training and {held_out} validation texts from corpus "
        f"{data.corpus}; name its files there (--config.data.path=...), or set data.texts lower"
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
        raise UserError(f"the corpus {searched} is empty: no text of at least 2 tokens")
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
