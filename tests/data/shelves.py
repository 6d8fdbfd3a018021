"""Documents to prepare, and what preparing them leaves."""

import json

import numpy as np

from lab.data import preparation

LETTERS = [*"abcdefgh \nßü€"]  # of one to three bytes
STUDY = """
from lab.config import base

def get_config():
    config = base()
    config.study.update(name="tiny", question="?")
    config.data.update(corpus="jsonl", path={path!r}, text_length=4, rows=4)
    config.evaluate.loss.texts = 6
    return config
"""


def nothing(told, kept):
    """Of one who does not look on."""


def prepared(config, out, characters=1000, workers=1, told=nothing):
    """The manifest of a directory of many small shards."""
    return preparation.prepare(config, out, workers, "python -m lab.prepare ...", told, characters)


def of_prepared(config, out):
    """The config that reads the directory."""
    found = config.copy_and_resolve_references()
    found.data.update(corpus="prepared", path=str(out), field="text", missing="refuse")
    return found


def write_stories(path, rng, count=600):
    """JSON lines of 0 to 59 letters."""
    rows = [{"text": "".join(rng.choice(LETTERS, rng.integers(60))), "n": n} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files_of(out):
    """{path: bytes} of everything that lies there."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def random():
    """Other numbers in every run."""
    return np.random.default_rng()
