"""Key tokens of long documents: those that one fixed evaluator predicts from the long context, and not from a short.

LongPPL (arXiv 2410.23771) is the perplexity of a model over them. The evaluator is never the model or the method that
is scored: each would choose what it is good at. R rows, N tokens of a row, n documents.
"""

import functools

import numpy as np
from ml_collections import ConfigDict

import lab
from lab.data import tokenizers
from lab.errors import UserError
from lab.evaluate import passes
from lab.evaluate.long import LongRows
from lab.evaluate.passes import Pass
from lab.options import leaves
from lab.train import checkpoint, compiled, origin

GAIN, SURE = 2.0, 2.0  # nats: what the long context saves of a key token at least, and what it costs then at most
_found: dict[tuple, np.ndarray] = {}  # of the documents of one ask: every method is scored on the same


@functools.lru_cache(maxsize=1)
def evaluator(path: str):
    """(model, tokenizer) of a directory."""
    return lab.load(path)


def check(ask: ConfigDict, field: str, tokenizer) -> None:
    """Raises UserError for an evaluator that is not there, has other tokens, or no vector for so late a one; nothing of
    its weights is read."""
    if not ask.evaluator:
        return
    told, longest = f"{field}.evaluator = {ask.evaluator!r}", max(ask.lengths)
    try:
        found = origin.find(ask.evaluator)
        stored = leaves(found.stored)
        _check_tokens(ask.evaluator, tokenizers.load(found.cell, stored.get("data.eos", "")), tokenizer)
        checkpoint.newest(found.directory, found.step)
    except UserError as error:
        raise UserError(f"{told}: {error}") from None
    if stored.get("model.position.name") == "learned" and stored["model.position.length"] < longest:
        raise UserError(
            f"{told} has a vector for {stored['model.position.length']} positions, and is to read {longest}; choose "
            "another, or shorter lengths"
        )


def _check_tokens(evaluator: str, own, tokenizer) -> None:
    if own.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the evaluator {evaluator} has another tokenizer ({own.name}) than what is asked ({tokenizer.name}); "
            "choose one that has the same tokens"
        )


def of_rows(ask: ConfigDict, of: LongRows, digest: str, tokenizer, mesh, stop) -> np.ndarray:
    """bool [R, N]: whether the label of a token is a key; of whole documents alone.

    digest: of the rows. Raises UserError for an evaluator that has another tokenizer.
    """
    key = ask.evaluator, ask.short, ask.block, ask.bos, digest
    if key not in _found:
        model, own = evaluator(ask.evaluator)
        _check_tokens(ask.evaluator, own, tokenizer)
        _found[key] = find(compiled.laid(model, mesh), ask, of, mesh, stop)
    return _found[key]


def find(model, ask: ConfigDict, of: LongRows, mesh, stop) -> np.ndarray:
    """The same, of an evaluator that is there."""
    whole = of.part == 0
    rows_nN = of.tokens[whole]
    how = Pass.of(ask)
    all_of_it = LongRows(rows_nN, of.labels[whole], of.document[whole], of.part[whole])
    long_nN, _, _ = passes.score_all(model, all_of_it, how, mesh, stop)
    windows, at = short_rows(rows_nN, ask.short, ask.block, ask.bos)
    keys = np.zeros(of.tokens.shape, bool)
    if len(windows.tokens):
        wide = how._replace(slots=-(-max(how.slots, windows.tokens.shape[1]) // how.chunk) * how.chunk)
        nats, _, _ = passes.score_all(model, windows, wide, mesh, stop)
        short_nN = np.full(rows_nN.shape, np.nan)
        labelled = windows.labels >= 0
        short_nN[np.broadcast_to(windows.document[:, None], at.shape)[labelled], at[labelled]] = nats[labelled]
        with np.errstate(invalid="ignore"):
            keys[whole] = (short_nN - long_nN > GAIN) & (long_nN < SURE)
    return keys


def short_rows(rows_nN: np.ndarray, short: int, block: int, bos: int) -> tuple[LongRows, np.ndarray]:
    """Every block of a document behind no more than `short` tokens, the first `short` tokens being in none; and where
    the labels of these rows stand in the document, int [R, ...]."""
    n, N = rows_nN.shape
    first, tokens, labels, at, document = int(bos >= 0), [], [], [], []
    width = first + short + block
    for begin in range(first + short, N, block):
        window = rows_nN[:, begin - short : begin + block]
        window = np.concatenate([np.full((n, first), bos, np.int32), window], axis=1)
        window = np.pad(window, ((0, 0), (0, width - window.shape[1])), constant_values=-1)
        own = np.full_like(window, -1)
        own[:, first + short - 1 : width - 1] = window[:, first + short :]
        tokens.append(window)
        labels.append(own)
        at.append(np.broadcast_to(begin - 1 + np.arange(width) - (first + short - 1), window.shape))
        document.append(np.arange(n))
    if not tokens:
        nothing = np.zeros((0, width), np.int32)
        return LongRows(nothing, nothing, np.zeros(0, int), np.zeros(0, int)), nothing
    numbers = np.concatenate(document)
    return LongRows(np.concatenate(tokens), np.concatenate(labels), numbers, np.zeros_like(numbers)), np.concatenate(at)
