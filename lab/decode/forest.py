"""Where the texts of a row lie in the cache, and who sees whom: prompts stored once, pages of slots, lanes of branches.

A row of S slots is cut into pages. A page belongs to one stem of a prompt, or to one branch of a request: to all of
them where there are few, or the rules of the model show them to each other. So what a branch sees lies in whole tiles
of its own request, in its own order, whatever else is in the row. A row also has N lanes: the branches of its
requests, each with a place in a step of decoding. Lanes and stems are the M nodes of a table that says how far one
sees another (`lab.kernels.rules.forked`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lab.decode.request import PAGE, Request, own_tokens
from lab.kernels.rules import ENDLESS, HIDDEN
from lab.kernels.tiles import FEW, WIDE, WIDE_FROM, key_tile


@dataclass(eq=False)
class Stem:
    """Of a prompt: whole pages of tokens, or its last, which follow those of the stem before."""

    before: "Stem | None"
    branch: int  # 0, or 1 of a single text
    tokens: tuple[int, ...]
    start: int  # the time of the first
    pages: list[int]
    node: int
    filled: int = 0  # tokens that are in the cache
    users: int = 0  # requests

    @property
    def full(self) -> bool:
        return self.filled == len(self.tokens)

    @property
    def key(self) -> tuple:
        return self.before, self.branch, self.tokens


class Forest:
    """What a row of the cache holds. apart: whether a request has it to itself, as states of its branches have."""

    def __init__(self, slots: int, page: int, lanes: int, apart: bool):
        self.apart, self.page, pages = apart, page, slots // page
        self.lanes, self.pages = list(range(lanes)), list(range(pages))  # that are free
        self.stems: dict[tuple, Stem] = {}
        self.requests: list[Request] = []
        self.first_stem = lanes  # the node of a stem is this and its first page
        self.limits = np.full((lanes + pages, lanes + pages), HIDDEN, np.int32)

    def found(self, made: Request) -> list[Stem]:
        """The stems of its prompt that are here, from the first on."""
        found, before = [], None
        for tokens in made.pieces:
            if (stem := self.stems.get((before, int(made.alone), tokens))) is None:
                break
            found.append(stem)
            before = stem
        return found

    def takes(self, made: Request) -> bool:
        """Whether there is room for it now."""
        if self.apart and self.requests:
            return False
        new = made.pieces[len(self.found(made)) :]
        needed = sum(pages_of(tokens, self.page) for tokens in (*map(len, new), *made.owns))
        return needed <= len(self.pages) and len(made.branches) + made.further <= len(self.lanes)

    def put(self, made: Request) -> None:
        """Gives it its lanes and pages, and stems of its prompt to those that are here."""
        made.stems = self.found(made)
        start = sum(len(stem.tokens) for stem in made.stems)
        for tokens in made.pieces[len(made.stems) :]:
            before = made.stems[-1] if made.stems else None
            held = self.free(self.pages, pages_of(len(tokens), self.page))
            stem = Stem(before, int(made.alone), tokens, start, held, self.first_stem + held[0])
            made.stems.append(stem)
            self.stems[stem.key] = stem
            self.limits[stem.node] = HIDDEN
            self.limits[stem.node, [each.node for each in made.stems]] = ENDLESS
            start += len(tokens)
        for stem in made.stems:
            stem.users += 1
        made.pages = [self.free(self.pages, pages_of(own, self.page)) for own in made.owns]
        made.lanes = self.free(self.lanes, len(made.branches) + made.further)
        self.requests.append(made)
        self.see(made)

    def see(self, made: Request) -> None:
        """What its branches see: its prompt, each other as the rule says, and what they go on from as their own."""
        self.limits[made.lanes] = HIDDEN
        self.limits[np.ix_(made.lanes, made.lanes)] = -1
        self.limits[np.ix_(made.lanes, [stem.node for stem in made.stems])] = ENDLESS
        for b in made.branches:
            lane = made.lanes[b.rank]
            if b.sources and b.begin is not None:
                past = [self.limits[made.lanes[source.rank]] for source in b.sources]
                self.limits[lane] = np.minimum(np.max(past, axis=0), b.begin - 1)
            self.limits[lane, lane] = ENDLESS

    def remove(self, made: Request) -> list[int]:
        """Takes a request out. Returns the pages that nobody has now."""
        self.requests.remove(made)
        left = [page for pages in made.pages for page in pages]
        for stem in made.stems:
            stem.users -= 1
            if not stem.users:
                del self.stems[stem.key]
                left = left + stem.pages
        self.pages, self.lanes = sorted(self.pages + left), sorted(self.lanes + made.lanes)
        return left

    def slot(self, held: list[int], place: int) -> int:
        """Of the token in a place 0, 1, ... of these pages."""
        return held[place // self.page] * self.page + place % self.page

    @staticmethod
    def free(among: list[int], count: int) -> list[int]:
        """The first that are free, no longer so."""
        taken = among[:count]
        del among[:count]
        return taken


def pages_of(tokens: int, page: int) -> int:
    """That hold so many."""
    return -(-tokens // page)


def row_of(length: int, branches: int, chunk: int) -> tuple[int, int, int]:
    """(slots of a row, of a page, tokens of a stem of a prompt) of an engine that was asked for so many slots: pages
    are whole tiles of keys. A row of one branch has one request, so that its tiles may have several pages."""
    least = max(length, chunk)
    page = max(PAGE, key_tile(branches, whole(least, WIDE))) if branches > 1 else PAGE
    return whole(least, WIDE if branches == 1 and length > WIDE else page), page, whole(chunk, page)


def whole(count: int, of: int) -> int:
    """The least multiple of `of` that is no less than a count."""
    return of * -(-count // of)


def needed(shared: int, own: Sequence[int], unit: int, page: int) -> int:
    """Slots that a request takes of an empty row: of its prompt, and of own tokens that lie together."""
    stems, rest = divmod(shared, unit)
    return stems * whole(unit, page) + sum(whole(tokens, page) for tokens in (rest, *own))


def needed_for(
    prompt: int, texts: Sequence[int], most_tokens: int, unit: int = PAGE, page: int = 0, own_pages: bool = True
) -> int:
    """The same of a prompt of so many tokens, and branches that begin with so many; of one text with it if of none.

    unit, page, own_pages: those of an engine; with page = 0 it is enough for any that takes chunks of `unit` tokens.
    """
    each = [given + most_tokens for given in texts]

    def slots(page: int, own_pages: bool) -> int:
        own = own_tokens(each, int(prompt > 0), own_pages) if texts else [most_tokens]
        return needed(max(prompt - 1, 0), own, whole(unit, page), page)

    if page:
        return slots(page, own_pages)
    least = slots(PAGE, True)
    # Less than half of the least row that has wide pages fits into it, whatever they leave empty.
    return max(least, slots(WIDE, False)) if len(texts) <= FEW and 2 * least >= WIDE_FROM else least
