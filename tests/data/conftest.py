"""Every test of data has a cache of its own."""

import hypothesis
import pytest
from shelves import random, write_stories

import lab.config

# First calls import libraries and shared machines stall: time limits of single examples only make tests flaky.
hypothesis.settings.register_profile("lab", deadline=None)
hypothesis.settings.load_profile("lab")


@pytest.fixture(autouse=True)
def cache_root(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    monkeypatch.setenv("LAB_CACHE", str(root))
    return root


@pytest.fixture
def config():
    """Rows small enough to check by hand: 4 rows of 6 texts of at most 4 tokens."""
    config = lab.config.base()
    config.data.update(text_length=4, texts_per_row=6, rows=4, draw="1-5")
    config.evaluate.loss.update(branches=(1, 2, 3), texts=24, texts_per_row=6, rows=4)
    config.train.steps = 5
    return config


@pytest.fixture
def stories(config, tmp_path):
    """A config over random documents of 0 to 59 letters, of more bytes than letters."""
    config.data.update(corpus="jsonl", path=str(write_stories(tmp_path / "stories.jsonl", random())))
    config.evaluate.loss.update(texts=6, rows=1)
    return config
