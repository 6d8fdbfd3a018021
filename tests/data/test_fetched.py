"""Prepared shards in an object store: read to the bit as those of a directory, fetched once, and only where needed."""

import concurrent.futures
import itertools
import json
import os
import pickle
import shutil

import fsspec
import numpy as np
import pytest
from shelves import of_prepared, prepared

import lab.data
from lab.data import pipeline, reading
from lab.errors import UserError
from lab.remote import fetching, store
from lab.study.define import identity

_numbers = itertools.count()


class Files:
    """The file system of a store in memory. fetched: the names of files as they were asked for. spoil: is done with
    (the file's name, where it was put) before an answer is given."""

    def __init__(self):
        self._files, self.fetched, self.spoil = fsspec.filesystem("memory"), [], lambda name, path: None

    def __getattr__(self, name):
        return getattr(self._files, name)

    def get_file(self, remote, local):
        name = remote.rpartition("/")[2]
        self.fetched.append(name)
        self._files.get_file(remote, local)
        self.spoil(name, local)


@pytest.fixture
def files(monkeypatch):
    made = Files()
    monkeypatch.setitem(store.LIBRARIES, "memory", "fsspec")
    monkeypatch.setattr(store, "_files", lambda scheme: made)
    monkeypatch.setattr(store, "PAUSE", 0.0)
    return made


@pytest.fixture
def shelf(stories, tmp_path, files):
    """(the directory, a copy of it in a store, the config that reads the former, the config that reads the latter)"""
    out, url = tmp_path / "shelf", f"memory://bucket-{next(_numbers)}-{os.getpid()}/some/texts"
    prepared(stories, out)
    for path in (path for path in out.rglob("*") if path.is_file()):
        files.put_file(str(path), f"{url}/{path.relative_to(out).as_posix()}")
    return out, url, of_prepared(stories, out), of_prepared(stories, url)


def batches(config, **options):
    """The arrays of all batches of training, and of an ask."""
    data = lab.data.open(config)
    train = [(batch, info) for batch, info in pipeline.train_batches(config, data.train, **options)]
    hosts = {name: value for name, value in options.items() if name != "start"}
    asked = [*pipeline.evaluation_batches(config, config.evaluate.loss, data.validation, 2, **hosts)]
    arrays = [(each.tokens, each.labels, *vars(each.coordinates).values()) for each in [b for b, _ in train] + asked]
    return arrays, [info for _, info in train]


def equal(one, other):
    assert one[1] == other[1] and len(one[0]) == len(other[0])
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_batches_are_those_of_a_directory(shelf):
    _, _, here, there = shelf
    for options in ({}, dict(start=3), *(dict(process_index=index, process_count=2) for index in range(2))):
        here.evaluate.loss.rows = there.evaluate.loss.rows = options.get("process_count", 1)
        here.evaluate.loss.texts = there.evaluate.loss.texts = 12
        equal(batches(there, **options), batches(here, **options))


def test_a_cell_is_the_same_wherever_its_shards_lie(shelf):
    _, _, here, there = shelf
    ours, theirs = lab.data.open(here), lab.data.open(there)
    assert (ours.fingerprint, ours.validation_fingerprint) == (theirs.fingerprint, theirs.validation_fingerprint)
    assert identity.fields(here) == identity.fields(there)
    sent = pickle.loads(pickle.dumps(theirs.train))
    assert [text.tolist() for text in sent] == [text.tolist() for text in ours.train]


def shards_of(out, ids):
    """The files of training texts, by counting along."""
    manifest = json.loads((out / "manifest.json").read_text())
    told = [shard["train"] for shard in manifest["shards"] if "train" in shard]
    files = [shard["file"] for shard in told for _ in range(shard["texts"])]
    return {files[i] for i in ids}


@pytest.mark.parametrize("processes", [1, 4])
def test_a_host_fetches_the_shards_of_its_rows_alone_and_each_once(shelf, files, processes):
    """By hosts that share no cache: so many files were asked for. Later commands find them."""
    out, _, _, there = shelf
    there.data.rows = there.train.steps = 4
    there.data.texts_per_row = 1
    there.data.draw = "fixed1"
    wanted, fetched = [], []
    for host in range(processes):
        os.environ["LAB_CACHE"] = str(out.parent / f"cache-of-{host}")
        train = lab.data.open(there).train
        files.fetched.clear()
        steps = pipeline._TextSteps(there, train, host, processes)
        for step in range(4):
            steps(step)
        ids = [
            i for step in range(4) for i in [*steps._order[step]][host * 4 // processes : (host + 1) * 4 // processes]
        ]
        wanted.append(shards_of(out, ids))
        fetched.append(sorted(files.fetched))
        files.fetched.clear()
        again = pipeline._TextSteps(there, lab.data.open(there).train, host, processes)
        assert again(2)[0].tokens.tolist() == steps(2)[0].tokens.tolist() and not files.fetched
    assert fetched == [sorted(each) for each in wanted]
    assert max(map(len, wanted)) < len([*out.glob("train-*")])


def test_copies_of_one_preparation_share_their_shards(shelf, files, stories):
    _, url, _, there = shelf
    first = batches(there)
    files.copy(url, f"{url}-elsewhere", recursive=True)
    files.fetched.clear()
    equal(batches(of_prepared(stories, f"{url}-elsewhere")), first)
    assert not files.fetched


def cached(cache_root):
    return sorted((cache_root / "shards").glob("*.array_record"))


def left_over(cache_root):
    return [
        path.name for path in (cache_root / "shards").iterdir() if not path.name.endswith((".array_record", ".lock"))
    ]


def test_what_is_damaged_in_the_cache_is_fetched_again(shelf, cache_root, caplog):
    _, _, here, there = shelf
    batches(there)
    flipped, cut, gone = cached(cache_root)[:3]
    content = flipped.read_bytes()
    flipped.write_bytes(content[:90] + bytes([content[90] ^ 1]) + content[91:])
    cut.write_bytes(cut.read_bytes()[:50])
    gone.unlink()
    (cache_root / "shards" / f".{gone.name}").mkdir()  # of a process that was killed
    (cache_root / "shards" / f".{gone.name}" / "whole").write_bytes(b"half")
    equal(batches(there), batches(here))
    assert caplog.text.count("is damaged: it is fetched again") == 2 and not left_over(cache_root)
    assert flipped.read_bytes() == content
    train = lab.data.open(there).train
    train.bring(range(len(train)))
    for path in cached(cache_root):  # behind what has looked it over
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"array_record: record 0 cannot be read: .*\(run the same command again"):
        train[0]
    equal(batches(there), batches(here))


def test_what_is_damaged_in_the_store_is_refused(shelf, files, cache_root):
    out, url, _, there = shelf
    file = min(out.glob("train-*"))
    content = file.read_bytes()
    files.pipe_file(f"{url}/{file.name}", content[:90] + bytes([content[90] ^ 1]) + content[91:])
    with pytest.raises(UserError, match=rf"{url}/{file.name} is damaged: it is not what was prepared \(.*lab.prepare"):
        lab.data.open(there).train[0]
    assert not cached(cache_root) and not left_over(cache_root) and files.fetched.count(file.name) == 2
    files.pipe_file(f"{url}/{file.name}", content[:-1])
    with pytest.raises(UserError, match=rf"{url}/{file.name} has {len(content) - 1} bytes, not {len(content)} \("):
        lab.data.open(there)
    files.pipe_file(f"{url}/{file.name}", content)
    train = lab.data.open(there).train
    files.rm_file(f"{url}/{file.name}")
    for use in (lambda: train[0], lambda: lab.data.open(there)):
        with pytest.raises(UserError, match=rf"^{url}/{file.name} is missing \(the command that made it"):
            use()


@pytest.mark.parametrize("name", ["train.lengths", "validation.lengths", "tokenizer.json"])
def test_small_files_that_are_missing_or_others_are_named(shelf, files, name):
    out, url, _, there = shelf
    files.pipe_file(f"{url}/{name}", bytes((out / name).stat().st_size))
    with pytest.raises(UserError, match=rf"{url}/{name} is (damaged|not the tokenizer)|{name} is no tokenizer|{name}"):
        lab.data.open(there)
    files.rm_file(f"{url}/{name}")
    with pytest.raises(UserError, match=rf"^{url}/{name} is missing"):
        lab.data.open(there)


def test_a_place_that_holds_no_preparation_is_refused(shelf, files, config):
    out, url, _, there = shelf
    whole = (out / "manifest.json").read_bytes()
    unfinished = json.dumps({"command": json.loads(whole)["command"]}).encode()
    for content, told in (
        (b'{"checksum": 1', rf"^{url}/manifest.json is damaged: "),
        (whole.replace(b'"texts": ', b'"texts": 1', 1), r"manifest.json is damaged: its checksum"),
        (unfinished, r"is not finished; run its command again: python -m lab.prepare"),
    ):
        files.pipe_file(f"{url}/manifest.json", content)
        with pytest.raises(UserError, match=told):
            lab.data.open(there)
    files.rm_file(f"{url}/manifest.json")
    with pytest.raises(UserError, match=rf"data.path = '{url}' has no manifest.json: python -m lab.prepare fills"):
        lab.data.open(there)
    there.data.path = "ftp://bucket/texts"
    with pytest.raises(UserError, match="ftp://bucket/texts is of no known store; choose s3://BUCKET/DIR, gs://"):
        lab.data.open(there)


def test_what_fails_is_tried_again(shelf, files, caplog, monkeypatch):
    """A request that fails, an answer that is cut, and one of other bytes: once each; and a store that stays away."""
    _, _, here, there = shelf
    faults, struck = iter(["refused", "cut", "other"]), set()

    def spoil(name, path):
        fresh = name.startswith("train-") and name not in struck
        struck.add(name)
        match fresh and next(faults, None):
            case "refused":
                raise ConnectionError("refused")
            case "cut":
                os.truncate(path, 10)
            case "other":
                with open(path, "r+b") as file:
                    file.write(b"other")

    files.spoil = spoil
    equal(batches(there), batches(here))
    assert next(faults, None) is None and caplog.text.count("is not reached (refused); it is tried again") == 1

    def away(name, path):
        raise ConnectionError("gone")

    files.spoil = away
    shutil.rmtree(os.environ["LAB_CACHE"])
    monkeypatch.setattr(store, "PATIENCE", 0.0)
    with pytest.raises(store.Unreached, match=r"cannot be reached \(ConnectionError: gone\)"):
        lab.data.open(there)


def test_readers_of_one_machine_share_what_they_fetch(shelf, files, caplog, monkeypatch):
    """Many at once: each file is asked for once. What takes long tells how far it is."""
    out, _, here, there = shelf
    monkeypatch.setattr(fetching, "SILENCE", 0.001)
    own = [text.tolist() for text in lab.data.open(here).train]
    readers = [lab.data.open(there).train for _ in range(4)]
    files.fetched.clear()

    def read(reader):
        reader.bring(range(len(own)))
        return [text.tolist() for text in reader]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(texts == own for texts in pool.map(read, readers))
    assert sorted(files.fetched) == sorted(path.name for path in out.glob("train-*"))
    assert f"fetching {len(files.fetched)} files from memory://" in caplog.text
    for path in cached(reading.Path(os.environ["LAB_CACHE"])):
        assert path.stem == reading.digest(path)
