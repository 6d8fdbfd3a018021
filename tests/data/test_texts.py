"""Documents become texts once, whole or not at all."""

import errno
import json
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.data import cache, texts, tokenizers
from lab.data.corpora import Corpus, Document
from lab.errors import UserError

BYTES = tokenizers.Bytes()
PLACE = pathlib.Path()


@given(st.integers(0, 60), st.integers(2, 12))
def test_splitting_keeps_all_but_a_last_single_token(count, text_length):
    ids, lengths = texts.cut(np.arange(count), "it", text_length, "split")
    pieces = [list(range(count))[i : i + text_length] for i in range(0, count, text_length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    assert [piece.tolist() for piece in np.split(ids, np.cumsum(lengths))[:-1]] == pieces


@given(st.integers(0, 60), st.integers(2, 12))
def test_truncating_keeps_the_first_piece(count, text_length):
    ids, lengths = texts.cut(np.arange(count), "it", text_length, "truncate")
    kept = list(range(min(count, text_length))) if count > 1 else []
    assert ids.tolist() == kept and lengths.tolist() == [len(kept)] * (count > 1)


def test_refusing_names_the_document_and_the_choices():
    assert texts.cut(np.arange(8), "it", 8, "refuse")[1].tolist() == [8]
    with pytest.raises(UserError, match=r"book.txt has 9 tokens, over data\.text_length = 8; .*split or truncate"):
        texts.cut(np.arange(9), "book.txt", 8, "refuse")


def corpus(documents, fingerprint="some documents"):
    return Corpus(fingerprint, "some documents", lambda: iter(documents))


def opened(entry, split="train", most=0):
    return [list(text) for text in texts.Texts(entry, split, most)]


def test_texts_end_where_their_document_does():
    documents = [
        Document("a", "abcdefg", False),
        Document("b", "xyz", True),
        Document("c", "", False),
        Document("d", "hij", False, ends=False),
        Document("e", "klmnopqr", False),
    ]
    entry = texts.prepare(corpus(documents), BYTES, 4, "split")
    expected = [b"abcd", [*b"efg", 256], b"hij", b"klmn", b"opqr"]
    assert opened(entry) == [list(text) for text in expected]
    assert opened(entry, "validation") == [[*b"xyz", 256]]
    assert opened(entry, most=2) == [list(text) for text in expected[:2]]
    assert texts.Texts(entry, "train")[1].dtype == np.int32


def test_texts_pickle_as_their_path():
    entry = texts.prepare(corpus([Document("a", "abcdefg" * 10**5, False)]), BYTES, 4, "split")
    prepared = texts.Texts(entry, "train", 1000)
    sent = pickle.dumps(prepared)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert len(again) == 1000 and again[999].tolist() == prepared[999].tolist()
    with pytest.raises(IndexError):
        again[1000]


def test_chunks_do_not_show(monkeypatch):
    documents = [Document(str(i), "word " * (i % 7), i % 3 == 0) for i in range(50)]
    whole = texts.prepare(corpus(documents), BYTES, 4, "split")
    monkeypatch.setattr(texts, "_CHUNK_CHARACTERS", 20)
    pieces = texts.prepare(corpus(documents, "in chunks"), BYTES, 4, "split")
    assert texts.read_meta(pieces) == texts.read_meta(whole)
    assert opened(pieces) == opened(whole)


def test_a_large_vocabulary_keeps_its_ids():
    class Wide(tokenizers.Bytes):
        size = 100_000
        fingerprint = "wide"

        def encode(self, text):
            return super().encode(text) + 70_000

    entry = texts.prepare(corpus([Document("a", "ab", False)]), Wide(), 4, "split")
    assert opened(entry) == [[70_097, 70_098, 256]]


def test_a_second_call_does_not_tokenise():
    documents = corpus([Document("a", "abcdefg", False)])
    entry = texts.prepare(documents, BYTES, 4, "split")
    unread = Corpus(documents.fingerprint, "", None)
    assert texts.prepare(unread, BYTES, 4, "split") == entry
    others = [
        texts.prepare(documents, BYTES, 5, "split"),
        texts.prepare(documents, BYTES, 4, "truncate"),
        texts.prepare(corpus([], "other"), BYTES, 4, "split"),
        texts.prepare(documents, BYTES, 4, "split", (1, 1)),
    ]
    assert len({entry, *others}) == 5


def test_limits_end_the_reading(monkeypatch):
    monkeypatch.setattr(texts, "_CHUNK_CHARACTERS", 1)

    def read():
        for i in range(10):
            yield Document(str(i), "abcdef", i % 2 == 1)
        raise AssertionError("read on")

    entry = texts.prepare(Corpus("endless", "", read), BYTES, 2, "split", (5, 4))
    assert len(opened(entry)) == 5 and len(opened(entry, "validation")) == 4


def test_two_builders_at_once_leave_one_entry(cache_root):
    inner = corpus([Document("a", "abcdefg", False)])

    def read():
        texts.prepare(inner, BYTES, 4, "split")  # the other one finishes first
        yield from inner.read()

    entry = texts.prepare(Corpus(inner.fingerprint, "", read), BYTES, 4, "split")
    assert opened(entry) == [list(b"abcd"), [*b"efg", 256]]
    assert [path.name for path in (cache_root / "texts").iterdir()] == [entry.name]


def test_a_failed_build_leaves_nothing(cache_root):
    def read():
        yield Document("a", "abcdefg", False)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        texts.prepare(Corpus("interrupted", "", read), BYTES, 4, "split")
    assert list((cache_root / "texts").iterdir()) == []


def test_a_full_disk_is_one_clear_line(cache_root, monkeypatch):
    def add(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(texts._Writer, "add", add)
    with pytest.raises(UserError, match=f"cannot fill the cache {cache_root}: .*No space left.*set LAB_CACHE"):
        texts.prepare(corpus([Document("a", "abcdefg", False)]), BYTES, 4, "split")
    assert list((cache_root / "texts").iterdir()) == []


@pytest.mark.parametrize("characters", [10, 10**6])
def test_a_disk_that_fills_up_is_told_whenever_it_shows(cache_root, monkeypatch, characters):
    """Bytes are written when the buffer is full, or at the end."""
    begin = texts._Writer.__init__

    def begin_on_a_full_disk(self, *arguments):
        begin(self, *arguments)
        self._file.close()
        self._file = open("/dev/full", "wb")  # noqa: SIM115

    monkeypatch.setattr(texts._Writer, "__init__", begin_on_a_full_disk)
    with pytest.raises(UserError, match=f"cannot fill the cache {cache_root}: .*No space left.*set LAB_CACHE"):
        texts.prepare(corpus([Document("a", "a" * characters, False)]), BYTES, 4, "split")
    assert list((cache_root / "texts").iterdir()) == []


def test_a_cache_that_is_no_directory_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot fill the cache .*set LAB_CACHE"):
        texts.prepare(corpus([Document("a", "abcdefg", False)]), BYTES, 4, "split")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(path):
    path.write_bytes(path.read_bytes()[::-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def scribble(path):
    path.write_text("[[{")


def of_another(path):
    other = texts.prepare(corpus([Document("a", "other words", False)], "other"), BYTES, 4, "split")
    path.write_bytes((other / path.name).read_bytes())


def of_no_name(path):
    path.write_bytes(json.dumps({"entry": "\ud800", "files": {}}).encode())


PARTS = ("train.tokens", "train.offsets.npy", "validation.tokens", "meta.json", "sums.json")


@pytest.mark.parametrize(
    "fault", [cut_short, overwrite, lengthen, scribble, of_another, of_no_name, type(PLACE).unlink]
)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_entry_is_made_again(cache_root, caplog, part, fault):
    documents = corpus([Document("a", "abcdefg", False), Document("b", "xyz", True)])
    entry = texts.prepare(documents, BYTES, 4, "split")
    expected = opened(entry), opened(entry, "validation"), texts.read_meta(entry)
    fault(entry / part)
    assert texts.prepare(documents, BYTES, 4, "split") == entry
    assert (opened(entry), opened(entry, "validation"), texts.read_meta(entry)) == expected
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"the cache's {entry} is damaged (")
    line.encode()  # whatever is there, it can be printed
    texts.prepare(Corpus(documents.fingerprint, "", None), BYTES, 4, "split")  # whole again: not read
    assert not [path for path in (cache_root / "texts").iterdir() if path.name.startswith((".building", ".damaged"))]


@pytest.mark.parametrize("foreign", ["file", "empty directory", "copy", "dangling link"])
def test_what_is_no_entry_is_replaced(foreign, caplog):
    documents = corpus([Document("a", "abcdefg", False)])
    entry = texts.prepare(documents, BYTES, 4, "split")
    expected = opened(entry)
    other = texts.prepare(corpus([], "other"), BYTES, 4, "split")
    shutil.rmtree(entry)
    {
        "file": entry.touch,
        "empty directory": entry.mkdir,
        "copy": lambda: shutil.copytree(other, entry),
        "dangling link": lambda: entry.symlink_to("nowhere"),
    }[foreign]()
    assert opened(texts.prepare(documents, BYTES, 4, "split")) == expected


def test_an_entry_that_another_process_made_again_stays(monkeypatch):
    documents = corpus([Document("a", "abcdefg", False)])
    entry = texts.prepare(documents, BYTES, 4, "split")
    answers = iter(["damaged when first looked at", ""])
    monkeypatch.setattr(cache, "_damage", lambda entry: next(answers))
    assert texts.prepare(Corpus(documents.fingerprint, "", None), BYTES, 4, "split") == entry


@pytest.mark.parametrize("name", ["a" * 300, "/etc/hosts", "..", "a\0b", "\ud800"])
def test_a_name_that_is_no_file_of_an_entry_is_damage(tmp_path, name):
    (tmp_path / "sums.json").write_text(json.dumps(dict(entry=tmp_path.name, files={name: [1, 2]})))
    assert cache._damage(tmp_path).endswith("is not there")


def test_an_entry_that_cannot_be_read_is_no_damage(monkeypatch):
    documents = corpus([Document("a", "abcdefg", False)])
    entry = texts.prepare(documents, BYTES, 4, "split")

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"cannot read the cache .*denied.*set LAB_CACHE"),
    ):
        patch.setattr(cache, "_sum", refused)
        texts.prepare(documents, BYTES, 4, "split")
    assert opened(entry) == [list(b"abcd"), [*b"efg", 256]]


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("place", ["mkdir", "open", "replace", "write"])
def test_a_cache_that_cannot_be_written_is_one_clear_line(cache_root, monkeypatch, place, fault):
    def fail(*arguments, **options):
        raise OSError(fault, os.strerror(fault))

    owner, name = {
        "mkdir": (type(PLACE), "mkdir"),
        "open": (texts._Writer, "__init__"),
        "replace": (os, "replace"),
        "write": (np, "save"),
    }[place]
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=rf"cannot fill the cache {cache_root}: .*LAB_CACHE"),
    ):
        patch.setattr(owner, name, fail)
        texts.prepare(corpus([Document("a", "abcdefg", False)]), BYTES, 4, "split")


def test_slow_reading_shows_progress(capsys, monkeypatch):
    documents = corpus([Document("a", "abcdefg", False)] * 3)
    assert len(list(texts._watched(documents))) == 3
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert len(list(texts._watched(documents, quiet_seconds=-1))) == 3
    assert "some documents" in capsys.readouterr().err
