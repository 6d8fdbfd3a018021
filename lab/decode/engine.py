"""Requests that share one cache: they join, decode in parallel branches that fork and join, and leave.

A request has a number that no request before it had. Its prompt is branch 0, at times 0 to P - 1; branches go on from
time P, in step, each at most one token a time. Tokens are numbered (`index`) in the order of time, then of branch: of n
branches from the beginning on, index P + (t - P) n + r for the r-th at time t, be an earlier one at its end or not, as
packing lays them (lab/data/packing.py). Where they lie in the cache is another matter: lab.decode.forest.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lab.coordinates import Coordinates
from lab.decode import attention, forest, programs, sampling
from lab.decode.forest import PAGE, Forest
from lab.decode.programs import Draws, Given
from lab.decode.request import Branch, Event, Request
from lab.decode.sampling import Sampling
from lab.errors import UserError
from lab.kernels import rules
from lab.kernels.tiles import FEW

__all__ = ["Engine", "Event"]


class Engine:
    """Decodes requests over a model, whose layers it keeps in arrays of their own, beside those of whoever built it.

    rows, length: of the cache, slots of a row, made whole pages and no less than a chunk; of a long row with one
    branch, a multiple of the keys that attention takes at once there. A page has forest.PAGE slots, in a long row with
    few branches more. A row holds several requests as long as there is room. Those whose prompts begin alike share a
    row, and the slots of what they begin with: whole pages of tokens, as many as a chunk fills, and a prompt that is
    the same to its end, but for its very last token, which each gives the model itself. Where a mixer has a state for
    each branch, a request has a row to itself.
    branches: of a row, so at most so many of one request, with those that forks and joins may add; and the highest
    number of one.
    chunk: tokens of a prompt that one program takes at once, a divisor or multiple of PAGE. They begin at the first.
    alternatives: of the likeliest tokens, how many a request may be told of beside the one that is drawn.

    `submit` gives a request its number, counted from 0, and refuses with a UserError what cannot be served: nothing of
    it is kept then. `step` gives what is new as a list of `Event`s: of a branch the events come in the order of its
    text, exactly one of them, the last, has `ended`, and nothing follows it. `cancel` ends a request or a branch at any
    time; the next step tells so. `fork` and `join` add branches to a request that goes on. While `busy`, there is
    something to step for. The object is of one thread.

    What a request generates does not depend on the others, to the bit: its random numbers are those of (seed, stream,
    branch, step), its logits are computed by programs of one shape, and what it sees lies in whole tiles of its own.
    """

    def __init__(
        self,
        model,
        *,
        rows: int = 8,
        length: int = 2048,
        branches: int = 1,
        chunk: int = 64,
        alternatives: int = 0,
    ):
        for name, value in dict(rows=rows, length=length, branches=branches, chunk=chunk).items():
            if value < 1:
                raise UserError(f"an engine of {name} = {value} holds nothing; choose at least 1")
        if branches > length:
            raise UserError(f"a row of {length} slots has no room for {branches} branches; choose a longer one")
        if chunk % PAGE and PAGE % chunk:
            raise UserError(f"chunk = {chunk} is not valid; choose a divisor or a multiple of {PAGE}")
        if not 0 <= alternatives <= (C := model.embedding.shape[0]):
            raise UserError(f"alternatives = {alternatives} is not valid; choose 0 to {C}, which are all tokens")
        self.length, self.page, self.unit = forest.row_of(length, branches, chunk)
        self.width = max(chunk, 2 * FEW)  # of a call that fills: fewer would be read in tiles wider than a page
        self.model = attention.settled(model.apart(), (branches, self.width), self.length)
        self.flat, self.rows, self.branches = programs.Flat.of(self.model), rows, branches
        self.chunk, self.alternatives = chunk, alternatives
        self.own_pages = branches > FEW and not any(map(rules.shows_others, {b.mixer.rule for b in self.model.blocks}))
        self.apart = any(block.mixer.in_order for block in model.blocks)
        self.forests = [Forest(self.length, self.page, branches, self.apart) for _ in range(rows)]
        self.state = programs.beginning(self.model, rows, self.length, branches)
        self.limits = None  # on the device; None: no longer those of the rows
        self.waiting: collections.deque[Request] = collections.deque()
        self.submitted = self.read = 0  # requests, and tokens that the model was given
        self.cancelled: list[Event] = []

    def submit(
        self,
        prompt: Sequence[int],
        *,
        branches: int | Iterable[int] = 0,
        texts: Sequence[Sequence[int]] | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008  a value that nobody can change
        stop: Iterable[int] = (),
        most_tokens: int = 128,
        stream: int | None = None,
        alternatives: int = 0,
        further: int = 0,
    ) -> int:
        """The number of a new request: events bear it.

        branches: that continue the prompt, a count n for the numbers 1 to n, or numbers; 0: none, the prompt is the
        beginning of a single text, of branch 1, as `model(tokens)` takes it. texts: what each branch begins with after
        the prompt, which may then be empty. stop: tokens that end a branch, and are no part of it. most_tokens: that a
        branch generates. stream: the number that its random numbers depend on beside the seed; None: that of the
        request. alternatives: of the likeliest tokens, how many each event tells of, at most those of the engine.
        further: branches that `fork` and `join` may add, for each of which most_tokens slots are kept.
        Raises UserError for what does not fit into the engine or the model.
        """
        if isinstance(branches, int) and not 0 <= branches <= self.branches:
            raise UserError(f"branches = {branches} is not within the budget; choose 0 to {self.branches}")
        if not branches and texts:
            branches = len(texts)
        numbers = tuple(range(1, branches + 1)) if isinstance(branches, int) else tuple(branches)
        alone = not numbers
        numbers, texts = ((1,), [prompt]) if alone else (numbers, [[]] * len(numbers) if texts is None else texts)
        if len(texts) != len(numbers):
            raise UserError(f"{len(texts)} texts for {len(numbers)} branches; give each branch one")
        if most_tokens < 1:
            raise UserError(f"most_tokens = {most_tokens} generates nothing; choose at least 1")
        prompt = self.checked([] if alone else prompt)
        given = [self.checked(text).tolist() for text in texts]
        made = Request(
            id=self.submitted,
            prompt=prompt,
            branches=[Branch(i, numbers[i], given[i], most_tokens, len(prompt)) for i in range(len(numbers))],
            sampling=sampling,
            stop=frozenset(stop),
            most_tokens=most_tokens,
            stream=self.submitted if stream is None else stream,
            alternatives=alternatives,
            further=further,
            alone=alone,
            unit=self.unit,
            own_pages=self.own_pages,
        )
        self.check(made)
        self.waiting.append(made)
        self.submitted += 1
        return made.id

    def checked(self, tokens: Sequence[int]) -> np.ndarray:
        """Tokens int32 [P]; raises UserError for those that are none of the model's."""
        tokens, C = np.asarray(tokens, np.int64).reshape(-1), self.model.embedding.shape[0]
        if (outside := tokens[(tokens < 0) | (tokens >= C)]).size:
            raise UserError(f"token {outside[0]} is outside of the model's vocabulary; choose 0 to {C - 1}")
        return tokens.astype(np.int32)

    def check(self, made: Request) -> None:
        """Raises UserError for a request that the engine cannot take."""
        sampling.check(made.sampling)
        numbers, most = [b.number for b in made.branches], max(b.given for b in made.branches)
        if sorted({*numbers}) != numbers or numbers[0] < 1:
            raise UserError(
                f"branches = {tuple(numbers)} are no numbers of branches; choose distinct ones from 1 on, in order"
            )
        if made.further < 0:
            raise UserError(f"further = {made.further} is no number of branches; choose at least 0")
        if numbers[-1] + made.further > self.branches:
            raise UserError(
                f"branch {numbers[-1] + made.further} is over the budget of {self.branches} branches; choose numbers "
                "within it, with those of further ones"
            )
        if not 0 <= made.stream < 2**32:
            raise UserError(f"stream = {made.stream} is none; choose a whole number from 0 to 2**32 - 1")
        if not 0 <= made.alternatives <= self.alternatives:
            raise UserError(f"alternatives = {made.alternatives} is not valid; choose 0 to {self.alternatives}")
        if len(made.prompt) + min(b.given for b in made.branches) < 1:
            raise UserError("the prompt is empty: there is nothing to continue; give at least one token")
        if (needed := forest.needed(len(made.shared), made.owns, self.unit, self.page)) > self.length:
            n = len(made.branches) + made.further
            raise UserError(
                f"a prompt of {len(made.prompt) + most} tokens and {n} x {made.most_tokens} to generate need {needed} "
                f"slots, and a row of the cache has {self.length}; choose a shorter prompt, fewer branches or tokens, "
                "or a longer cache"
            )
        self.check_places(made)

    def check_places(self, made: Request) -> None:
        """Raises UserError where the model has no weights for a place that a branch may reach."""
        branch, time, index = (np.full((1, 1), x, np.int32) for x in made.last())
        at = Coordinates(segment=0 * time, branch=branch, time=time, index=index)
        jax.eval_shape(lambda: self.model.embed(0 * time, at))

    @property
    def running(self) -> list[Request]:
        """Requests that have a place in the cache."""
        return [made for row in self.forests for made in row.requests]

    @property
    def busy(self) -> bool:
        """Whether some request has not ended, or an event has not been told."""
        return bool(self.waiting or self.cancelled or self.running)

    @property
    def free_slots(self) -> int:
        """Of the cache, those that hold no token."""
        return int((np.asarray(self.state.cache.coordinates.segment) < 0).sum())

    def find(self, request: int) -> Request:
        """One that goes on; raises UserError for a number of none."""
        for made in (*self.waiting, *self.running):
            if made.id == request:
                return made
        raise UserError(f"request {request} does not go on: it has ended, or never was")

    def fork(
        self, request: int, branch: int, texts: Sequence[Sequence[int]] = ((),), most_tokens: int | None = None
    ) -> tuple[int, ...]:
        """The numbers of new branches of a request, one for each of `texts`, which they begin with: they go on from
        what the branch has now, all of which is stored once, and from then on it is one of several.

        most_tokens: that each generates; None: those of the request, less what it begins with. Raises UserError for a
        branch that does not go on, and for more branches or tokens than the request has room for.
        """
        made = self.find(request)
        (source,) = made.named((branch,))
        if source.ended or source.begin is None:
            why = f"has ended ({source.ended})" if source.ended else "has not begun"
            raise UserError(f"branch {branch} of request {request} {why}; fork one that goes on")
        return self.add(made, texts, (source,), source.end, most_tokens)

    def join(self, request: int, branches: Sequence[int], text: Sequence[int], most_tokens: int | None = None) -> int:
        """The number of a new branch, which sees all that these see: it begins with `text` once the last of them has
        ended, at the largest time of what it joins plus one.

        text: at least one token: what several branches end with makes no single next one. Raises UserError as `fork`
        does; where a mixer has a state of each branch; and where all have ended before others of the request went on.
        """
        made = self.find(request)
        sources, cache = made.named(branches), self.state.cache
        jax.eval_shape(lambda: self.model.join(cache, (1,), 1))  # refuses mixers by name
        if not len(text):
            raise UserError("a join without a text has no token to go on from; give at least one")
        if early := [b.number for b in sources if b.begin is None]:
            raise UserError(f"branch {early[0]} of request {request} has not begun; join branches that have")
        if all(b.ended for b in sources) and max(b.end for b in sources) < made.time:
            raise UserError(
                f"branches {tuple(branches)} of request {request} ended before others went on; join while one goes on"
            )
        (number,) = self.add(made, [text], sources, None, most_tokens)
        self.see(made)
        return number

    def add(self, made: Request, texts, sources: tuple[Branch, ...], begin: int | None, most_tokens: int | None):
        """The numbers of new branches; nothing is changed where one is refused."""
        before = made.branches, made.further
        try:
            made.add([self.checked(text).tolist() for text in texts], sources, begin, most_tokens)
            self.check_places(made)
        except UserError:
            made.branches, made.further = before
            raise
        self.see(made)
        return tuple(b.number for b in made.branches[len(before[0]) :])

    def see(self, made: Request) -> None:
        """Joins whose branches have all ended begin, and branches see what they go on from."""
        made.begin()
        for row in self.forests:
            if made in row.requests:
                row.see(made)
                self.limits = None

    def cancel(self, request: int, branch: int | None = None) -> None:
        """Ends a request, or one of its branches; the next step tells so. Nothing happens to what has ended."""
        for made in (*self.waiting, *self.running):
            if made.id == request:
                for b in made.branches:
                    if not b.ended and branch in (None, b.number):
                        b.ended = "cancelled"
                        self.cancelled.append(Event(request, b.number, None, b.ended))
                self.see(made)
        self.leave()

    def step(self) -> list[Event]:
        """Takes in what waits, fills prompts by a chunk, gives every other branch a token. Returns what is new."""
        events, self.cancelled = self.cancelled, []
        while self.waiting and (row := self.place(self.waiting[0])):
            row.put(self.waiting.popleft())
            self.limits = None
        if self.limits is None:
            self.limits = jax.device_put(np.stack([row.limits for row in self.forests]))
        ready = [made for made in self.running if made.ready]
        self.fill()
        if ready:
            events += self.decode(ready)
        return events

    def place(self, made: Request) -> Forest | None:
        """The row for a request: of those that have room, one that holds most of its prompt."""
        rows = [row for row in self.forests if row.takes(made)]
        return max(rows, key=lambda row: len(row.found(made)), default=None)

    def leave(self) -> None:
        """Takes out requests all of whose branches have ended, and frees what is nobody's then."""
        self.waiting = collections.deque(made for made in self.waiting if made.live)
        ended = [(i, made) for i, row in enumerate(self.forests) for made in row.requests if not made.live]
        if ended:
            freed_BP = np.zeros((self.rows, self.length // self.page), bool)
            for i, made in ended:
                freed_BP[i, self.forests[i].remove(made)] = True
            cache = self.state.cache
            segment = programs.released(cache.coordinates.segment, freed_BP)
            at = dataclasses.replace(cache.coordinates, segment=segment)
            self.state = self.state._replace(cache=cache._replace(coordinates=at))

    def segment(self, made: Request | None) -> int:
        """Of the tokens of a request. Those of a row see each other by limits; states are told apart by segments."""
        return made.id if self.apart else 0

    def fill(self) -> None:
        """Puts the next chunk into the cache, in each row that of the first request that lacks some."""
        if all(made.ready for made in self.running):
            return
        given = Given(self.rows, self.width)
        for i, row in enumerate(self.forests):
            made = next((made for made in row.requests if not made.ready), None)
            if made is None:
                continue
            stem = next((stem for stem in made.stems if not stem.full), None)
            if stem is None:
                tokens = made.ahead[made.filled : made.filled + self.chunk]
                made.filled += len(tokens)
                self.give(given, i, made, tokens, slice(len(tokens)))
                continue
            places = np.arange(stem.filled, min(stem.filled + self.chunk, len(stem.tokens)))
            stem.filled += len(places)
            time = stem.start + places
            given.put(
                i, slice(len(places)), tokens=np.array(stem.tokens)[places], segment=self.segment(made),
                slots=[row.slot(stem.pages, place) for place in places], branch=stem.branch, time=time, index=time,
                node=stem.node,
            )  # fmt: skip
        self.read += given.count
        self.state = programs.prefill(self.flat, self.state, given.packed, self.limits)

    def give(self, given: Given, row: int, made: Request, tokens, places) -> None:
        """Own tokens of a request, to its next slots."""
        if not tokens:
            return
        slots = []
        for token in tokens:
            own = token.rank if made.own_pages else 0
            slots.append(self.forests[row].slot(made.pages[own], made.held[own]))
            made.held[own] += 1
        rank, branch, time, index, ids = zip(*tokens, strict=True)
        given.put(
            row, places, tokens=ids, slots=slots, segment=self.segment(made), branch=branch, time=time, index=index,
            node=[made.lanes[i] for i in rank],
        )  # fmt: skip

    def decode(self, ready: list[Request]) -> list[Event]:
        """One time step of these requests: the next token of every branch, given or drawn."""
        given, draws = Given(self.rows, self.branches), Draws(self.rows, self.branches)
        drawn: list[tuple[int, Request, Branch]] = []
        for i, row in enumerate(self.forests):
            for made in (made for made in row.requests if made in ready):
                tokens = list(made.tokens())
                self.give(given, i, made, tokens, [made.lanes[token.rank] for token in tokens])
                for b in made.drawing():
                    place = made.lanes[b.tip.rank if b.tip else 0]  # the last token of the prompt has the first lane
                    draws.put(
                        i, made.lanes[b.rank], wanted=place, segment=self.segment(made), branch=b.number,
                        stream=made.stream, step=len(b.text) - b.given, told=made.alternatives > 0,
                        **made.sampling._asdict(),
                    )  # fmt: skip
                    drawn.append((i, made, b))
                made.advance()
        self.read += given.count
        packed, self.state = programs.decode(
            self.flat, self.state, given.packed, self.limits, draws.packed, self.alternatives
        )
        packed = np.asarray(packed)
        events = [made.take(b, programs.found(packed[i, made.lanes[b.rank]])) for i, made, b in drawn]
        for made in ready:
            if any(b.begin is None for b in made.branches):
                self.see(made)
        if self.apart:
            self.fork_states()
        self.leave()
        return events

    def fork_states(self) -> None:
        """Branches that begin now have the states of those that they go on from."""
        begun = [
            (i, b.sources[0].number, b.number)
            for i, row in enumerate(self.forests)
            for made in row.requests
            for b in made.branches
            if b.sources and b.begin == made.time
        ]
        for row, source, target in begun:
            source_B, target_B = np.full(self.rows, -1, np.int32), np.zeros(self.rows, np.int32)
            source_B[row], target_B[row] = source, target
            cache = programs.forked(self.model, self.state.cache, jnp.asarray(source_B), jnp.asarray(target_B))
            self.state = self.state._replace(cache=cache)
