"""Requests whose branches fork and join as they grow, and the full pass that says what they should have generated."""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import decoding
import jax
import numpy as np
import variants

from lab.coordinates import Coordinates
from lab.decode.engine import Engine
from lab.decode.sampling import Sampling
from lab.errors import UserError
from lab.kernels import reference

LENGTH = 96  # tokens of a full pass


class Op(NamedTuple):
    """What is done to a request once the first of these branches has generated so many tokens."""

    name: str  # fork, join or cancel
    branches: tuple[int, ...]
    after: int
    texts: tuple[tuple[int, ...], ...] = ()


@dataclass
class Script:
    prompt: list[int]
    options: dict
    ops: list[Op]


@dataclass
class Text:
    """Of a branch, as one knows it who has seen the events."""

    tokens: list[int]
    begin: int | None
    sources: tuple[int, ...] = ()
    given: int = field(init=False)
    events: list = field(default_factory=list)
    cancelled: bool = False  # its last event comes with the next step

    def __post_init__(self):
        self.given = len(self.tokens)

    @property
    def ended(self) -> bool:
        return bool(self.events) and bool(self.events[-1].ended)

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)


class Played:
    """An engine, and what its requests have generated. Their scripts look at nothing but their own events."""

    def __init__(self, engine: Engine):
        self.engine, self.scripts, self.texts, self.refused = engine, {}, {}, []

    def submit(self, script: Script, stream: int | None = None) -> int:
        number = self.engine.submit(script.prompt, **script.options, stream=stream)
        n, P = script.options.get("branches", 0), len(script.prompt)
        texts = {b: Text([], P) for b in range(1, n + 1)} if n else {1: Text(list(script.prompt), 0)}
        self.texts[number], self.scripts[number] = texts, list(script.ops)
        self.act(number)
        return number

    def act(self, number: int) -> None:
        """Does what is due of a script."""
        texts = self.texts[number]
        for op in list(self.scripts[number]):
            first = texts.get(op.branches[0])
            if first is None or len(first.events) < op.after:
                continue
            self.scripts[number].remove(op)
            try:
                getattr(self, op.name)(number, texts, op)
            except UserError as refused:
                self.refused.append(str(refused))

    def fork(self, number: int, texts: dict[int, Text], op: Op) -> None:
        source = op.branches[0]
        for made, text in zip(self.engine.fork(number, source, op.texts), op.texts, strict=True):
            texts[made] = Text(list(text), texts[source].end, (source,))

    def join(self, number: int, texts: dict[int, Text], op: Op) -> None:
        texts[self.engine.join(number, op.branches, op.texts[0])] = Text(list(op.texts[0]), None, op.branches)
        self.begin(texts)  # at once where all have ended

    @staticmethod
    def begin(texts: dict[int, Text]) -> None:
        """Joins whose branches have all ended begin."""
        for text in texts.values():
            if text.begin is None and all(texts[s].ended or texts[s].cancelled for s in text.sources):
                text.begin = max(texts[source].end for source in text.sources)

    def cancel(self, number: int, texts: dict[int, Text], op: Op) -> None:
        self.engine.cancel(number, op.branches[0])
        texts[op.branches[0]].cancelled = True
        self.begin(texts)

    def step(self) -> None:
        changed = set()
        for event in self.engine.step():
            text = self.texts[event.request][event.branch]
            assert not text.ended
            text.events.append(event)
            text.tokens += [] if event.token is None else [event.token]
            changed.add(event.request)
        for number in sorted(changed):
            texts = self.texts[number]
            self.begin(texts)
            self.act(number)

    def finish(self) -> None:
        while self.engine.busy:
            self.step()
        assert all(text.ended for texts in self.texts.values() for text in texts.values())
        check_empty(self.engine)


def check_empty(engine: Engine) -> None:
    """Nothing is left of any request."""
    assert engine.free_slots == engine.rows * engine.length
    for forest in engine.forests:
        assert not forest.requests and not forest.stems
        assert forest.pages == list(range(engine.length // engine.page))
        assert forest.lanes == list(range(engine.branches))


def drawn_script(seed: int, sampled: bool, longest: int = 10, shared=()) -> Script:
    """A request; its prompt begins with one of `shared` now and then."""
    rng = np.random.default_rng(seed)
    tokens = lambda count: tuple(decoding.tokens(rng, count))  # noqa: E731
    n, further, most = int(rng.integers(0, 3)), int(rng.integers(0, 5)), int(rng.integers(3, 7))
    begin = list(shared[rng.integers(len(shared))]) if len(shared) and rng.random() < 0.7 else []
    ops = []
    for _ in range(rng.integers(0, 6)):
        name, branch = rng.choice(["fork", "fork", "join", "join", "cancel"]), int(rng.integers(1, 4))
        after = int(rng.integers(0 if name == "fork" else 1, most))
        texts = tuple(tokens(rng.integers(0, 3)) for _ in range(rng.integers(1, 3)))
        if name == "join":
            joined = tuple(range(1, 1 + int(rng.integers(1, 4))))[:: rng.choice([1, -1])]
            ops.append(Op(name, joined, after, (tokens(rng.integers(1, 3)),)))
        else:
            ops.append(Op(name, (branch,), after, texts))
    sampling = Sampling(1.0, top_k=9, repetition_penalty=1.2, seed=int(rng.integers(9))) if sampled else Sampling()
    options = dict(branches=n, further=further, most_tokens=most, sampling=sampling, stop=tokens(rng.integers(0, 2)))
    return Script(begin + decoding.tokens(rng, rng.integers(1, longest)), options, ops)


class Place(NamedTuple):
    """A token of a full pass."""

    time: int
    branch: int  # 0: of the prompt
    token: int


def laid(prompt: list[int], texts: dict[int, Text]) -> dict[Place, int]:
    """All tokens of a request, by time and branch, with the index of each; a branch keeps its place after its end."""
    index, found = len(prompt), {Place(time, 0, token): time for time, token in enumerate(prompt)}
    begun = {branch: text for branch, text in texts.items() if text.begin is not None}
    for time in range(len(prompt), max(text.end for text in begun.values())):
        for branch, text in begun.items():
            if text.begin <= time:
                if time < text.end:
                    found[Place(time, branch, text.tokens[time - text.begin])] = index
                index += 1
    return found


def past(branch: int, texts: dict[int, Text], places) -> set[Place]:
    """Its own tokens and those that it goes on from, prompt and all, however often these forked and joined."""
    own = {place for place in places if place.branch in (0, branch)}
    text = texts[branch]
    return own.union(*({p for p in past(s, texts, places) if p.time < text.begin} for s in text.sources))


def sees(rule: str, texts: dict[int, Text], places: dict[Place, int]) -> np.ndarray:
    """bool [T, T], of a token each that it sees."""
    pasts = {branch: past(branch, texts, places) for branch in texts if texts[branch].begin is not None}
    pasts[0] = {place for place in places if place.branch == 0}
    shows = {
        "own_branch": lambda q, k: k in pasts[q.branch] and k.time <= q.time,
        "all_branches": lambda q, k: k.time < q.time or k is q,
        "causal": lambda q, k: places[k] <= places[q],
    }[rule]
    return np.array([[shows(q, k) for k in places] for q in places])


@functools.cache
def full_pass(variant: str, **overrides):
    """(tokens, coordinates, who sees whom [1, T, T]) -> logits of one pass; the mask is the one that is given."""
    model = decoding.built(variant, **overrides, run__implementation="reference")
    program = jax.jit(
        lambda model, tokens, at, mask: model.extend(tokens, at, model.init_cache(1, LENGTH), limits=mask)[0]
    )

    def run(tokens, at, mask):
        before, reference.visible = reference.visible, lambda rule, q, k, limits: limits
        try:
            return np.asarray(program(model, tokens, at, mask))[0]
        finally:
            reference.visible = before

    return run


def short_of_the_best(variant: str, prompt: list[int], texts: dict[int, Text], **overrides) -> float:
    """By how much the logit of a generated token misses the largest at most."""
    rule, places = str(variants.config(variant, **overrides).model.rule), laid(prompt, texts)
    T = len(places)
    at, held, mask = (
        Coordinates.padding(1, LENGTH).map(np.copy),
        np.zeros((1, LENGTH), np.int32),
        np.eye(LENGTH)[None] > 0,
    )
    at.segment[0, :T], at.index[0, :T] = 0, list(places.values())
    at.time[0, :T], at.branch[0, :T], held[0, :T] = np.array(list(places)).T
    mask[0, :T, :T] = sees(rule, texts, places)
    z = full_pass(variant, **overrides)(held, at, mask)
    return largest_miss(z, texts, {(place.time, place.branch): i for i, place in enumerate(places)})


def largest_miss(z, texts: dict[int, Text], where: dict[tuple[int, int], int]) -> float:
    """The same of logits [T, C] of tokens at these (time, branch)."""
    missing = [0.0]
    for branch, text in texts.items():
        for i, token in enumerate(text.tokens):
            if i >= text.given:
                before, time = branch, text.begin + i - 1
                while (time, before) not in where:  # what it goes on from has the token before
                    before = texts[before].sources[0] if before and texts[before].sources else 0
                missing.append(z[where[time, before]].max() - z[where[time, before], token])
    return max(missing)


def short_on_its_own(variant: str, prompt: list[int], texts: dict[int, Text]) -> float:
    """The same of a model under own_branch that has no use for the number of a branch: each is a text of its own."""
    model, missing = decoding.built(variant), [0.0]
    for text in texts.values():
        if text.begin is None or len(text.tokens) == text.given:
            continue
        line, own = list(text.tokens), text
        while own.sources:
            source = texts[own.sources[0]]
            line, own = source.tokens[: own.begin - source.begin] + line, source
        held, at = decoding.row(prompt, {1: line}, LENGTH)
        z = np.asarray(decoding.full_pass()(model, held, at))[0]
        first = text.begin + text.given
        missing += [z[t - 1].max() - z[t - 1, text.tokens[t - text.begin]] for t in range(first, text.end)]
    return max(missing)
