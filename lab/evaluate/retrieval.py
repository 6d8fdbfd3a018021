"""Tasks of retrieval over long contexts, in the manner of RULER (arXiv 2404.06654) and of passkeys (arXiv 2305.16300).

A document is a function of (task, document number) but for its garbage, of which there is as much as fits into the
tokens that are asked for, in the tokenizer of the model: an answer stands at the same share of every length.
"""

import string
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lab.data.checks import at_least, at_most_once
from lab.errors import UserError, choose
from lab.evaluate.long import LENGTHS, LongRows, LongSummary, check_lengths, digest
from lab.options import Option

_SEED = 0  # not config.seed: every cell is asked of the same documents
GARBAGE = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
)  # fmt: skip


class Content(NamedTuple):
    """What a document holds beside garbage. needles: sentences that are put among it, in this order, each behind the
    share `depths` of it. question, answer: the end; the answer is what is scored."""

    needles: list[str]
    depths: np.ndarray
    question: str
    answer: str
    filler: Callable[[int], list[str]] = lambda count: [GARBAGE[i % len(GARBAGE)] for i in range(count)]


class Task(NamedTuple):
    intro: str
    content: Callable[[np.random.Generator], Content]


def passkey(rng: np.random.Generator) -> Content:
    """A key of 1 to 50000 at a random place. The full stop belongs to the answer: the first integer must match."""
    key = rng.integers(1, 50_001)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    return Content([needle], rng.random(1), "What is the pass key? The pass key is", f" {key}.")


def needle(rng: np.random.Generator, keys: int = 1, values: int = 1) -> Content:
    """Magic numbers of `keys` words, `values` of each; asked for all of one word, in the order in which they stand."""
    words = _words(rng, keys)
    numbers = rng.choice(np.arange(1_000_000, 10_000_000), keys * values, replace=False).reshape(keys, values)
    said = [f"The magic number of {words[k]} is {numbers[k, v]}." for k in range(keys) for v in range(values)]
    order, asked = rng.permutation(len(said)), int(rng.integers(keys))
    depths = np.sort(rng.random(len(said)))
    answer = ", ".join(str(numbers.ravel()[i]) for i in order if i // values == asked)
    many = "numbers" if values > 1 else "number"
    question = f"What is the magic number of {words[asked]}? The magic {many} of {words[asked]}: "
    return Content([said[i] for i in order], depths, question.rstrip(), f" {answer}.")


def tracking(rng: np.random.Generator, hops: int = 4) -> Content:
    """A chain of variables, the first of which is a number; asked for all that have it, in the order of the chain."""
    names, value = [word.upper() for word in _words(rng, hops + 1, 3)], rng.integers(10_000, 100_000)
    values = [str(value), *names[:-1]]
    said = [f"VAR {name} = {of}." for name, of in zip(names, values, strict=True)]
    question = f"Which variables have the value {value}? They are"
    return Content(said, np.sort(rng.random(len(said))), question, f" {' '.join(names)}.")


def frequent(rng: np.random.Generator, asked: int = 3) -> Content:
    """Coded words instead of garbage, that of rank r about r^-2 as often; asked for the commonest, in that order."""
    words = np.array(_words(rng, 50, 5))
    drawing = int(rng.integers(2**31))

    def filler(count: int) -> list[str]:
        shares = np.arange(1.0, len(words) + 1) ** -2
        counts = np.floor(count * shares / shares.sum()).astype(int)
        counts[:asked] += 1 + np.arange(asked)[::-1]  # no two of the commonest are equally common
        listed = np.repeat(words, counts)
        rare = words[len(words) // 2 :]
        rest = rare[np.arange(max(count - len(listed), 0)) % len(rare)]
        return np.random.default_rng(drawing).permutation(np.concatenate([listed, rest])).tolist()

    question = f"Which {asked} words are the commonest? They are"
    return Content([], np.zeros(0), question, f" {' '.join(words[:asked])}.", filler)


TASKS = {
    "passkey": Task("A pass key is hidden in this text. Remember it.", passkey),
    "needle": Task("Magic numbers are hidden in this text. Remember them.", needle),
    "needle-keys": Task("Magic numbers are hidden in this text. Remember them.", lambda rng: needle(rng, keys=4)),
    "needle-values": Task("Magic numbers are hidden in this text. Remember them.", lambda rng: needle(rng, values=4)),
    "tracking": Task("Values of variables are hidden in this text. Follow them.", tracking),
    "frequent": Task("Some words of this list are common. Count them.", frequent),
}
OPTIONS = LENGTHS | {
    "chat": Option(False, "each document is a message in the tokenizer's chat template, where one came with it"),
    "tasks": Option(tuple(TASKS), "of retrieval", choices=tuple(TASKS), kind=tuple[str, ...]),
}


def check(config: ConfigDict, ask: ConfigDict, field: str) -> None:
    """Raises UserError for what cannot be asked."""
    check_lengths(config, ask, field)
    at_least(f"{field}.texts", ask.texts, 1)
    if not ask.tasks:
        raise UserError(f"{field}.tasks is empty; choose some of: {', '.join(TASKS)}")
    at_most_once(f"{field}.tasks", ask.tasks)


def document(tokenizer, task: str, number: int, length: int, chat: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A text in tokens, int32, and its answer: together as near to `length` as whole sentences come. chat: in the
    template of the tokenizer, up to the question; what begins the answer is the model's own.

    The answer is written behind its text, never by itself: tokenizers may join the two otherwise. Raises UserError
    where not even the least document fits.
    """
    chosen = TASKS[choose("the task of a retrieval", task, TASKS)]
    content = chosen.content(np.random.default_rng((_SEED, list(TASKS).index(task), number)))
    asked, mark, begun = content.question.partition("? ") if chat else (content.question, "", "")
    encode = tokenizer.encode_chat if chat else tokenizer.encode

    def text(count: int) -> str:
        whole = _text(chosen.intro, content._replace(question=asked + mark.rstrip()), count)
        return tokenizer.chat.asked(whole) + begun if chat else whole

    encoded = lambda count: encode(text(count) + content.answer)  # noqa: E731
    if (least := len(encoded(0))) > length:
        raise UserError(
            f"a document of the task {task} has at least {least} tokens, over a length of {length}; ask of longer "
            "ones, or of other tasks"
        )
    fits, above = 0, 1  # sentences that fit, and that do not
    while len(encoded(above)) <= length:
        fits, above = above, 2 * above
    while above - fits > 1:
        middle = (fits + above) // 2
        fits, above = (middle, above) if len(encoded(middle)) <= length else (fits, middle)
    whole, before = encoded(fits).astype(np.int32), encode(text(fits))
    n = min(len(whole) - 1, len(before))
    alike = int(np.cumprod(whole[:n] == before[:n]).sum())  # where a text ends, some write it otherwise
    return whole[:alike], whole[alike:]


def rows(config: ConfigDict, ask: ConfigDict, texts, tokenizer, length: int) -> LongRows:
    """The first ask.texts documents of every task; labels are the answers. texts: not read.

    The label of a token of the answer is scored given all before it: all of them right is what greedy decoding, asked
    for as many tokens, would get right.
    """
    tokens, labels = (np.full((len(ask.tasks) * ask.texts, length), -1, np.int32) for _ in range(2))
    pairs = [(part, number) for part in range(len(ask.tasks)) for number in range(ask.texts)]
    chat = ask.chat and tokenizer.chat is not None
    first = [ask.bos] * (ask.bos >= 0 and not chat)  # what begins a message, its template says
    for row, (part, number) in enumerate(pairs):
        before, answer = document(tokenizer, ask.tasks[part], number, length - len(first), chat)
        before = np.concatenate([np.array(first, np.int32), before])
        whole = np.concatenate([before, answer])
        tokens[row, : len(whole)] = whole
        labels[row, len(before) - 1 : len(whole) - 1] = answer
    part, number = np.array(pairs).T
    return LongRows(tokens, labels, number, part)


def summary(config: ConfigDict, ask: ConfigDict, length: int, of: LongRows, nats_RN, right_RN) -> LongSummary:
    """Loss and accuracy of the tokens of answers, and by task the share of documents whose whole answer is right."""
    labelled_RN, shape = of.labels >= 0, (len(ask.tasks), ask.texts)
    whole = np.where(labelled_RN, right_RN, True).all(1).reshape(shape)
    nats, tokens = (np.where(labelled_RN, x, 0.0).sum(1).reshape(shape) for x in (nats_RN, np.ones_like(nats_RN)))
    read = (of.tokens >= 0).sum(1).reshape(shape)
    further = {"exact": float(whole.mean()), "documents": whole.size, "read": int(read.sum())}
    further |= {
        f"exact_{task.replace('-', '_')}": float(one.mean()) for task, one in zip(ask.tasks, whole, strict=True)
    }
    kept = {"tasks": list(ask.tasks), "exact": whole.astype(int).tolist(), "nats": nats.tolist(), "read": read.tolist()}
    kept |= {"tokens": tokens.astype(int).tolist()}
    labels, right = of.labels[labelled_RN], float((right_RN & labelled_RN).sum())
    return LongSummary(labels, float(nats.sum()), right, further | {"texts": digest(of)}, kept)


def _text(intro: str, content: Content, count: int) -> str:
    """A document with so many sentences of garbage, without its answer."""
    sentences, at = content.filler(count), np.floor(content.depths * (count + 1)).astype(int)
    parts, before = [intro], 0
    for sentence, place in zip(content.needles, at, strict=True):
        parts += [*sentences[before:place], sentence]
        before = place
    return " ".join([*parts, *sentences[before:], content.question])


def _words(rng: np.random.Generator, count: int, letters: int = 6) -> list[str]:
    """Different words of random letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(list(string.ascii_lowercase), letters))] = None
    return list(found)
