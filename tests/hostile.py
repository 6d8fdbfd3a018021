"""Bytes as disks, networks and people leave them: what files are made of before they are read."""

import json
import random

from hypothesis import strategies as st

JSON = [None, True, -1, 0, 1e999, float("nan"), 2**70, "", "\ud800", "../..", [], {}, [[]], [None]]


def damages(content: bytes) -> st.SearchStrategy[bytes]:
    """`content`, damaged in one of the ways below."""
    ways = [flip, overwrite, cut, remove, repeat, insert, digit, replace] if content else [insert]
    return st.builds(
        lambda way, seed: way(content, random.Random(seed)), st.sampled_from(ways), st.integers(0, 2**32)
    ).filter(lambda made: made != content)


def flip(content: bytes, chance: random.Random) -> bytes:
    """One bit."""
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]


def overwrite(content: bytes, chance: random.Random) -> bytes:
    """A block, by noise or by zeros, as a machine that lost its power leaves them."""
    begin, end = _span(content, chance)
    noise = bytes(end - begin) if chance.random() < 0.5 else chance.randbytes(end - begin)
    return content[:begin] + noise + content[end:]


def cut(content: bytes, chance: random.Random) -> bytes:
    """The end is missing, or all of it."""
    return content[: chance.choice([0, chance.randrange(len(content)), len(content) - 1])]


def remove(content: bytes, chance: random.Random) -> bytes:
    begin, end = _span(content, chance)
    return content[:begin] + content[end:]


def repeat(content: bytes, chance: random.Random) -> bytes:
    begin, end = _span(content, chance)
    return content[:end] + content[begin:]


def insert(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    some = [
        b"\0",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\n",
        b"\r",
        b"{",
        b"[" * 100_000,
        chance.randbytes(9),
    ]
    return content[:at] + chance.choice(some) + content[at:]


def digit(content: bytes, chance: random.Random) -> bytes:
    """Another digit where there is one: what is read is as well-formed as before."""
    places = [at for at, byte in enumerate(content) if chr(byte).isdigit() and byte < 128]
    if not places:
        return flip(content, chance)
    at = chance.choice(places)
    return content[:at] + chance.choice(b"0123456789".replace(content[at : at + 1], b"")).to_bytes() + content[at + 1 :]


def replace(content: bytes, chance: random.Random) -> bytes:
    """A value of a JSON file, or of one of its lines, by another that JSON knows."""
    lines = [content] if _parsed(content) is not None else content.splitlines(keepends=True)
    at = chance.randrange(len(lines))
    value = _parsed(lines[at])
    if not value or not isinstance(value, dict | list):
        return flip(content, chance)
    holder = value
    while True:
        key = chance.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        inner = holder[key]
        if not (isinstance(inner, dict | list) and inner and chance.random() < 0.7):
            break
        holder = inner
    if isinstance(holder, dict) and chance.random() < 0.3:
        del holder[key]
    else:
        holder[key] = chance.choice(JSON)
    lines[at] = json.dumps(value).encode() + b"\n"
    return b"".join(lines)


def _parsed(content: bytes):
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _span(content: bytes, chance: random.Random) -> tuple[int, int]:
    begin = chance.randrange(len(content))
    return begin, min(len(content), begin + chance.choice([1, 2, 8, 64, 512, 4096]))
