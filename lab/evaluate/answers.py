"""How an answer in words is scored, and which of several is taken."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """An answer as SQuAD compares it (arXiv 1606.05250, section 6.1): in lower case, without punctuation (ASCII's) and
    articles, words one space apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact(answer: str, accepted: Sequence[str]) -> bool:
    """Whether it is one of those that are accepted, as they are normalised."""
    return normalised(answer) in _accepted(accepted)


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of its words, against the accepted one that fits best. Nothing fits
    nothing alone, as SQuAD 2.0 has it."""
    words = normalised(answer).split()
    return max(_f1(words, one.split()) for one in _accepted(accepted))


def _accepted(answers: Sequence[str]) -> list[str]:
    """Normalised; those of which nothing is left count only where nothing else is accepted."""
    return [text for text in map(normalised, answers) if text] or [""]


def _f1(words: list[str], other: list[str]) -> float:
    if not words or not other:
        return float(words == other)
    return 2 * (Counter(words) & Counter(other)).total() / (len(words) + len(other))


def voted(answers: Sequence[str]) -> int:
    """The place of the first of those that most agree with, as they are normalised: self-consistency (arXiv 2203.11171)
    by majority. Of several that as many agree with, the one that came first."""
    texts = [normalised(answer) for answer in answers]
    counts = Counter(texts)
    return max(range(len(texts)), key=lambda place: (counts[texts[place]], -place))


def likeliest(means: Sequence[float]) -> int:
    """The place of the first of those that have the largest mean log probability: best-of-n by the model itself."""
    return max(range(len(means)), key=lambda place: (means[place], -place))
