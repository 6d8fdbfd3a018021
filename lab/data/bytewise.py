"""Texts that are cut by bytes: the same ones in the same order, whatever the tokenizer, and every byte is predicted.

An end of text stands before each, so that its first token is predicted too: else a tokenizer of longer tokens would be
spared more bytes, and those that nothing stands before.
"""

from collections.abc import Sequence

import numpy as np

from lab.data.corpora import Document
from lab.data.tokenizers import Tokenizer
from lab.errors import UserError

LEAST = 4  # bytes: the longest character of UTF-8


def pieces(text: str, most: int) -> list[str]:
    """A text in pieces of at most `most` bytes of UTF-8 (LEAST or more), which joined are the text.

    They end with a line, else before a space, where one stands in the second half of the bytes; else at a character.
    """
    data, found, begin = text.encode(), [], 0
    while begin < len(data):
        end = _end(data, begin, begin + most)
        found.append(data[begin:end].decode())
        begin = end
    return found


def _end(data: bytes, begin: int, limit: int) -> int:
    if limit >= len(data):
        return len(data)
    half = (begin + limit) // 2
    if (line := data.rfind(b"\n", half, limit)) >= 0:
        return line + 1
    if (space := data.rfind(b" ", half, limit)) >= 0:
        return space
    while data[limit] & 0xC0 == 0x80:  # within a character
        limit -= 1
    return limit


def check(tokenizer: Tokenizer, text_bytes: int) -> None:
    """Raises UserError for a tokenizer that cannot say where a text begins, or how many bytes an id stands for."""
    wanted = f"data.text_bytes = {text_bytes} wants bytes, bpe:<size> or another byte-level one with an end of text"
    if tokenizer.bytes_of_ids is None:
        raise UserError(f"data.tokenizer = {tokenizer.name!r} has ids that stand for no number of bytes; {wanted}")
    if tokenizer.eos is None:
        raise UserError(f"data.tokenizer = {tokenizer.name!r} ends no text; {wanted} (data.eos)")


def framed(
    document: Document,
    written: Sequence[str],
    encoded: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    text_length: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces of a document as texts: their ids in a row, and the tokens and the bytes of each.

    encoded: the ids of each piece. An end of text follows the last, where the document ends. Raises UserError for a
    text of more than text_length tokens, and for a tokenizer that does not write every byte of one.
    """
    eos = np.array([tokenizer.eos], np.int32)
    texts = [np.concatenate([eos, ids]) for ids in encoded]
    if document.ends and texts:
        texts[-1] = np.concatenate([texts[-1], eos])
    lengths = np.array([len(ids) for ids in texts], np.int64)
    sizes = np.array([len(piece.encode()) for piece in written], np.int64)
    said = np.array([tokenizer.bytes_of_ids[ids].sum() for ids in texts], np.int64)
    for place in np.flatnonzero(said != sizes)[:1]:
        raise UserError(
            f"data.tokenizer = {tokenizer.name!r} writes {said[place]} of {sizes[place]} bytes of a text of "
            f"{document.name}: bits per byte would count others than were read; choose bytes or bpe:<size>"
        )
    for place in np.flatnonzero(lengths > text_length)[:1]:
        raise UserError(
            f"a text of {sizes[place]} bytes of {document.name} has {lengths[place]} tokens, over data.text_length = "
            f"{text_length}; raise it (data.text_bytes + 2 is enough for any text), or lower data.text_bytes"
        )
    return np.concatenate([np.zeros(0, np.int32), *texts]), lengths, sizes
