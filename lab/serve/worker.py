"""The thread that an engine runs in: requests of an event loop join between its steps, and their readers are told.

The engine is touched in this thread alone. A reader that is slow holds nobody up: what waits for it is no more than its
requests may generate, which has room in the cache.
"""

import asyncio
import collections
import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lab.data.tokenizers import Tokenizer
from lab.decode.engine import Engine
from lab.decode.text import Passage, Transcripts


class Ask(NamedTuple):
    """A request to the engine."""

    settings: dict  # of Engine.submit
    stops: Sequence[str]


class Full(Exception):
    """Too many requests wait."""


class Closing(Exception):
    """The server takes no more requests, and ends those that it has."""


class Answer:
    """What one reader of an event loop is told of what it asked. It is made and read in that loop."""

    def __init__(self, asks: Sequence[Ask]):
        self.asks, self.loop = asks, asyncio.get_running_loop()
        self.told: list[Passage] = []
        self.error: Exception | None = None
        self.news = asyncio.Event()

    def tell(self, news: Sequence[Passage] | Exception) -> None:
        """Called in the thread of the engine."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and its readers have
            self.loop.call_soon_threadsafe(self.take_in, news)

    def take_in(self, news: Sequence[Passage] | Exception) -> None:
        if isinstance(news, Exception):
            self.error = news
        else:
            self.told += news
        self.news.set()

    async def take(self) -> list[Passage]:
        """All that is new, as soon as something is: at first nothing, when all requests were taken in. A passage has
        the place of its request among the asks as its number. Raises what they were refused or ended by."""
        await self.news.wait()
        told, self.told = self.told, []
        if not told and self.error:
            raise self.error
        if not self.error:
            self.news.clear()
        return told


@dataclass(eq=False)
class Going:
    """A request that the engine has."""

    answer: Answer | None  # None when nobody reads it
    place: int  # among the asks of its answer
    left: int  # branches that have not ended


class Worker(threading.Thread):
    """Steps an engine as long as it has something to do, and takes in at most `most_waiting` requests more than it has
    rows. `failed` is called, in this thread, when the engine fails: it is not stepped any more then."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, most_waiting: int, failed: Callable[[], None] = bool):
        super().__init__(name="engine", daemon=True)
        self.engine, self.room, self.failed = engine, engine.rows + most_waiting, failed
        self.stops: dict[int, Sequence[str]] = {}
        self.transcripts = Transcripts(engine, tokenizer, self.stops)
        self.going: dict[int, Going] = {}
        self.commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.deadline: float | None = None  # at which what still goes on is ended
        self.error: Exception | None = None
        self.stopped = False

    def open(self, asks: Sequence[Ask]) -> Answer:
        """Asks all of this, or nothing where one of it is refused. Called in the loop that reads the answer."""
        answer = Answer(asks)
        self.commands.put(functools.partial(self.begin, answer))
        return answer

    def close(self, answer: Answer) -> None:
        """Nobody reads the answer any more: what goes on of it is cancelled."""
        self.commands.put(functools.partial(self.abandon, answer))

    def drain(self, seconds: float) -> None:
        """Takes nothing more in, and after so many seconds ends what goes on. May be called in a signal's handler."""
        self.deadline = time.monotonic() + seconds

    def stop(self) -> None:
        """Ends what goes on, and the thread."""
        self.drain(0)
        self.commands.put(functools.partial(setattr, self, "stopped", True))
        self.join()

    def run(self) -> None:
        while not self.stopped:
            try:
                self.obey(wait=not self.busy)
                if self.deadline is not None and time.monotonic() >= self.deadline:
                    self.end(Closing("the server is shutting down"))
                if self.busy:
                    self.step()
            except Exception as error:  # of the device: what the engine holds is lost
                self.error = error
                self.end(error)
                self.failed()

    @property
    def busy(self) -> bool:
        return self.error is None and self.engine.busy

    def obey(self, wait: bool) -> None:
        """Does what was asked for meanwhile; waits for something if there is nothing else to do."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.commands.get(block=wait)()
                wait = False

    def begin(self, answer: Answer) -> None:
        if self.error or self.deadline is not None:
            answer.tell(self.error or Closing("the server is shutting down"))
            return
        if len(self.going) + len(answer.asks) > self.room:
            answer.tell(
                Full(f"{len(self.going)} requests are here and no more than {self.room} may be; try again later")
            )
            return
        try:
            for place, ask in enumerate(answer.asks):
                number = self.engine.submit(**ask.settings)
                self.going[number] = Going(answer, place, max(ask.settings.get("branches", 0), 1))
                self.stops[number] = ask.stops
        except Exception as error:  # a UserError, or a fault: others go on
            answer.tell(error)
            self.abandon(answer)
        else:
            answer.tell([])

    def abandon(self, answer: Answer) -> None:
        for number, going in self.going.items():
            if going.answer is answer:
                going.answer = None
                if self.error is None:
                    self.engine.cancel(number)

    def end(self, error: Exception) -> None:
        """Tells every reader that this ends its answer."""
        for answer in {going.answer for going in self.going.values() if going.answer}:
            self.abandon(answer)
            answer.tell(error)

    def step(self) -> None:
        news: dict[Answer, list[Passage]] = collections.defaultdict(list)
        for passage in self.transcripts.step():
            going = self.going[passage.request]
            going.left -= bool(passage.ended)
            if not going.left:
                del self.going[passage.request], self.stops[passage.request]
            if going.answer:
                news[going.answer].append(passage._replace(request=going.place))
        for answer, passages in news.items():
            answer.tell(passages)
