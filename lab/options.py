"""Options of a config. Each is declared once, by the table entry that reads it, with its default and its meaning.

A Room is a part of the config, such as model or train: options of its own, and Parts, each filled by one entry of a
table. An entry says what it reads in `options`, {name: Option}. It may also have `reads`, names of other options of the
room that it needs, `replaces`, names of those that mean nothing beside it, and `idle`, a function of the room's values
to {name of an option that means nothing: that beside whose value it does not}. What is set and not read is refused.
"""

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lab.errors import SHOWN, UserError, choose, shown

LARGEST = 2**31 - 1  # int32: what arrays of coordinates, tokens and seeds are made of


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of a config.

    kind: its type as typing spells it, such as tuple[tuple[str, str], ...]; None: that of the default. choices: all
    valid values, or those of every item of a tuple. least, most: inclusive bounds of a number, or of every number of a
    tuple; above, below: exclusive ones. infinite: whether inf is one. Every number has a range, and holds it in int32
    or float32 too.
    """

    default: Any
    meaning: str
    kind: Any = None
    choices: tuple | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    infinite: bool = False

    def check(self, name: str, value) -> None:
        """Raises UserError, naming the value and the valid ones."""
        kind = self.kind or type(self.default)
        if not fits(value, kind):
            raise UserError(
                f"{name} = {shown(value)} is no {spelled(kind)}: {self.meaning}; the default is {self.default!r}"
            )
        if self.choices is not None:
            for one in value if isinstance(value, tuple) else (value,):
                choose(name, one, self.choices)
        for number in _numbers(value) if numbers_in(self) else ():
            self._check_number(f"{name} = {shown(value)}{f': {shown(number)}' * isinstance(value, tuple)}", number)

    def _check_number(self, told: str, value: int | float) -> None:
        if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
            raise UserError(f"{told} must be within {LARGEST}, as int32 is: {self.meaning}")
        computed = value if isinstance(value, int) else _as_float32(value)
        if math.isnan(value) or (math.isinf(computed) and not self.infinite):
            also = "" if computed == value or math.isnan(value) else f" is {computed} in float32, and"
            raise UserError(f"{told}{also} must be a finite number: {self.meaning}")
        for bound, words, holds in (
            (self.least, "at least", operator.ge),
            (self.above, "above", operator.gt),
            (self.most, "at most", operator.le),
            (self.below, "below", operator.lt),
        ):
            if bound is not None and not holds(value, bound):
                raise UserError(f"{told} must be {words} {bound}: {self.meaning}")
            if bound is not None and not holds(computed, bound):
                raise UserError(f"{told} is {computed} in float32, and must be {words} {bound}: {self.meaning}")


def _as_float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def numbers_in(option: Option) -> set[type]:
    """int and float, as far as the type of an option has them."""
    kinds, found = [option.kind or type(option.default)], set()
    while kinds:
        kind = kinds.pop()
        kinds += typing.get_args(kind)
        found |= {kind} & {int, float}
    return found


def _numbers(value) -> list[int | float]:
    """Those of a value, however deep in its tuples."""
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def fits(value, kind) -> bool:
    """Whether a value is of a type as typing spells it. Whole numbers are floats too; truth values are no numbers; an
    object is what a field of a config may hold: a word, a number, a truth value, None, or a tuple of such."""
    if kind is Any:
        return True
    if kind is object:
        plain = value is None or isinstance(value, str | int | float)
        return plain or (isinstance(value, tuple) and all(fits(item, object) for item in value))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        *fixed, last = typing.get_args(kind)
        if not isinstance(value, tuple):
            return False
        if last is Ellipsis:
            return all(fits(item, fixed[0]) for item in value)
        return len(value) == len(fixed) + 1 and all(map(fits, value, (*fixed, last)))
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def spelled(kind) -> str:
    """A type in words: int; tuple ((str, str), ...)."""
    if typing.get_origin(kind) is tuple:
        return f"tuple {_shape(kind)}"
    return _shape(kind)


def _shape(kind) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"({', '.join('...' if one is Ellipsis else _shape(one) for one in arguments)})"
    return " or ".join(map(_shape, arguments)) if arguments else {Any: "anything"}.get(kind) or kind.__name__


class Part(NamedTuple):
    """A place that one entry of a table fills. field: names the entry. at: stands before the names of the entries'
    options; {} in it is the entry's name, so that the options of two entries cannot collide."""

    field: str
    table: Mapping[str, Any]
    default: str
    meaning: str
    at: str

    def options(self, entry: str) -> dict[str, Option]:
        """Those of an entry, by their names in the room."""
        return {self.at.format(entry) + name: option for name, option in self.table[entry].options.items()}


class Room(NamedTuple):
    """own: options that are always read."""

    own: Mapping[str, Option]
    parts: tuple[Part, ...] = ()

    def declared(self) -> dict[str, Option]:
        """Every option of the room by its dotted name."""
        found = dict(self.own)
        for part in self.parts:
            found[part.field] = Option(part.default, part.meaning, choices=tuple(part.table))
            for entry in part.table:
                for name, option in part.options(entry).items():
                    if found.setdefault(name, option) != option:
                        raise TypeError(f"{name} is declared twice, and not alike: {found[name]} and {option}")
        return found

    def defaults(self) -> ConfigDict:
        """A config in which every option has its default."""
        return nested({name: option.default for name, option in self.declared().items()})

    def read(self, values: Mapping[str, Any], prefix: str = "") -> set[str]:
        """The options that mean something beside the others. Raises UserError for an unknown entry."""
        found, replaced = set(self.own), set()
        for part in self.parts:
            entry = part.table[choose(prefix + part.field, values[part.field], part.table)]
            found |= {part.field, *part.options(values[part.field]), *getattr(entry, "reads", ())}
            replaced |= {*getattr(entry, "replaces", ())}
        return found - replaced

    def idle(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Of the options that are read, those that mean nothing beside the value of another, and that one."""
        found: dict[str, str] = {}
        for part in self.parts:
            found |= getattr(part.table[values[part.field]], "idle", _none_idle)(values)
        return found

    def check(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Raises UserError for a value outside its declaration, and for one that is set and not read."""
        read = self.read(values, prefix) - {*self.idle(values)}
        for name, option in self.declared().items():
            if name in read:
                option.check(prefix + name, values[name])
            elif values[name] != option.default:
                raise self.unread(values, name, prefix)

    def unread(self, values: Mapping[str, Any], name: str, prefix: str = "") -> UserError:
        """That an option is set which nothing reads: who would read it, beside the value that means nothing."""
        if name in self.read(values, prefix) and (other := self.idle(values).get(name)):
            return UserError(
                f"{prefix}{name} = {shown(values[name])} means nothing beside {prefix}{other} = "
                f"{shown(values[other])}; choose {self.declared()[name].default!r}, or another {prefix}{other}"
            )
        replacing = [p for p in self.parts if name in getattr(p.table[values[p.field]], "replaces", ())]
        readers = [(part, entry) for part in self.parts for entry in part.table if name in part.options(entry)]
        beside = replacing or [part for part in self.parts if part.field in {one.field for one, _ in readers}]
        chosen = ", ".join(f"{prefix}{part.field} = {values[part.field]!r}" for part in beside)
        others = [f"{part.field} = {entry!r}" for part, entry in readers if not replacing][:SHOWN]
        return UserError(
            f"{prefix}{name} = {shown(values[name])} means nothing beside {chosen}; choose "
            + repr(self.declared()[name].default)
            + (f", or one of: {prefix}{f', {prefix}'.join(others)}" if others else "")
        )


def _none_idle(values: Mapping[str, Any]) -> dict[str, str]:
    return {}


def without(options: Mapping[str, Option], *names: str) -> dict[str, Option]:
    """The options but for some."""
    return {name: option for name, option in options.items() if name not in names}


def nested(values: Mapping[str, Any]) -> ConfigDict:
    """A config of dotted names."""
    tree: dict = {}
    for name, value in values.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return ConfigDict(tree)


def leaves(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name."""
    found = {}
    for name, value in config.items():
        is_room = isinstance(value, Mapping | ConfigDict)
        found |= leaves(value, f"{prefix}{name}.") if is_room else {f"{prefix}{name}": value}
    return found


def set_field(config: ConfigDict, name: str, value) -> None:
    """Sets a field by its dotted name. Raises TypeError for a value of another type, whatever is wrong with it."""
    *path, last = name.split(".")
    for part in path:
        config = config[part]
    try:
        config[last] = value
    except (ValueError, OverflowError) as error:
        raise TypeError(str(error)) from error


def tuples(value):
    """A value with the tuples that JSON has made lists of."""
    return tuple(tuples(item) for item in value) if isinstance(value, list | tuple) else value


def names_of(pairs: Iterable[tuple[str, Any]]) -> list[str]:
    """The fields of (field, value) pairs."""
    return [name for name, _ in pairs]
