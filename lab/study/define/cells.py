"""The cells of a study as data: plain overrides of one base config, made by combinators.

An override is a tuple of (field, value) pairs; combinators take and give tuples of overrides:
product(vary("model.position.ratio", (0.0, 1.0)), vary("data.draw", ("fixed1", "1-15"))) is four cells.
"""

import itertools

from lab.errors import UserError

Override = tuple[tuple[str, object], ...]
NAME = "name"  # a pair of this field names an override; labels may show it like any other field
ASIDE = ("run", "evaluate", "study")  # rooms of the config that say nothing of what a cell is
MATCH = "match"  # a pair of this field asks for a field to be solved: see `matched`
RUNG = "rung"  # a pair of this field names the rung of study.rungs that a cell stands on: see `laid`
PSEUDO = (NAME, MATCH, RUNG)  # no fields of a config


def vary(field: str, values) -> tuple[Override, ...]:
    """One override for each value of a field."""
    return tuple(((field, value),) for value in values)


def product(*groups: tuple[Override, ...]) -> tuple[Override, ...]:
    """Every combination, the last group fastest."""
    return tuple(_joined(combination) for combination in itertools.product(*groups))


def chain(*groups: tuple[Override, ...]) -> tuple[Override, ...]:
    """One group after another."""
    return tuple(itertools.chain(*groups))


def zipped(*groups: tuple[Override, ...]) -> tuple[Override, ...]:
    """The first of each group together, the second of each, ...; the groups are equally long."""
    return tuple(_joined(row) for row in zip(*groups, strict=True))


def named(name: str, *pairs: tuple[str, object]) -> tuple[Override, ...]:
    """One override of several fields under a name."""
    return (((NAME, name), *pairs),)


def matched(group: tuple[Override, ...], *, to, on: str, by: str, multiple: int = 1) -> tuple[Override, ...]:
    """The overrides, each matched to another cell: the multiple of `multiple` that brings `on` nearest is found for the
    integer field `by`. matched(named("mha", ...), to="base", on="parameters", by="model.feedforward.width", multiple=8)

    to: the name of a cell, or pairs (label, value) that the other cell has instead of this one's.
    on: parameters | train_flops (of a token) | cache (of a token, all layers).
    """
    match = (("to", to), ("on", on), ("by", by), ("multiple", multiple))
    return tuple((*override, (MATCH, match)) for override in group)


def laid(group: tuple[Override, ...], rungs: tuple[tuple[str, Override], ...]) -> tuple[Override, ...]:
    """Every override at every rung (name, pairs), rung by rung; without rungs as they are.

    Raises UserError for a rung without a name of its own, and for a field that a rung and a cell set both.
    """
    names = [name for name, _ in rungs]
    for name in names:
        if not name.strip() or names.count(name) > 1:
            raise UserError(f"study.rungs has {name!r} twice, or no name; names must differ: {', '.join(names)}")
    rows = tuple(((RUNG, name), *pairs) for name, pairs in rungs)
    return product(rows, group or ((),)) if rungs else group


def _joined(overrides) -> Override:
    names = [value for override in overrides for field, value in override if field == NAME]
    pairs = [pair for override in overrides for pair in override if pair[0] != NAME]
    fields = [field for field, _ in pairs if field != MATCH]
    for field in fields:
        if fields.count(field) > 1:
            raise UserError(f"a cell sets {field} twice: {[value for name, value in pairs if name == field]}")
    return ((NAME, ",".join(names)), *pairs) if names else tuple(pairs)
