"""Who may see whom, written once as comparisons of query and key coordinates (lab.kernels.expressions).

`attend` itself adds that query and key share a segment that is not padding; rules speak of the rest.
"""

import ast
import inspect
import warnings

import numpy as np

from lab.coordinates import Coordinates
from lab.errors import UserError, choose
from lab.kernels.expressions import ENDLESS, HIDDEN, Range, Rule, Term, k, limit, maximum, minimum, q

__all__ = [
    "ENDLESS", "HIDDEN", "RULES", "SIZED", "Range", "Rule", "Term", "all_branches", "block", "causal", "every", "fixed",
    "forked", "k", "limit", "maximum", "mean_visible_keys", "minimum", "own_branch", "pairs_visible", "parse", "q",
    "shows_later", "shows_others", "strided", "summary", "visible", "window",
]  # fmt: skip

causal = k.index <= q.index
all_branches = (k.time < q.time) | (k.index == q.index)  # every branch, strictly earlier; and the token itself
own_branch = ((k.branch == 0) | (k.branch == q.branch)) & (k.time <= q.time)  # the prompt and the token's own branch


def forked(rule: Rule) -> Rule:
    """The rule where texts fork and join, and several share a prompt: by the table that `attend` is given as `limits`.

    A limit is of two nodes, the query's and the key's. HIDDEN: it sees nothing of the other, whatever the rule. -1: it
    sees what the rule shows of another branch. A time: up to then the other's tokens are the query's own past, as if
    they were of its own branch: ENDLESS is its own node's. Where a rule compares branches, it asks for that instead.
    """
    shown = rule
    for own in (k.branch == q.branch, q.branch == k.branch):
        shown = shown.replaced(own.tree, (k.time <= limit).tree)
    return (limit > HIDDEN) & shown


def shows_others(rule: Rule) -> bool:
    """Whether it may show a branch what another, which is not the prompt, has of its own."""
    among = lambda low, high: Range(np.array([[low]]), np.array([[high]]))  # noqa: E731
    numbers, limits = among(0, LARGEST), np.array([[ENDLESS, -1], [-1, ENDLESS]])
    of = lambda node: Coordinates(among(0, 0), among(1, LARGEST), numbers, numbers, among(node, node))  # noqa: E731
    return bool(np.any(forked(rule).visible_range(of(0), of(1), limits=limits).high))


def window(n: int) -> Rule:
    """Keys less than n time steps before the query."""
    if n < 1:
        raise UserError(f"window({n}) sees nothing; choose a length of at least 1")
    return q.time - k.time < n


def every(n: int) -> Rule:
    """Keys a multiple of n time steps away: the second half of `strided`, for a layer of its own."""
    _check("every", n)
    return q.time % n == k.time % n


def block(n: int) -> Rule:
    """Keys of the query's own block of n time steps: the first half of `fixed`, for a layer of its own."""
    _check("block", n)
    return q.time // n == k.time // n


def summary(n: int, c: int) -> Rule:
    """The last c of every n time steps, which stand for the others: the second half of `fixed`.

    A query of the first n - c steps sees none under causal: its output is zero.
    """
    _check("summary", n, c)
    return k.time % n >= n - c


def strided(n: int) -> Rule:
    """The last n time steps, and every n-th before: strided attention of the Sparse Transformer, n near sqrt(length).

    arXiv 1904.10509, section 4.2: the union of both parts. Like a window it hides nothing that is later.
    """
    _check("strided", n)
    return window(n) | every(n)


def fixed(n: int, c: int) -> Rule:
    """The block of n time steps, and the last c steps of every block (arXiv 1904.10509, section 4.2)."""
    _check("fixed", n, c)
    return block(n) | summary(n, c)


def _check(name: str, n: int, c: int | None = None) -> None:
    if n < 1:
        raise UserError(f"{name} has n = {n} time steps; choose at least 1")
    if c is not None and not 1 <= c <= n:
        raise UserError(f"{name} keeps c = {c} of n = {n} time steps; choose 1 to {n}")


RULES = {"causal": causal, "all_branches": all_branches, "own_branch": own_branch}
SIZED = {  # name -> a function of whole numbers to a rule
    "window": window,
    "strided": strided,
    "fixed": fixed,
    "every": every,
    "block": block,
    "summary": summary,
}
DEEPEST = 64  # levels of a spelled rule
LARGEST = 2**29  # of its numbers: two of them still add up within int32


def parse(text: str) -> Rule:
    """The rule that a config spells: names of RULES, calls of SIZED such as window(128), &, | and parentheses.

    As in Python & binds tighter than |. Raises UserError, in one line, for all else.
    """
    spelled = " ".join(text.split())
    if not spelled or "#" in spelled:
        raise _unread(text, "has a comment" if spelled else "names no rule")
    try:
        with warnings.catch_warnings(action="ignore"):  # Python doubts some of what is refused below
            return _rule(ast.parse(spelled, mode="eval").body, text, DEEPEST)
    except (RecursionError, MemoryError):
        raise _unread(text, "is nested too deep") from None
    except (SyntaxError, ValueError) as error:
        raise _unread(text, f"does not parse ({_shown(getattr(error, 'msg', None) or str(error))})") from None


def _rule(node: ast.expr, text: str, levels: int) -> Rule:
    if not levels:
        raise _unread(text, f"is nested too deep: beyond {DEEPEST} levels")
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _rule(left, text, levels - 1) & _rule(right, text, levels - 1)
        case ast.BinOp(left, ast.BitOr(), right):
            return _rule(left, text, levels - 1) | _rule(right, text, levels - 1)
        case ast.Name(name) if name in SIZED:
            raise _unread(text, f"leaves {name!r} without its number")
        case ast.Name(name):
            return RULES[choose("model.rule", name, _spellings())]
        case ast.Call(ast.Name(name)) if name in RULES:
            raise _unread(text, f"calls {name!r}, which takes no numbers")
        case ast.Call(ast.Name(name)) if name in SIZED:
            return _sized(node, text)
        case ast.Call(ast.Name()):
            choose("model.rule", _shown(ast.unparse(node)), _spellings())
    raise _unread(text, f"has {_shown(ast.unparse(node))!r}, which is no rule")


def _sized(call: ast.Call, text: str) -> Rule:
    name, given = call.func.id, [*call.args, *call.keywords]
    numbers = [argument.value for argument in given if isinstance(argument, ast.Constant)]
    takes = len(inspect.signature(SIZED[name]).parameters)
    if not len(given) == len(numbers) == takes or not all(type(number) is int for number in numbers):
        count = "one whole number" if takes == 1 else f"{takes} whole numbers"
        raise _unread(text, f"has {_shown(ast.unparse(call))!r}, and {name!r} takes {count}")
    if max(numbers) > LARGEST:
        raise _unread(text, f"gives {name!r} a number above {LARGEST}")
    try:
        return SIZED[name](*numbers)
    except UserError as refused:
        raise UserError(f"model.rule = {_shown(text)!r}: {refused}") from None


def _spellings() -> list[str]:
    return [*RULES, *(f"{name}({', '.join(inspect.signature(rule).parameters)})" for name, rule in SIZED.items())]


def _shown(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _unread(text: str, why: str) -> UserError:
    return UserError(
        f"model.rule = {_shown(text)!r} {why}; join {', '.join(_spellings())} by & and |, as in "
        "own_branch & window(128)"
    )


def visible(rule: Rule, q: Coordinates, k: Coordinates, limits=None):
    """What `attend` lets pass, bool [..., T, S] for q [..., T], k [..., S]: same segment, no padding, and the rule.

    limits: int32 [..., M, M], where the rule is `forked`.
    """
    return pairs_visible(rule, q.map(lambda x: x[..., :, None]), k.map(lambda x: x[..., None, :]), limits)


def pairs_visible(rule: Rule, q: Coordinates, k: Coordinates, limits=None):
    """`visible` of coordinates that broadcast against each other."""
    return (q.segment == k.segment) & (q.segment >= 0) & rule.visible(q, k, limits)


def shows_later(rule: Rule, coordinates: Coordinates) -> bool:
    """Whether some token sees a later one of its own branch, which is what it learns to predict; coordinates [B, T]."""
    q, k = coordinates.map(lambda x: x[..., :, None]), coordinates.map(lambda x: x[..., None, :])
    return bool(np.any(pairs_visible(rule, q, k) & (q.branch == k.branch) & (q.time < k.time)))


def mean_visible_keys(rule: Rule, coordinates: Coordinates, pairs: int = 2**22) -> float:
    """Mean number of keys that a token which is not padding sees, counted exactly; numpy coordinates [B, T].

    pairs: of queries and keys, that are held at once.
    """
    seen = tokens = 0
    block = max(1, pairs // coordinates.shape[1])
    for row in range(coordinates.shape[0]):
        keys = coordinates.map(lambda x, row=row: x[row])
        for start in range(0, coordinates.shape[1], block):
            queries = keys.map(lambda x, start=start: x[start : start + block])
            seen += int(np.sum(visible(rule, queries, keys)))
            tokens += int(np.sum(queries.segment >= 0))
    return seen / max(tokens, 1)
