"""Requests that share one cache: they join, decode in parallel branches, and leave, under two compiled programs.

B rows of the cache, S slots of a row, N branches of a row, T tokens of a prefill chunk, C vocabulary.

A request has a row to itself, and a segment number that no request before it had. Its prompt is branch 0, at times 0 to
P - 1; branches go on from time P, in step, each at most one token a time. As packing lays them (lab/data/packing.py),
tokens stand in the order of time, then of branch: index P + (t - P) n + r for the r-th of n branches at time t, be an
earlier one at its end or not. A token's slot is its index. The last token of a branch is given to the model too where
others go on: their rule may show it to them.
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lab.coordinates import Coordinates
from lab.decode import sampling
from lab.decode.sampling import Sampling
from lab.errors import UserError
from lab.model import slots


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
class Request:
    """One that was submitted. Its texts begin with what each branch was given, and grow."""

    id: int
    prompt: np.ndarray
    branches: tuple[int, ...]
    texts: list[list[int]]
    sampling: Sampling
    stop: frozenset[int]
    most_tokens: int
    stream: int  # the number that its random numbers are drawn by
    alternatives: int  # how many of the likeliest tokens it is told of
    given: list[int] = field(init=False)  # tokens that each branch began with
    live: list[bool] = field(init=False)
    row: int = -1
    time: int = field(init=False)  # at which the next tokens are given to the model
    before: int = field(init=False)  # tokens before the first such time, all of them given: prefill takes them
    filled: int = 0  # of these, how many are in the cache

    def __post_init__(self):
        self.given, self.live = [len(text) for text in self.texts], [True] * len(self.texts)
        self.time = len(self.prompt) + min(self.given) - 1
        self.before = self.index(self.time, 0)

    def index(self, time: int, rank: int) -> int:
        """Of the token of a branch at a time; of the prompt's, whatever the branch."""
        P = len(self.prompt)
        return P + (time - P) * len(self.texts) + rank if time >= P else time

    def step(self, rank: int) -> int:
        """How many tokens a branch has generated before the next; below 0 where that is given."""
        return self.time + 1 - len(self.prompt) - self.given[rank]

    def take(self, rank: int, found: sampling.Found) -> Event:
        """A branch goes on with the token that was found for it, or stops at it."""
        token = int(found.token)
        stopped = token in self.stop
        if not stopped:
            self.texts[rank].append(token)
        full = len(self.texts[rank]) - self.given[rank] == self.most_tokens
        ended = "stop" if stopped else "length" if full else ""
        self.live[rank] = not ended
        if stopped:
            return Event(self.id, self.branches[rank], None, ended)
        likeliest = zip(found.likeliest.tolist(), found.log_p_of_likeliest.tolist(), strict=True)
        told = tuple(itertools.islice(likeliest, self.alternatives))
        return Event(self.id, self.branches[rank], token, ended, float(found.log_p), told)

    @property
    def slots(self) -> int:
        """That its tokens need at most: the last that is generated needs none."""
        last = len(self.prompt) + max(self.given) + self.most_tokens - 2
        return self.index(last, len(self.texts) - 1) + 1


class Places:
    """What the rows of one call give the model: numpy arrays [B, T], padding where nothing is put."""

    def __init__(self, rows: int, T: int):
        self.tokens, self.slots = np.zeros((rows, T), np.int32), np.zeros((rows, T), np.int32)
        self.at = Coordinates.padding(rows, T).map(np.copy)

    def put(self, made: Request, places, index: np.ndarray) -> None:
        """In these places of its row the tokens of a request that have these indices."""
        P, n, row = len(made.prompt), len(made.texts), made.row
        time = np.where(index < P, index, P + (index - P) // n)
        rank = np.where(index < P, 0, (index - P) % n)
        self.at.segment[row, places], self.at.time[row, places] = made.id, time
        self.at.index[row, places] = self.slots[row, places] = index
        self.at.branch[row, places] = np.where(index < P, 0, np.array(made.branches)[rank])
        held = zip(time.tolist(), rank.tolist(), strict=True)
        self.tokens[row, places] = [made.prompt[t] if t < P else made.texts[r][t - P] for t, r in held]

    @property
    def arrays(self) -> tuple:
        return self.tokens, self.at, self.slots


class Engine:
    """Decodes requests over a model, at most `rows` at a time, each of at most `branches` branches.

    length: slots of a row, prompt and branches together; best a multiple of 512, as kernels pad others each time.
    chunk: tokens of a prompt that one program takes at once. A request's chunks begin at its own first token.
    alternatives: of the likeliest tokens, how many a request may be told of beside the one that is drawn.

    `submit` gives a request its number, counted from 0, and refuses with a UserError what cannot be served: nothing of
    it is kept then. `step` gives what is new as a list of `Event`s: of a branch the events come in the order of its
    text, exactly one of them, the last, has `ended`, and nothing follows it. `cancel` ends a request or a branch at any
    time; the next step tells so. While `busy`, there is something to step for. The object is of one thread.

    What a request generates does not depend on the others: its random numbers are those of (seed, stream, branch,
    step), and its logits are computed by programs of one shape.
    """

    def __init__(
        self, model, *, rows: int = 8, length: int = 2048, branches: int = 1, chunk: int = 64, alternatives: int = 0
    ):
        for name, value in dict(rows=rows, length=length, branches=branches, chunk=chunk).items():
            if value < 1:
                raise UserError(f"an engine of {name} = {value} holds nothing; choose at least 1")
        if branches > length:
            raise UserError(f"a row of {length} slots has no room for {branches} branches; choose a longer one")
        if not 0 <= alternatives <= (C := model.embedding.shape[0]):
            raise UserError(f"alternatives = {alternatives} is not valid; choose 0 to {C}, which are all tokens")
        self.model, self.rows, self.length, self.branches = model, rows, length, branches
        self.chunk, self.alternatives = min(chunk, length), alternatives
        self.cache = empty(model, rows, length, branches)
        self.tokens_BS = jnp.zeros((rows, length), jnp.int32)  # in the slots of the cache
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request | None] = [None] * rows
        self.submitted = 0
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
    ) -> int:
        """The number of a new request: events bear it.

        branches: that continue the prompt, a count n for the numbers 1 to n, or numbers; 0: none, the prompt is the
        beginning of a single text, of branch 1, as `model(tokens)` takes it. texts: what each branch begins with after
        the prompt, which may then be empty. stop: tokens that end a branch, and are no part of it. stream: the number
        that its random numbers depend on beside the seed; None: that of the request. alternatives: of the likeliest
        tokens, how many each event tells of, at most those of the engine.
        Raises UserError for what does not fit into the engine or the model.
        """
        if isinstance(branches, int) and not 0 <= branches <= self.branches:
            raise UserError(f"branches = {branches} is not within the budget; choose 0 to {self.branches}")
        if not branches and texts:
            branches = len(texts)
        numbers = tuple(range(1, branches + 1)) if isinstance(branches, int) else tuple(branches)
        alone = not numbers
        made = Request(
            id=self.submitted,
            prompt=self.checked([] if alone else prompt),
            branches=(1,) if alone else numbers,
            texts=[self.checked(text).tolist() for text in ([prompt] if alone else texts or [[]] * len(numbers))],
            sampling=sampling,
            stop=frozenset(stop),
            most_tokens=most_tokens,
            stream=self.submitted if stream is None else stream,
            alternatives=alternatives,
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
        if len(made.texts) != len(made.branches):
            raise UserError(f"{len(made.texts)} texts for {len(made.branches)} branches; give each branch one")
        if sorted({*made.branches}) != list(made.branches) or made.branches[0] < 1:
            raise UserError(
                f"branches = {made.branches} are no numbers of branches; choose distinct ones from 1 on, in order"
            )
        if made.branches[-1] > self.branches:
            raise UserError(
                f"branch {made.branches[-1]} is over the budget of {self.branches} branches; choose numbers within it"
            )
        if not 0 <= made.stream < 2**32:
            raise UserError(f"stream = {made.stream} is none; choose a whole number from 0 to 2**32 - 1")
        if not 0 <= made.alternatives <= self.alternatives:
            raise UserError(f"alternatives = {made.alternatives} is not valid; choose 0 to {self.alternatives}")
        if made.time < 0:
            raise UserError("the prompt is empty: there is nothing to continue; give at least one token")
        if made.most_tokens < 1:
            raise UserError(f"most_tokens = {made.most_tokens} generates nothing; choose at least 1")
        if made.slots > self.length:
            given, most = len(made.prompt) + sum(made.given), f"{len(made.branches)} x {made.most_tokens}"
            raise UserError(
                f"a prompt of {given} tokens and {most} to generate need {made.slots} slots, and a row of the cache "
                f"has {self.length}; choose a shorter prompt, fewer branches or tokens, or a longer cache"
            )
        last = np.full((1, 1), len(made.prompt) + max(made.given) + made.most_tokens - 2, np.int32)
        index = np.full((1, 1), made.slots - 1, np.int32)
        at = Coordinates(segment=0 * last, branch=0 * last + made.branches[-1], time=last, index=index)
        jax.eval_shape(lambda: self.model.embed(0 * last, at))  # refuses a place that it has no weights for

    @property
    def busy(self) -> bool:
        """Whether some request has not ended, or an event has not been told."""
        return bool(self.waiting or self.cancelled) or any(self.running)

    @property
    def free_slots(self) -> int:
        """Of the cache, those that hold no token."""
        return int((np.asarray(self.cache.coordinates.segment) < 0).sum())

    def cancel(self, request: int, branch: int | None = None) -> None:
        """Ends a request, or one of its branches; the next step tells so. Nothing happens to what has ended."""
        for made in (*self.waiting, *filter(None, self.running)):
            if made.id == request:
                for rank, number in enumerate(made.branches):
                    if made.live[rank] and branch in (None, number):
                        made.live[rank] = False
                        self.cancelled.append(Event(request, number, None, "cancelled"))
                self.leave(made)

    def step(self) -> list[Event]:
        """Takes in what waits, fills prompts by a chunk, gives every other branch a token. Returns what is new."""
        events, self.cancelled = self.cancelled, []
        for row, running in enumerate(self.running):
            if running is None and self.waiting:
                self.running[row] = made = self.waiting.popleft()
                made.row = row
        running = [made for made in self.running if made]
        if filling := [made for made in running if made.filled < made.before]:
            self.fill(filling)
        if ready := [made for made in running if made not in filling]:
            events += self.decode(ready)
        return events

    def leave(self, made: Request) -> None:
        """Takes out a request all of whose branches have ended, and frees its slots."""
        if any(made.live):
            return
        if made in self.waiting:
            self.waiting.remove(made)
            return
        at = self.cache.coordinates
        freed = Coordinates(released(at.segment, made.row), at.branch, at.time, at.index)
        self.cache = self.cache._replace(coordinates=freed)
        self.running[made.row] = None

    def fill(self, filling: list[Request]) -> None:
        """Puts the next chunk of each prompt into the cache."""
        places = Places(self.rows, self.chunk)
        for made in filling:
            index = np.arange(made.filled, min(made.filled + self.chunk, made.before))
            places.put(made, slice(len(index)), index)
            made.filled += len(index)
        self.tokens_BS, self.cache = prefill(self.model, self.cache, self.tokens_BS, *places.arrays)

    def decode(self, ready: list[Request]) -> list[Event]:
        """One time step of these requests: the next token of every branch, given or drawn."""
        places, shape = Places(self.rows, self.branches), (self.rows, self.branches)
        wanted_BN, branch_BN, step_BN = (np.zeros(shape, np.int32) for _ in range(3))
        stream_B, told_B = np.zeros(self.rows, np.uint32), np.zeros(self.rows, bool)
        settings = [Sampling()] * self.rows
        for made in ready:
            row, n, P = made.row, len(made.texts), len(made.prompt)
            settings[row], stream_B[row], branch_BN[row, :n] = made.sampling, made.stream, made.branches
            told_B[row] = made.alternatives > 0
            step_BN[row, :n] = np.maximum([made.step(rank) for rank in range(n)], 0)
            if made.time < P:  # its last token, which every branch goes on from
                places.put(made, slice(1), np.array([P - 1]))
            else:
                ranks = np.array([r for r in range(n) if len(made.texts[r]) > made.time - P])  # of ended ones, too
                places.put(made, ranks, made.index(made.time, ranks))
                wanted_BN[row, :n] = np.arange(n)
        asked = stacked(settings), stream_B, branch_BN, step_BN
        found, self.tokens_BS, self.cache = decode(
            self.model, self.cache, self.tokens_BS, *places.arrays, wanted_BN, *asked, told_B, self.alternatives
        )
        found, events = jax.device_get(found), []
        for made in ready:
            for rank, live in enumerate(made.live):
                if live and made.step(rank) >= 0:
                    events.append(made.take(rank, sampling.Found(*(x[made.row, rank] for x in found))))
            made.time += 1
            self.leave(made)
        return events


def stacked(settings: list[Sampling]) -> Sampling:
    """Those of all rows, arrays [B]."""
    types = (np.float32, np.int32, np.float32, np.float32, np.float32, np.uint32)
    return Sampling(*map(np.array, zip(*settings, strict=True), types))


@functools.partial(jax.jit, static_argnames=("rows", "length", "branches"))
def empty(model, rows: int, length: int, branches: int):
    """A cache in which no two arrays share memory, so that it can be given away."""
    return model.init_cache(rows, length, branches=branches)


@functools.partial(jax.jit, donate_argnames=("cache", "tokens_BS"))
def prefill(model, cache, tokens_BS, tokens_BT, at: Coordinates, slots_BT):
    """The cache and its tokens, with these too; no logits are made."""
    tokens_BS = kept(cache, tokens_BS, tokens_BT, at, slots_BT)
    return tokens_BS, model.extend(tokens_BT, at, cache, slots_BT=slots_BT)[1]


@functools.partial(jax.jit, donate_argnames=("cache", "tokens_BS"), static_argnames="alternatives")
def decode(
    model,
    cache,
    tokens_BS,
    tokens_BT,
    at: Coordinates,
    slots_BT,
    wanted_BN,
    settings,
    stream_B,
    branch_BN,
    step_BN,
    told_B,
    alternatives: int,
):
    """The next token of each branch, drawn from the logits of its place in `wanted_BN`; the cache and its tokens."""
    tokens_BS = kept(cache, tokens_BS, tokens_BT, at, slots_BT)
    z_BNC, cache = model.extend(tokens_BT, at, cache, slots_BT=slots_BT, wanted=wanted_BN)

    def seen_BNC():
        """Which tokens each branch has in its prompt and in its text."""
        segment_BNS, branch_BNS, ids_BNS = (
            x[:, None] for x in (cache.coordinates.segment, cache.coordinates.branch, tokens_BS)
        )
        own_BNS = (branch_BNS == 0) | (branch_BNS == branch_BN[..., None])
        own_BNS &= segment_BNS == at.segment.max(axis=1)[:, None, None]
        mark = lambda ids_S: jnp.zeros(z_BNC.shape[-1], bool).at[ids_S].set(True, mode="drop")  # noqa: E731
        return jax.vmap(jax.vmap(mark))(jnp.where(own_BNS, ids_BNS, z_BNC.shape[-1]))

    next_BN = sampling.next_tokens(z_BNC, seen_BNC, settings, stream_B, branch_BN, step_BN)
    return sampling.likelihoods(z_BNC, next_BN, alternatives, told_B), tokens_BS, cache


def kept(cache, tokens_BS, tokens_BT, at: Coordinates, slots_BT):
    """The tokens of the cache [B, S], with new ones in their slots."""
    return slots.put(tokens_BS, tokens_BT, slots.choose(at, cache.used, tokens_BS.shape[1], slots_BT)[0])


@jax.jit
def released(segment_BS, row):
    """Segments of the cache in which a row is free."""
    return segment_BS.at[row].set(-1)
