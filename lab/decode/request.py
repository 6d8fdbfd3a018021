"""A request: its branches, their texts, and which token each gives the model at which time."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lab.decode.sampling import Found, Sampling
from lab.errors import UserError

PAGE = 64  # slots, at least: whole tiles of keys


class Event(NamedTuple):
    """What a branch of a request has generated: a token, or none where it ends without.

    Log probabilities are in nats, of the softmax of the model's own logits: before penalty, temperature and filters.
    """

    request: int  # its number, as `submit` gave it
    branch: int  # its number within the request
    token: int | None
    ended: str  # "" while it goes on; "stop" at a token that it stops at, "length" at its most tokens, or "cancelled"
    log_p: float | None = None  # of the token; None where there is none
    likeliest: tuple[tuple[int, float], ...] = ()  # (token, log_p) of those that the request asked for, largest first


@dataclass(eq=False)
class Branch:
    """One text of a request. It begins with what it was given, and grows."""

    rank: int  # among the branches of its request, in the order in which they were made
    number: int
    text: list[int]
    most: int  # tokens that it may generate
    begin: int | None  # the time of its first token; None: not known before those that it joins have ended
    sources: tuple["Branch", ...] = ()  # whose past it has; none: that of the prompt alone
    ended: str = ""
    given: int = field(init=False)  # tokens that it began with

    def __post_init__(self):
        self.given = len(self.text)

    @property
    def end(self) -> int:
        """The time of its next token."""
        return self.begin + len(self.text)

    @property
    def latest(self) -> int:
        """The time after all that it may ever have."""
        begin = max(b.latest for b in self.sources) if self.begin is None else self.begin
        return begin + self.given + self.most

    @property
    def tip(self) -> "Branch | None":
        """The branch that has the last token before its next; None: the prompt has."""
        tip = self
        while tip is not None and not tip.text:
            tip = tip.sources[0] if tip.sources else None
        return tip


class Token(NamedTuple):
    """One that is given to the model, in the place of a branch: its own, or the prompt's, of branch 0."""

    rank: int
    branch: int
    time: int
    index: int
    id: int


def own_tokens(tokens: Sequence[int], before: int, own_pages: bool) -> list[int]:
    """How many tokens lie together in the cache, of those that each branch may have: each branch's with own pages, else
    all. before: of the first, beside them. The very last token is given to no model; of several it may be that of any.
    """
    counts = list(tokens) if own_pages else [sum(tokens)]
    counts[0] += before - (len(counts) == 1)
    return counts


@dataclass(eq=False)
class Request:
    """One that was submitted. The tokens of its prompt but the last are shared with others; what follows is its own."""

    id: int
    prompt: np.ndarray
    branches: list[Branch]
    sampling: Sampling
    stop: frozenset[int]
    most_tokens: int
    stream: int  # the number that its random numbers are drawn by
    alternatives: int  # how many of the likeliest tokens it is told of
    further: int  # branches that forks and joins may add
    alone: bool  # whether its prompt is the beginning of its only branch
    unit: int  # tokens of a stem of a prompt
    own_pages: bool  # whether each branch has some to itself; else all have them together, in the order of time
    shared: list[int] = field(init=False)  # tokens that are stored once for all requests that begin with them
    pieces: list[tuple[int, ...]] = field(init=False)  # the same, stem by stem
    time: int = field(init=False)  # at which the next tokens are given to the model, one by one
    index: int = field(init=False)  # of the first of them
    ahead: list[Token] = field(init=False)  # own tokens before: prefill takes them
    owns: list[int] = field(init=False)  # own tokens that may lie together: of each branch, or of all
    filled: int = 0  # of these, how many are in the cache
    held: list[int] = field(init=False)  # of these, each time, how many are in the cache
    lanes: list[int] = field(default_factory=list)  # of its row, one for each branch that it may have
    pages: list[list[int]] = field(default_factory=list)  # of its row, for each of these
    stems: list = field(default_factory=list)  # of its prompt (lab.decode.forest)

    def __post_init__(self):
        self.shared = (self.branches[0].text if self.alone else self.prompt.tolist())[:-1]
        self.pieces = [tuple(self.shared[i : i + self.unit]) for i in range(0, len(self.shared), self.unit)]
        self.time = self.index = len(self.shared)
        self.ahead = []
        for _ in range(len(self.prompt) + min(b.given for b in self.branches) - 1 - self.time):
            self.ahead += self.tokens()
            self.advance()
        each = [b.given + b.most for b in self.branches] + self.further * [self.most_tokens]
        self.owns = own_tokens(each, len(self.prompt[-1:]) - (len(self.shared) if self.alone else 0), self.own_pages)
        self.held = [0] * len(self.owns)

    @property
    def live(self) -> bool:
        return any(not b.ended for b in self.branches)

    @property
    def ready(self) -> bool:
        """Whether all that comes before its next time is in the cache."""
        return self.filled == len(self.ahead) and all(stem.full for stem in self.stems)

    def begun(self) -> list[Branch]:
        """Branches that have a place at this time, be it after their end: so many indices a time takes."""
        return [b for b in self.branches if b.begin is not None and b.begin <= self.time]

    def tokens(self) -> Iterator[Token]:
        """Those of this time. The last of a branch is one of them where others go on: they may see it."""
        if self.time < len(self.prompt):
            yield Token(0, 0, self.time, self.index, int(self.prompt[self.time]))
            return
        for place, b in enumerate(self.begun()):
            if self.time < b.end:
                yield Token(b.rank, b.number, self.time, self.index + place, b.text[self.time - b.begin])

    def advance(self) -> None:
        self.index += 1 if self.time < len(self.prompt) else len(self.begun())
        self.time += 1

    def drawing(self) -> Iterator[Branch]:
        """Branches that go on after the tokens of this time."""
        return (b for b in self.branches if not b.ended and b.begin is not None and b.end == self.time + 1)

    def take(self, b: Branch, found: Found) -> Event:
        """A branch goes on with the token that was found for it, or stops at it."""
        token = int(found.token)
        if token in self.stop:
            b.ended = "stop"
            return Event(self.id, b.number, None, b.ended)
        b.text.append(token)
        b.ended = "length" if len(b.text) - b.given == b.most else ""
        likeliest = zip(found.likeliest.tolist(), found.log_p_of_likeliest.tolist(), strict=True)
        told = tuple(itertools.islice(likeliest, self.alternatives))
        return Event(self.id, b.number, token, b.ended, float(found.log_p), told)

    def last(self) -> tuple[int, int, int]:
        """(branch, time, index), each the largest that is given to the model at most."""
        time = max(b.latest for b in self.branches) - 2
        P, n = len(self.prompt), len(self.branches)
        since, index = (P, P) if self.time < P else (self.time, self.index)
        most = index + (time - since) * n + n - 1 if time >= P else time
        return max(b.number for b in self.branches), time, most

    def named(self, numbers: Sequence[int]) -> tuple[Branch, ...]:
        """Its branches of these numbers; raises UserError for a number that none has, or that is given twice."""
        found = {b.number: b for b in self.branches}
        if not numbers or len({*numbers}) < len(numbers) or not {*numbers} <= {*found}:
            valid = ", ".join(map(str, found))
            raise UserError(f"branches = {tuple(numbers)} of request {self.id}; choose distinct ones among {valid}")
        return tuple(found[number] for number in numbers)

    def add(self, texts: list[list[int]], sources: tuple[Branch, ...], begin: int | None, most_tokens: int | None):
        """Branches that begin with these texts; raises UserError for more branches or tokens than there is room for."""
        if not 1 <= len(texts) <= self.further:
            raise UserError(
                f"request {self.id} has room for {self.further} further branches, not {len(texts)}; choose so many"
            )
        for text in texts:
            most = self.most_tokens - len(text) if most_tokens is None else most_tokens
            if most < 1 or len(text) + most > self.most_tokens:
                raise UserError(
                    f"{len(text)} tokens to begin with and {most} to generate are over the {self.most_tokens} of a "
                    f"further branch of request {self.id}; choose fewer"
                )
            number = 1 + max(b.number for b in self.branches)
            self.branches = [*self.branches, Branch(len(self.branches), number, text, most, begin, sources)]
        self.further -= len(texts)

    def begin(self) -> None:
        """Joins whose branches have all ended begin."""
        for b in self.branches:
            if b.begin is None and not b.ended and all(source.ended for source in b.sources):
                b.begin = max(source.end for source in b.sources)
