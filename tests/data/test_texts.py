"""Documents become texts once, whole or not at all, and data.open says when there are too few."""

import concurrent.futures
import errno
import json
import multiprocessing
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

import lab.data
from lab.data import cache, dataset, texts, tokenizers
from lab.data.corpora import Corpus, Document
from lab.errors import UserError

BYTES = tokenizers.Bytes()
PLACE = pathlib.Path()


@pytest.fixture(autouse=True)
def nothing_was_said():
    """What is told once is told once in a test."""
    dataset._say.cache_clear()


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


PARTS = ("train.tokens", "train.offsets.npy", "validation.tokens", "meta.json", "sums.json")


@pytest.mark.parametrize("fault", [cut_short, overwrite, lengthen, scribble, of_another, type(PLACE).unlink])
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_entry_is_made_again(cache_root, caplog, part, fault):
    documents = corpus([Document("a", "abcdefg", False), Document("b", "xyz", True)])
    entry = texts.prepare(documents, BYTES, 4, "split")
    expected = opened(entry), opened(entry, "validation"), texts.read_meta(entry)
    fault(entry / part)
    assert texts.prepare(documents, BYTES, 4, "split") == entry
    assert (opened(entry), opened(entry, "validation"), texts.read_meta(entry)) == expected
    assert [record.getMessage().startswith(f"the cache's {entry} is damaged (") for record in caplog.records] == [True]
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


def test_rows_without_text_are_counted_and_told_once(stories, tmp_path, caplog):
    path = tmp_path / "stories.jsonl"
    path.write_text(path.read_text() + '{"text": null}\n{"n": 1}\n')
    with pytest.raises(UserError, match=r"stories\.jsonl, line 2001: .* is null; .*set data.missing to skip"):
        lab.data.open(stories)
    stories.data.missing = "skip"
    first, again = lab.data.open(stories), lab.data.open(stories)
    assert first.fingerprint == again.fingerprint
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and told[0].startswith("2 of 2002 rows of jsonl (") and told[0].endswith("skipped")
    stories.data.field = "body"
    with pytest.raises(UserError, match="is empty"):
        lab.data.open(stories)
    assert caplog.records[-1].getMessage().startswith("2002 of 2002 rows")


def test_lost_letters_are_refused_or_told(stories, tmp_path, caplog):
    path = tmp_path / "letters.json"
    letters = {character: i for i, character in enumerate("0123456</s>")} | {"</s>": 40}
    Tokenizer(models.BPE(letters, [])).save(str(path))
    stories.data.tokenizer = str(path)
    with pytest.raises(
        UserError, match=r"letters.json' loses 1800 of 8000 .*22.50%.*such as '[789]', .*set data.lossy to k"
    ):
        lab.data.open(stories)
    assert not list((tmp_path / "cache" / "texts").iterdir())
    stories.data.lossy = "keep"
    lab.data.open(stories), lab.data.open(stories)
    assert len(caplog.records) == 1 and "loses 1800 of 8000 characters (22.50%)" in caplog.records[0].getMessage()
    stories.data.lossy = "refuse"
    with pytest.raises(UserError, match="loses 1800 of 8000"):
        lab.data.open(stories)


def test_texts_that_nothing_ends_are_told_once(stories, tmp_path, caplog):
    path = tmp_path / "letters.json"
    Tokenizer(models.BPE({character: i for i, character in enumerate("0123456789!")}, [])).save(str(path))
    stories.data.tokenizer = str(path)
    first = lab.data.open(stories)
    lab.data.open(stories)
    assert [len(text) for text in first.train] == [4] * len(first.train)
    assert len(caplog.records) == 1 and "set data.eos" in caplog.records[0].getMessage()
    stories.data.update(eos="!", text_length=5)
    ended = lab.data.open(stories)
    assert {text[-1] for text in ended.train} == {10} and ended.fingerprint != first.fingerprint
    assert len(caplog.records) == 1
    stories.data.eos = "?"
    with pytest.raises(UserError, match=r"data.eos = '\?' is no token of .*letters.json; it has no special tokens"):
        lab.data.open(stories)


def test_slow_reading_shows_progress(capsys, monkeypatch):
    documents = corpus([Document("a", "abcdefg", False)] * 3)
    assert len(list(texts._watched(documents))) == 3
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert len(list(texts._watched(documents, quiet_seconds=-1))) == 3
    assert "some documents" in capsys.readouterr().err


@pytest.fixture
def stories(config, tmp_path):
    """A config over 2,000 distinct lines."""
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:04d}"}) + "\n" for i in range(2000)))
    config.data.update(corpus="jsonl", path=str(path))
    return config


def open_splits(config):
    """What data.open gives, as plain lists: for other processes."""
    opened = lab.data.open(config)
    return [text.tolist() for text in opened.train], opened.fingerprint


def test_open_gives_both_splits_apart(stories):
    stories.data.text_length = 5
    opened = lab.data.open(stories)
    train, validation = (
        [opened.tokenizer.decode(text) for text in split] for split in (opened.train, opened.validation)
    )
    assert sorted(train + validation) == [f"{i:04d}" for i in range(2000)]
    assert 50 < len(validation) < 150


def test_the_fingerprint_is_of_the_tokens(stories, tmp_path):
    path = tmp_path / "stories.jsonl"
    first = lab.data.open(stories).fingerprint
    (tmp_path / "moved.jsonl").write_text(path.read_text().replace('": "', '":  "'))  # other bytes, the same texts
    stories.data.path = str(tmp_path / "moved.jsonl")
    assert lab.data.open(stories).fingerprint == first
    seen = {first}
    stories.data.texts = 100
    seen.add(lab.data.open(stories).fingerprint)
    stories.data.update(texts=0, text_length=3)
    seen.add(lab.data.open(stories).fingerprint)
    path.write_text(path.read_text().replace("0007", "abcd"))
    stories.data.update(path=str(path), text_length=4)
    seen.add(lab.data.open(stories).fingerprint)
    assert len(seen) == 4


def test_a_cap_keeps_the_first_texts_and_all_validation(stories):
    whole = lab.data.open(stories)
    stories.data.texts = 100
    capped = lab.data.open(stories)
    assert [t.tolist() for t in capped.train] == [whole.train[i].tolist() for i in range(100)]
    assert len(capped.validation) == len(whole.validation)


def test_a_capped_stream_is_read_once_and_no_further(config, monkeypatch):
    read = []

    def rows(path):
        for i in range(10**6):
            read.append(i)
            yield f"row {i}", {"text": f"{i:04d}"}

    monkeypatch.setattr("lab.data.reading.huggingface", rows)
    monkeypatch.setattr(texts, "_CHUNK_CHARACTERS", 400)
    config.data.update(corpus="huggingface", path="org/stories", texts=100)
    first = lab.data.open(config)
    assert len(first.train) == 100 and len(first.validation) == config.evaluate.loss.texts
    assert len(read) < 2000
    del read[:]
    lab.data.open(config)
    assert not read
    config.data.texts = 200
    second = lab.data.open(config)
    assert len(second.train) == 200
    assert [t.tolist() for t in second.validation] == [t.tolist() for t in first.validation]


@pytest.mark.slow
def test_processes_that_open_at_once_agree(stories):
    stories.data.tokenizer = "bpe:270"
    stories.model.vocabulary = 270
    stories.data.text_length = 3
    with concurrent.futures.ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(open_splits, [stories] * 3))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], r"the corpus jsonl \(.*rows\.jsonl\) is empty: no text of at least 2 tokens"),
        ([""] * 50, "is empty"),
        ([f"{i:04d}" for i in range(12)], "gives 1[0-2] training texts .* fewer than one step of .* = 4 x 6"),
        ([f"{i:04d}" for i in range(100)], r"gives \d validation texts, fewer than evaluate.loss.texts = 24"),
    ],
)
def test_a_corpus_that_is_too_small_is_refused(config, tmp_path, lines, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    config.data.update(corpus="jsonl", path=str(path))
    with pytest.raises(UserError, match=message):
        lab.data.open(config)


def test_a_cap_below_one_step_is_refused(stories):
    stories.data.texts = 23
    with pytest.raises(UserError, match=r"data\.texts = 23.* fewer than one step"):
        lab.data.open(stories)


def test_a_tokenizer_over_the_vocabulary_is_refused(stories):
    stories.model.vocabulary = 257
    with pytest.raises(UserError, match=r"'bytes' has 258 ids, over model\.vocabulary = 257; .* at least 258"):
        lab.data.open(stories)


def test_a_text_over_the_budget_is_refused(stories):
    stories.data.long_texts = "refuse"
    with pytest.raises(UserError, match=r"stories\.jsonl, line 1 has 5 tokens, over data\.text_length = 4"):
        lab.data.open(stories)


def test_a_bad_config_is_refused_before_anything_is_read(stories):
    stories.data.update(align="centre", path="/nowhere")
    with pytest.raises(UserError, match=r"data\.align"):
        lab.data.open(stories)
