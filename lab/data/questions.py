"""Passages with questions on them and the answers that are accepted: of files as SQuAD has them, and made of facts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lab.data import generated, probes, reading
from lab.errors import UserError, shown

NAMES = {dict: "object", list: "list", str: "text", bool: "true or false"}


class Question(NamedTuple):
    """answers: those that are accepted; ("",) of a question that the passage does not answer."""

    text: str
    answers: tuple[str, ...]


class Paragraph(NamedTuple):
    context: str
    questions: tuple[Question, ...]


def squad(path: str) -> list[Paragraph]:
    """Those of a JSON file in the format of SQuAD 1.1 (arXiv 1606.05250) or 2.0 (arXiv 1806.03822), in its order; it
    may be compressed by gzip or zstd.

    Raises UserError in one line that names the file and the place in it: for a file that is missing or damaged, a key
    that lacks or is of another kind, and a question that has no answer and does not say that it has none.
    """
    paragraphs = [
        Paragraph(_text(one, "context", at), tuple(_question(qa, place) for place, qa in _items(one, "qas", f"{at}.")))
        for entry_at, entry in _items(_json(Path(path)), "data", f"{path}: ")
        for at, one in _items(entry, "paragraphs", f"{entry_at}.")
    ]
    if not any(one.questions for one in paragraphs):
        raise UserError(f"{path} has no question in its {len(paragraphs)} paragraphs; give a file that has some")
    return paragraphs


def _json(path: Path) -> Any:
    try:
        with reading.unpacked(path) as handle:
            return json.loads(handle.read().decode("utf-8-sig"))
    except OSError as error:
        raise reading.unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; give a JSON file as SQuAD has it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}; give a file as SQuAD has it") from None


def _question(qa: dict, place: str) -> Question:
    text = _text(qa, "question", place)
    if "is_impossible" in qa and _get(qa, "is_impossible", bool, place):
        return Question(text, ("",))
    answers = tuple(_text(answer, "text", at) for at, answer in _items(qa, "answers", f"{place}."))
    if not answers:
        raise UserError(
            f"{place} has no answer, and no is_impossible = true that would say so; give it one, or leave it out"
        )
    return Question(text, answers)


def _items(holder: Any, key: str, place: str) -> Iterator[tuple[str, dict]]:
    """The objects of a list, and where each stands."""
    for number, item in enumerate(_get(holder, key, list, place.rstrip(".: "))):
        at = f"{place}{key}[{number}]"
        if not isinstance(item, dict):
            raise UserError(f"{at} is {shown(item)}, no object; give a file as SQuAD has it")
        yield at, item


def _text(holder: Any, key: str, place: str) -> str:
    text = _get(holder, key, str, place)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell what is no text
        raise UserError(f"{place}: {key!r} has a lone surrogate at character {error.start}") from None
    return text


def _get(holder: Any, key: str, kind: type, place: str) -> Any:
    if not isinstance(holder, dict) or key not in holder:
        there = f"it has: {reading.listed(holder)}" if isinstance(holder, dict) else f"it is a {type(holder).__name__}"
        raise UserError(f"{place} lacks {key!r}; {there}")
    if not isinstance(holder[key], kind):
        raise UserError(f"{place}: {key!r} is {shown(holder[key])}, no {NAMES[kind]}")
    return holder[key]


def of_facts(data: ConfigDict, facts: int, questions: int, count: int) -> list[Paragraph]:
    """Passages of the probe `passage`, in numbers as its tokenizer writes them: functions of their own number alone,
    the same for every cell and seed, and none of those that are trained or evaluated on. As many questions as there are
    facts, or as are asked for."""
    settings, asked, found = generated.settings_of(data), min(questions, facts), []
    length = settings.length - asked * (2 + probes.WIDEST)
    for number in range(count):
        rng = np.random.default_rng((generated.ASKED, 0, facts, number))
        told = probes.facts(rng, facts, settings)
        order = rng.permutation(facts)[:asked]
        made = (Question(str(told[i][0]), (" ".join(map(str, told[i][1:-1])),)) for i in order)
        found.append(Paragraph(" ".join(map(str, probes.told(told, length))), tuple(made)))
    return found
