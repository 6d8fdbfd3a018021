"""Long documents: what is asked of a model over lengths, in rows that are scored in chunks (lab.evaluate.passes).

R rows, N tokens of a row, D tokens of a document, L the length that a model was trained to (`trained`), W and S the
tokens of a window and of its stride. docs/long_contexts.md has every definition.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lab.data import checks
from lab.data.packing import LONGEST_ROW
from lab.errors import UserError
from lab.model import position, spec
from lab.options import Option

LENGTHS = {
    "lengths": Option((512, 1024, 2048), "tokens of a document", kind=tuple[int, ...], least=2, most=LONGEST_ROW),
    "chunk": Option(512, "tokens that are scored at once, behind a cache of those before", least=1, most=LONGEST_ROW),
    "trained": Option(
        0, "L, the tokens that the model was trained to; 0: model.position.trained, or else data.text_length",
        least=0, most=LONGEST_ROW,
    ),
    "bos": Option(-1, "id of a token that every document and window begins with; -1: none", least=-1),
}  # fmt: skip
OF_TEXT = LENGTHS | {
    "documents": Option(16, "of the longest length, spread over the validation texts", least=1),
    "evaluator": Option("", "directory of the model that chooses key tokens, for LongPPL; empty: it is not asked"),
    "short": Option(
        4096, "tokens of context that a block of tokens has to be judged as keys", least=1, most=LONGEST_ROW
    ),
    "block": Option(1024, "tokens of such a block", least=1, most=LONGEST_ROW),
    "stride": Option(256, "new tokens of each window of the sliding-window loss; 0: none is asked", least=0),
}


class LongRows(NamedTuple):
    """Rows to score. tokens, labels: int32 [R, N], -1 where there is none. document, part: int32 [R], which document a
    row is of, and which part of it: a window (0: the whole of it, from its start), or a task. keys: bool [R, N], labels
    that are key tokens (lab.evaluate.keys), where they are asked for."""

    tokens: np.ndarray
    labels: np.ndarray
    document: np.ndarray
    part: np.ndarray
    keys: np.ndarray | None = None


class LongSummary(NamedTuple):
    """What rows say under one condition. labels: int32 [n], those that count. nats, right: summed over them, as of any
    ask. further: columns of its row. documents: sums by document, JSON; what is compared is compared document by
    document."""

    labels: np.ndarray
    nats: float
    right: float
    further: dict
    documents: dict

    @property
    def tokens(self) -> int:
        return len(self.labels)


def trained(config: ConfigDict, ask: ConfigDict) -> int:
    """L: the length that a model was trained to, as the ask says or the model; else that of the texts of the config."""
    return ask.trained or config.model.position.trained or config.data.text_length


def methods(ask: ConfigDict) -> list[str]:
    """The fields of the position that an ask overrides."""
    return [name for name, _ in ask.model if name.startswith("position.")]


def check_lengths(config: ConfigDict, ask: ConfigDict, field: str) -> None:
    """Raises UserError for lengths that cannot be asked."""
    if not ask.lengths:
        raise UserError(f"{field}.lengths is empty; choose at least one length, as (128, 256)")
    checks.at_most_once(f"{field}.lengths", ask.lengths)
    if ask.evaluator and min(ask.lengths) <= ask.short:
        raise UserError(
            f"{field}.short = {ask.short} leaves no key tokens in documents of {min(ask.lengths)}; choose fewer"
        )
    L, own = trained(config, ask), config.model.position.trained
    if own and own != L:
        raise UserError(
            f"{field}.trained = {L} is not model.position.trained = {own}, which the model was trained to; choose "
            f"that, of configs/length_extrapolation.py the scale :{own}"
            + (f", or bring {config.study.brings}" if config.study.brings else "")
        )
    if methods(ask) and max(ask.lengths) <= L:
        raise UserError(
            f"{field}.lengths end at {max(ask.lengths)}, within the {L} tokens that the model was trained to: what "
            f"{field}.model sets of the position would not act; ask of longer ones"
        )
    if ask.bos >= config.model.vocabulary:
        raise UserError(
            f"{field}.bos = {ask.bos} is no id of model.vocabulary = {config.model.vocabulary}; choose one below, or -1"
        )


def check_reach(model: ConfigDict, ask: ConfigDict, field: str) -> None:
    """Raises UserError for lengths that a model, with what the ask lays over it, cannot read."""
    longest, specs = max(ask.lengths), spec.layer_specs(model)
    position.check_times(specs, f"{field}.lengths: {longest}", longest)
    position.check_reach(specs, f"{field}.lengths: {longest}", longest)


def check(config: ConfigDict, ask: ConfigDict, field: str) -> None:
    """The same of lengths of text."""
    check_lengths(config, ask, field)
    if ask.stride and (short := [length for length in ask.lengths if length - (ask.bos >= 0) <= ask.stride]):
        raise UserError(
            f"{field}.stride = {ask.stride} leaves tokens out between windows of {min(short)}; choose at most "
            f"{min(ask.lengths) - (ask.bos >= 0) - 1}, or 0 for none"
        )


def check_texts(ask: ConfigDict, field: str, texts: Sequence[np.ndarray], tokenizer=None) -> None:
    """Raises UserError for too little text, naming what there is and what it would be enough for. tokenizer: not
    read."""
    longest, first, there = max(ask.lengths), int(ask.bos >= 0), 0
    needed = ask.documents * (longest - first)
    for i in range(min(ask.texts or len(texts), len(texts))):
        there += len(texts[i])
        if there >= needed:
            return
    whole, fits = there // (longest - first), there // ask.documents + first
    enough = f"ask of {field}.documents = {whole}, or " if whole else ""
    enough += f"of lengths up to {fits}, or " if fits >= 2 else ""
    raise UserError(
        f"{field}: {ask.documents} documents of {longest} tokens take {needed} of them, and the validation texts have "
        f"{there}; {enough}bring more text, as with data.corpus = 'files' and data.path"
    )


def documents(ask: ConfigDict, texts: Sequence[np.ndarray]) -> np.ndarray:
    """Documents [n, D] of the validation texts joined in their order, of the longest length less its bos, as far
    apart as they fit. Raises UserError for too little text."""
    check_texts(ask, "an ask", texts)
    joined = np.concatenate([texts[i] for i in range(min(ask.texts, len(texts)))])
    longest = max(ask.lengths) - (ask.bos >= 0)
    first = np.arange(ask.documents) * (len(joined) // longest) // ask.documents
    return np.stack([joined[i * longest : (i + 1) * longest] for i in first])


def rows(config: ConfigDict, ask: ConfigDict, texts: Sequence[np.ndarray], tokenizer, length: int) -> LongRows:
    """Every document to its first `length` tokens, and further windows of as many. They begin ask.stride tokens apart,
    the last ends where the document does, and labels are those that no window before had. tokenizer: not read."""
    found_nD, bos = documents(ask, texts), ask.bos >= 0
    W, D = length - bos, found_nD.shape[1]
    starts = sorted({*range(0, D - W, ask.stride), D - W}) if ask.stride else [0]
    tokens, labels, before = [], [], 0
    for start in starts:
        window = found_nD[:, start : start + W]
        if bos:
            window = np.pad(window, ((0, 0), (1, 0)), constant_values=ask.bos)
        following = np.pad(window[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        at = start - bos + 1 + np.arange(length)  # where labels stand in the document
        tokens.append(window)
        labels.append(np.where(at < before, -1, following))
        before = start + W
    n, windows = len(found_nD), len(starts)
    return LongRows(
        np.concatenate(tokens), np.concatenate(labels), np.tile(np.arange(n), windows), np.repeat(np.arange(windows), n)
    )


def edges(L: int, length: int) -> list[int]:
    """Of buckets of positions: 0, L, 2 L, 4 L, ... to the length."""
    found = [0]
    while found[-1] < length:
        found.append(min(max(2 * found[-1], L), length))
    return found


def bucket(low: int, high: int) -> str:
    """The column of the loss of tokens that are read at positions low .. high - 1."""
    return f"nats_{low}_{high}"


def summary(config: ConfigDict, ask: ConfigDict, length: int, of: LongRows, nats_RN, right_RN) -> LongSummary:
    """Losses (nats per token, weighted by tokens) of whole documents, of each bucket of positions in them, within L and
    beyond, and of sliding windows over the whole of the longest."""
    L, n = trained(config, ask), of.document.max() + 1
    whole = of.part == 0
    nats_nN, labelled_nN = np.where(of.labels >= 0, nats_RN, 0.0)[whole], of.labels[whole] >= 0
    bounds = edges(L, length)
    spans = list(itertools.pairwise(bounds))
    by_bucket = [nats_nN[:, low:high].sum(1) for low, high in spans]
    counts = [int(labelled_nN[:, low:high].sum(1)[0]) for low, high in spans]
    totals = [float(sums.sum()) for sums in by_bucket]
    per_token = lambda sums, tokens: sum(sums) / (n * sum(tokens)) if sum(tokens) else None  # noqa: E731
    nats, tokens = sum(totals), n * sum(counts)
    further = {
        "ppl": perplexity(nats / tokens),
        "within": per_token(totals[:1], counts[:1]),
        "beyond": per_token(totals[1:], counts[1:]),
        "documents": int(n),
        "read": int(n) * length,
    }
    further |= {
        bucket(*span): per_token([one], [count]) for span, one, count in zip(spans, totals, counts, strict=True)
    }
    kept = {"edges": bounds, "tokens": counts, "nats": np.stack(by_bucket, 1).tolist()}
    if ask.stride:
        sliding = np.bincount(of.document, np.where(of.labels >= 0, nats_RN, 0.0).sum(1), n)
        labels = int((of.labels[of.document == 0] >= 0).sum())
        further |= {"sliding": float(sliding.sum()) / (n * labels), "windows": int(of.part.max()) + 1}
        further["sliding_ppl"] = perplexity(further["sliding"])
        kept |= {"sliding": sliding.tolist(), "sliding_tokens": labels}
    if of.keys is not None:
        keys = np.bincount(of.document, of.keys.sum(1), n)
        lost = np.bincount(of.document, np.where(of.keys, nats_RN, 0.0).sum(1), n)
        further |= {"keys": int(keys.sum()), "long_ppl": perplexity(lost.sum() / keys.sum()) if keys.any() else None}
        kept |= {"keys": keys.tolist(), "key_nats": lost.tolist()}
    labels = of.labels[whole][labelled_nN]
    return LongSummary(labels, nats, float(right_RN[whole].sum()), further | {"texts": digest(of)}, kept)


def digest(of: LongRows) -> str:
    """Of the tokens and labels that were read: other numbers are of other texts, and are not compared."""
    state = hashlib.blake2b(digest_size=8)
    for array in (of.tokens, of.labels):
        state.update(np.ascontiguousarray(array, "<i4").tobytes())
    return state.hexdigest()


def perplexity(loss: float) -> float | None:
    """exp(loss); None above what a float holds."""
    return math.exp(loss) if loss < 700 else None
