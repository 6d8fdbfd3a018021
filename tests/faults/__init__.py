"""Faults that the tests must notice, for tests/mutate.py: each is a wrong line that a careful hand could write.

A file for each room of lab/, `around` for what lies about them. Its ROWS have, under a file below lab/, rows of (name,
text that occurs there exactly once, what stands in its place).
"""

from typing import NamedTuple

from faults import around, data, decode, evaluate, kernels, model, study, train


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str


ROOMS = (kernels, model, data, train, evaluate, decode, study, around)
FAULTS = [Fault(name, file, old, new) for room in ROOMS for file, rows in room.ROWS.items() for name, old, new in rows]
