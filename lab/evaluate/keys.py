"""Key tokens of long documents: those that one fixed evaluator predicts from the long context, and not from a short.

LongPPL (arXiv 2410.23771) is the perplexity of a model over them. The evaluator is never the model or the method that
is scored: each would choose what it is good at. It may have a tokenizer of its own: then it reads the same text, and
what it chose is found again by where its bytes stand. R rows, N tokens of a row, n documents.
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
    """Raises UserError for an evaluator that is not there, has tokens that cannot be found again, or no vector for so
    late a one; nothing of its weights is read."""
    if not ask.evaluator:
        return
    told, longest = f"{field}.evaluator = {ask.evaluator!r}", max(ask.lengths)
    try:
        found = origin.find(ask.evaluator)
        stored = leaves(found.stored)
        own = tokenizers.load(found.cell, stored.get("data.eos", ""))
        if own.fingerprint != tokenizer.fingerprint and any(each.bytes_of_ids is None for each in (own, tokenizer)):
            raise UserError(
                f"it has another tokenizer ({own.name}) than what is asked ({tokenizer.name}), and not both write "
                "bytes; choose one that has the same tokens"
            )
        checkpoint.newest(found.directory, found.step)
    except UserError as error:
        raise UserError(f"{told}: {error}") from None
    if stored.get("model.position.name") == "learned" and stored["model.position.length"] < longest:
        raise UserError(
            f"{told} has a vector for {stored['model.position.length']} positions, and is to read {longest}; choose "
            "another, or shorter lengths"
        )


def of_rows(ask: ConfigDict, of: LongRows, digest: str, tokenizer, mesh, stop) -> np.ndarray:
    """bool [R, N]: whether the label of a token is a key; of whole documents alone.

    digest: of the rows. Raises UserError for an evaluator that writes their text otherwise.
    """
    key = ask.evaluator, ask.short, ask.block, ask.bos, digest
    if key not in _found:
        model, own = evaluator(ask.evaluator)
        model = compiled.laid(model, mesh)
        if own.fingerprint == tokenizer.fingerprint:
            _found[key] = find(model, ask, of, mesh, stop)
        else:
            _found[key] = find_in_text(model, own, tokenizer, ask, of, mesh, stop)
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


def find_in_text(model, own, tokenizer, ask: ConfigDict, of: LongRows, mesh, stop) -> np.ndarray:
    """The same by an evaluator with a tokenizer of its `own`: a token is key if a byte of it is one of a token that is
    key there. `short` and `block` count the evaluator's tokens, behind the token that its texts begin with."""
    whole = np.nonzero(of.part == 0)[0]
    texts = [in_text(tokenizer.written(of.tokens[row])) for row in whole]
    first = np.array([] if own.bos is None else [own.bos], np.int32)
    rows = [np.concatenate([first, own.encode(text)]) for text, _ in texts]
    tokens = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    theirs = ask.copy_and_resolve_references()
    theirs.lengths, theirs.bos = (tokens.shape[1],), -1 if own.bos is None else own.bos
    labels = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    chosen = find(model, theirs, LongRows(tokens, labels, of.document[whole], of.part[whole]), mesh, stop)
    keys = np.zeros(of.tokens.shape, bool)
    for n, row in enumerate(whole):
        ends = np.cumsum(own.bytes_of_ids[rows[n]])
        if ends[-1] != len(texts[n][1]):
            raise UserError(
                f"evaluator = {ask.evaluator!r} writes the text of document {n} in {ends[-1]} bytes, which has "
                f"{len(texts[n][1])}: its tokenizer changes texts; choose another"
            )
        size = tokenizer.bytes_of_ids[of.tokens[row]]
        marked = np.zeros(size.sum() + 1, int)  # the first of these: of no byte
        for at in np.nonzero(chosen[n])[0] + 1:
            marked[1 + texts[n][1][ends[at - 1] : ends[at]]] = 1
        until = np.cumsum(marked)[np.cumsum(size)]
        keys[row, :-1] = np.diff(until) > 0
    return keys


def in_text(written: bytes) -> tuple[str, np.ndarray]:
    """The text of some bytes without those that are no UTF-8, as where a document begins within a letter, and where the
    bytes that it has stand among them."""
    escaped = written.decode("utf-8", "surrogateescape")
    text = "".join(letter for letter in escaped if not "\udc80" <= letter <= "\udcff")
    sizes = [(1, False) if "\udc80" <= letter <= "\udcff" else (len(letter.encode()), True) for letter in escaped]
    kept = np.repeat([there for _, there in sizes], [size for size, _ in sizes]) if sizes else np.zeros(0, bool)
    return text, np.flatnonzero(kept)


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
