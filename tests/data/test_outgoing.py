"""A preparation that is written to an object store is that of a directory, and goes on where it was stopped."""

import itertools
import os

import fsspec
import pytest
from shelves import STUDY, files_of, of_prepared, prepared

import lab.data
from lab import prepare
from lab.errors import UserError
from lab.remote import store

_numbers = itertools.count()


class Stop(Exception):
    """Of a command, as it was told to."""


@pytest.fixture
def files(monkeypatch):
    monkeypatch.setitem(store.LIBRARIES, "memory", "fsspec")
    monkeypatch.setattr(store, "_files", lambda scheme: fsspec.filesystem("memory"))
    return fsspec.filesystem("memory")


@pytest.fixture
def url(files):
    return f"memory://out-{next(_numbers)}-{os.getpid()}/texts"


@pytest.fixture
def undisturbed(stories, tmp_path):
    prepared(stories, tmp_path / "undisturbed")
    return {name: data for name, data in files_of(tmp_path / "undisturbed").items() if not name.endswith(".lock")}


def there(files, url):
    """{path: bytes} of all objects."""
    root = files._strip_protocol(url)
    return {name.removeprefix(f"{root}/"): files.cat_file(name) for name in files.find(url)}


def test_it_goes_on_where_it_was_stopped(stories, files, url, undisturbed):
    """Again and again, from what is in the store alone; with a shard that is damaged, one that is gone, and one that
    belongs to it no longer."""

    def stopping(least):
        made = itertools.count(1)

        def told(one, kept):
            if next(made) == least:
                raise Stop

        return told

    for stop in (3, 7):
        with pytest.raises(Stop):
            prepared(stories, url, told=stopping(stop))
        with pytest.raises(UserError, match=r"is not finished; run its command again: python -m lab.prepare"):
            lab.data.open(of_prepared(stories, url))
    whole = sorted(name for name in there(files, url) if name.startswith("train-"))
    content = bytearray(files.cat_file(f"{url}/{whole[0]}"))
    content[90] ^= 1
    files.pipe_file(f"{url}/{whole[0]}", bytes(content))
    files.rm_file(f"{url}/{whole[1]}")
    for name in ("train-00999.array_record", "parts/00999.json", "parts/00999.train", "README"):
        files.pipe_file(f"{url}/{name}", b"{}")
    was_there = []
    prepared(stories, url, told=lambda one, kept: was_there.append(kept))
    assert was_there[:3].count(False) == 2 and sum(was_there) >= 4, was_there
    assert there(files, url) == undisturbed | {"README": b"{}"}
    was_there.clear()
    prepared(stories, url, told=lambda one, kept: was_there.append(kept))
    assert all(was_there) and there(files, url) == undisturbed | {"README": b"{}"}
    assert not [*(lab.data.cache.root() / "mirrors").glob("*/prepared/*")]


def test_another_preparation_or_other_files_are_left_alone(stories, files, url):
    prepared(stories, url)
    before = there(files, url)
    stories.data.text_length = 3
    with pytest.raises(UserError, match=rf"--out={url} holds another preparation: its text_length is 4"):
        prepared(stories, url)
    assert there(files, url) == before
    files.rm_file(f"{url}/manifest.json")
    with pytest.raises(UserError, match=rf"--out={url} holds other files and no preparation; choose an empty or"):
        prepared(stories, url)


def test_the_command_writes_there(stories, files, url, tmp_path, capsys):
    (tmp_path / "study.py").write_text(STUDY.format(path=stories.data.path))
    prepare.main([f"--config={tmp_path / 'study.py'}", f"--out={url}", "--workers=1"])
    told = capsys.readouterr().out
    assert "600 documents of" in told and f"--config.data.corpus=prepared --config.data.path={url} reads them" in told
    assert f"--out={url}".encode() in files.cat_file(f"{url}/manifest.json")
    ours, theirs = lab.data.open(stories), lab.data.open(of_prepared(stories, url))
    assert [text.tolist() for text in theirs.train] == [text.tolist() for text in ours.train]
