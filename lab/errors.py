"""One kind of error for what a user can mend: printed as one line, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user asked for cannot be done. The message names the value and the valid choices, on one line
    whatever is in them."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).splitlines()))


SHOWN = 12  # choices that fit on one line
LONGEST = 300  # letters of a value that fit on it


def shown(value) -> str:
    """A value as Python spells it, on one line and cut."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python spells no number of more than 4,300 digits
        text = f"a {type(value).__name__} that is too long to spell"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def choose(what: str, value, choices: Iterable):
    """`value`, if it is one of `choices`; else raises a UserError that names them, or the nearest if they are many."""
    choices = list(choices)
    if value in choices:
        return value
    names = [str(c) for c in choices]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    some = names if len(names) <= SHOWN else [*difflib.get_close_matches(str(value), names, n=SHOWN, cutoff=0.0), "..."]
    raise UserError(f"{what} = {shown(value)} is unknown{hint}; choose one of: {', '.join(some)}")
