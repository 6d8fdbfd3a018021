"""Position maps: how the times that rotary pairs turn by change beyond the length L that a model was trained to.

i is the time of a query, j that of a key; L is position.trained, and N the tokens of a row. A map is a function of
config.model.position to pieces: disjoint sets of pairs, and the times by which each turns.
"""

import bisect
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import NamedTuple

from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels.expressions import Range, Rule, Term, k, maximum, minimum, q, term
from lab.options import Option

EXACT = 2**24  # whole numbers up to it are exact in float32

LONGEST = 2**24  # tokens, which float32 still counts one by one

WINDOW = {"window": Option(0, "time steps within which distances are true; 0: position.trained", least=0, most=LONGEST)}
SINKS = {"sinks": Option(4, "first time steps, which every token sees", least=0, most=LONGEST)}
HYBRID = {
    "cf": Option(2.0, "by which positions beyond position.trained are divided", least=1, most=64),
    "rounding": Option("none", "of positions beyond it", choices=("none", "floor", "round")),
}
LEAKY = {"leak": Option(8.0, "by which distances beyond the window are divided", least=1, most=64)}
GROUPS = {"group": Option(8, "time steps beyond the window that share a position", least=1, most=LONGEST)}
CHUNKS = {
    "chunk": Option(0, "the longest distance at which pairs rotate; 0: 3/4 of position.trained", least=0, most=LONGEST),
    "local": Option(0, "time steps by which chunks are shorter; 0: position.trained // 16", least=0, most=LONGEST),
}


class Turns(NamedTuple):
    """Pairs that turn alike: who they are (None: all), the times of query and key, over a whole number."""

    inside: Rule | None
    q_time: Term
    k_time: Term
    over: int = 1


class PositionMap(NamedTuple):
    """pieces: of config.model.position, which pairs turn by which times; they are disjoint. reach: of (position, N),
    one past the longest distance at which a row of N tokens turns. seen: the pairs that it does not hide; None: all.
    trained: whether it needs position.trained. window: whether it needs a window, or position.trained instead. most:
    the tokens of the longest row that turns at trained distances alone, of a map that is made to; None: it has no end,
    or was not to."""

    pieces: Callable[..., list[Turns]]
    options: Mapping[str, Option] = {}
    reach: Callable[..., float] = lambda position, N: N
    seen: Callable[..., Rule] | None = None
    trained: bool = False
    window: bool = False
    most: Callable[..., int] | None = None


def nearer(w: int) -> Rule:
    """Pairs less than w time steps apart, and keys that are later."""
    return q.time - k.time < w


def farther(w: int) -> Rule:
    """The others."""
    return q.time - k.time >= w


def no_map(position) -> list[Turns]:
    """True times."""
    return [Turns(None, q.time, k.time)]


def ratio(field: str, value: float) -> Fraction:
    """A number of config.model.position.map as a ratio of small whole numbers, which times stay whole with."""
    found = Fraction(value).limit_denominator(20)
    if abs(float(found) - value) > 1e-6 * value:
        raise UserError(
            f"model.position.map.{field} = {value!r} is no ratio of whole numbers over at most 20; choose one"
        )
    return found


def hybrid(position) -> list[Turns]:
    """g(p) = p up to L, then L + (p - L) / cf: interpolation of what lies beyond the trained length alone."""
    return [Turns(None, *(compressed(time, position) for time in (q.time, k.time)), over_of(position))]


def over_of(position) -> int:
    """What `compressed` times are whole numbers over."""
    return ratio("cf", position.map.cf).numerator if position.map.rounding == "none" else 1


def compressed(time: Term, position) -> Term:
    """g, times `over_of`."""
    cf, L = ratio("cf", position.map.cf), position.trained
    whole = minimum(time, L) * cf.numerator + maximum(time - L, 0) * cf.denominator
    match position.map.rounding:
        case "floor":
            return whole // cf.numerator
        case "round":
            return (whole * 2 + cf.numerator) // (2 * cf.numerator)
    return whole


def hybrid_reach(position, N: int) -> float:
    """g(N)."""
    return min(N, position.trained) + max(N - position.trained, 0) / position.map.cf


def window_of(position) -> int:
    """w."""
    return position.map.window or position.trained


def rerope(position) -> list[Turns]:
    """Distances min(i - j, w) (kexue.fm/archives/9708): exact below w."""
    return clamped(window_of(position))


def clamped(w: int) -> list[Turns]:
    """Distances min(i - j, w)."""
    return [Turns(nearer(w), q.time, k.time), Turns(farther(w), term(w), term(0))]


def leaky(position) -> list[Turns]:
    """Leaky ReRoPE: distances beyond w are w + (i - j - w) / leak."""
    leak, w = ratio("leak", position.map.leak), window_of(position)
    a, b = leak.numerator, leak.denominator
    return [Turns(nearer(w), q.time, k.time), Turns(farther(w), q.time * b + w * (a - b), k.time * b, a)]


def self_extend(position) -> list[Turns]:
    """Distances from W on are i // G - j // G + W - W // G (arXiv 2401.01325, equation 4)."""
    W, G = window_of(position), position.map.group
    return [Turns(nearer(W), q.time, k.time), Turns(farther(W), q.time // G + (W - W // G), k.time // G)]


def self_extend_most(position) -> int:
    """(L - W) G + W."""
    W = window_of(position)
    return (position.trained - W) * position.map.group + W


def chunks_of(position) -> tuple[int, int]:
    """(c, tokens of a chunk)"""
    c = position.map.chunk or 3 * position.trained // 4
    return c, c - (position.map.local or position.trained // 16)


def dca(position) -> list[Turns]:
    """Dual chunk attention (arXiv 2402.17463): in chunks of l, keys turn by j mod l; queries of the same chunk by
    i mod l, of the next one by min(i mod l + l, c), of later ones by min(2l - 1, c)."""
    c, size = chunks_of(position)
    later, key = q.time // size - k.time // size, k.time % size
    return [
        Turns(later == 0, q.time % size, key),
        Turns(later == 1, minimum(q.time % size + size, c), key),
        Turns((later < 0) | (later > 1), term(min(2 * size - 1, c)), key),
    ]


def sinks_and_window(position) -> Rule:
    """The first tokens and those of a window."""
    return nearer(window_of(position)) | (k.time < position.map.sinks)


def lm_infinite(position) -> list[Turns]:
    """The same tokens at distances min(i - j, L) (arXiv 2308.16137)."""
    return clamped(position.trained)


def streaming(position) -> list[Turns]:
    """The same tokens as if they lay in a cache one after another, and turned by their places there.

    The window keeps its distances, and no query is farther from the first token than sinks + window - 1 (arXiv
    2309.17453, section 3.2).
    """
    sinks, w = position.map.sinks, window_of(position)
    return [
        Turns(nearer(w), q.time, k.time),
        Turns(farther(w), minimum(q.time, sinks + w - 1), k.time),
    ]


POSITION_MAPS = {
    "none": PositionMap(no_map),
    "hybrid": PositionMap(hybrid, HYBRID, hybrid_reach, trained=True),
    "rerope": PositionMap(rerope, WINDOW, lambda position, N: min(N, window_of(position) + 1), window=True),
    "leaky": PositionMap(
        leaky, WINDOW | LEAKY,
        lambda position, N: min(N, w := window_of(position)) + max(N - w, 0) / position.map.leak, window=True
    ),
    "self-extend": PositionMap(
        self_extend, WINDOW | GROUPS,
        lambda position, N: min(N, w := window_of(position)) + max(N - w, 0) / position.map.group, window=True,
        most=self_extend_most,
    ),
    "dca": PositionMap(dca, CHUNKS, lambda position, N: min(N, chunks_of(position)[0] + 1), trained=True),
    "lm-infinite": PositionMap(
        lm_infinite, SINKS | WINDOW, lambda position, N: min(N, position.trained + 1), sinks_and_window,
        trained=True, window=True,
    ),
    "streaming": PositionMap(
        streaming, SINKS | WINDOW, lambda position, N: min(N, position.map.sinks + window_of(position)),
        sinks_and_window, window=True,
    ),
}  # fmt: skip


def check(position) -> None:
    """Refuses numbers that do not go together, and the lack of one."""
    chosen, name = position.map, position.map.name
    row = POSITION_MAPS[name]
    if (row.trained or (row.window and not chosen.window)) and position.trained < 2:
        raise untrained(position, f"map.name = {name!r}")
    if name == "self-extend" and window_of(position) % chosen.group:
        raise UserError(
            f"model.position.map.window = {window_of(position)} of model.position.map.name = 'self-extend' is not "
            f"divisible by model.position.map.group = {chosen.group}; choose one that is"
        )
    if name == "dca":
        c, size = chunks_of(position)
        if not 1 <= size < c:
            raise UserError(
                f"model.position.map.chunk = {chosen.chunk} and local = {chosen.local} of model.position.trained = "
                f"{position.trained} make chunks of {size} tokens at distances up to {c}; choose a longer chunk, and a "
                "local that is between 1 and it"
            )
    row.pieces(position)  # refuses numbers that are no ratios
    if name == "hybrid" and position.trained * ratio("cf", chosen.cf).numerator * 2 > EXACT:
        raise UserError(
            f"model.position.map.cf = {chosen.cf} is {ratio('cf', chosen.cf)}, and positions of "
            f"model.position.trained = {position.trained} times that are no exact numbers; choose a ratio of smaller "
            "whole numbers"
        )


def check_times(position, made: str, times: int) -> None:
    """Refuses so many time steps that mapped times are no whole numbers of float32, let alone of int32. made: the
    fields that make them as many."""
    if largest_time(position, times) <= EXACT:
        return
    fits = bisect.bisect_left(range(1, times), True, key=lambda n: largest_time(position, n) > EXACT)
    raise UserError(
        f"{made}: model.position.map.name = {position.map.name!r} makes of {times} time steps numbers up to "
        f"{largest_time(position, times)}, above {EXACT}, to which float32 counts; choose at most {fits} of them, or "
        f"ratios of smaller whole numbers for: {', '.join(sorted(POSITION_MAPS[position.map.name].options))}"
    )


def largest_time(position, times: int) -> int:
    """The largest whole number, in size, among the mapped times of `times` time steps, before they are divided."""
    at = Coordinates(*[Range(0, times - 1)] * 4)
    sides = [time for turns in POSITION_MAPS[position.map.name].pieces(position) for time in turns[1:3]]
    return max(abs(int(end)) for time in sides for end in time.value_range(at, at))


def check_reach(position, made: str, tokens: int) -> None:
    """Refuses rows of so many tokens where the map reaches no further than fewer."""
    row = POSITION_MAPS[position.map.name]
    most = row.most(position) if row.most and position.trained else tokens
    if tokens > most:
        raise UserError(
            f"{made}: model.position.map.name = {position.map.name!r} reaches {most} tokens of model.position.trained "
            f"= {position.trained}; ask of no more, or choose a larger group or a smaller window"
        )


def untrained(position, named: str) -> UserError:
    """That a method lacks the trained length."""
    return UserError(
        f"model.position.trained = {position.trained}, the length that the model was trained to, is needed by "
        f"model.position.{named}; choose at least 2"
    )
