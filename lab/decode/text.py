"""The text of what is generated, as it comes: whole letters, up to a stop string."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lab.data.tokenizers import Tokenizer
from lab.decode.engine import Engine, Event
from lab.errors import UserError

LONGEST_LETTER = 4  # bytes of UTF-8, so tokens at most
BROKEN = "�"  # what a tokenizer decodes bytes to that are no letter, or not yet


class Passage(NamedTuple):
    """Text that a branch of a request goes on with, maybe none; `ended` as of an Event."""

    request: int
    branch: int
    text: str
    ended: str
    event: Event | None = None  # of the engine, whose token the text may be waiting for
    begins: int = 0  # letters of the branch's text, shown or not, before that token


class Transcript:
    """The text of one branch, which goes on from a prompt: where a tokenizer writes spaces before words, the first word
    has its own. What was shown is never taken back: a letter whose bytes are not all there waits, and so does what may
    become one of `stops`, strings that end the text and are no part of it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.tokens = prompt(tokenizer)
        self.begin, self.read = 0, len(self.tokens)  # what is before `read` is told; it is decoded again from `begin`
        self.text, self.shown, self.stopped = "", 0, False

    def add(self, token: int) -> str:
        """What can be shown when this token has come."""
        self.tokens.append(token)
        self.decode()
        return self.show(len(self.text) - self.waiting)

    def finish(self) -> str:
        """What is left to show when no token comes."""
        self.decode(whole=True)
        return self.show(len(self.text))

    def decode(self, whole: bool = False) -> None:
        """Reads new tokens beside those before them, as a decoder may write a first one otherwise. whole: all of them,
        be the last letter complete or not."""
        decoded = lambda end: self.tokenizer.decode(self.tokens[self.begin : end])  # noqa: E731
        end = len(self.tokens)
        before, now = decoded(self.read), decoded(end)
        if self.stopped:
            return
        if now.endswith(BROKEN) and not whole:
            if end - self.read < LONGEST_LETTER:
                return
            # The first of them are no letter and never will be; those behind may become one.
            end = next(end for end in range(self.read + 1, end + 1) if now.startswith(decoded(end)))
            now = decoded(end)
        self.text += now[len(before) :]
        self.begin, self.read = self.read, end
        if found := [at for stop in self.stops if (at := self.text.find(stop, self.shown)) >= 0]:
            self.text, self.stopped = self.text[: min(found)], True

    @property
    def waiting(self) -> int:
        """Letters at the end of the text with which a stop string may begin."""
        if self.stopped:
            return 0
        longest = min(max(map(len, self.stops), default=0), len(self.text) - self.shown + 1)
        ends = (count for count in range(longest - 1, 0, -1) if self.text.endswith(self.prefixes(count)))
        return next(ends, 0)

    def prefixes(self, count: int) -> tuple[str, ...]:
        """The first so many letters of stop strings that have more."""
        return tuple(stop[:count] for stop in self.stops if len(stop) > count)

    def show(self, end: int) -> str:
        piece = self.text[self.shown : end]
        self.shown = max(self.shown, end)
        return piece


def prompt(tokenizer: Tokenizer) -> list[int]:
    """Tokens that a text can go on from, in the place of its prompt; none of a tokenizer that cannot write them."""
    try:
        return tokenizer.encode("0").tolist()
    except UserError:
        return []


def spelled(token: int, tokenizer: Tokenizer) -> str:
    """A token as it goes on a text."""
    before = prompt(tokenizer)
    return tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]


class Transcripts:
    """The texts of an engine's requests as they come. `stops`: the stop strings of each request, by its number."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, stops: Mapping[int, Sequence[str]] | Sequence[Sequence[str]]
    ):
        self.engine, self.tokenizer, self.stops = engine, tokenizer, stops
        self.going: dict[tuple[int, int], Transcript] = {}

    def step(self) -> Iterator[Passage]:
        """Steps the engine, and ends a branch that writes a stop string. Of a branch the last passage has `ended`."""
        for event in self.engine.step():
            request, branch, token, ended = event[:4]
            place = request, branch
            if place not in self.going:
                self.going[place] = Transcript(self.tokenizer, self.stops[request])
            transcript = self.going[place]
            if ended:
                del self.going[place]
            if transcript.stopped:  # its cancellation is told
                continue
            begins = len(transcript.text)
            piece = "" if token is None else transcript.add(token)
            piece += transcript.finish() if ended and not transcript.stopped else ""
            if transcript.stopped and not ended:
                self.engine.cancel(request, branch)
            yield Passage(request, branch, piece, "stop" if transcript.stopped else ended, event, begins)


def transcribed(engine: Engine, tokenizer: Tokenizer, stops: Sequence[Sequence[str]]) -> Iterator[Passage]:
    """Steps the engine until nothing is left to do, and gives the text of its requests piece by piece.

    stops: the stop strings of each request. A branch that writes one is ended.
    """
    transcripts = Transcripts(engine, tokenizer, stops)
    while engine.busy:
        yield from transcripts.step()
