"""Corpora read what they name, hold some of it out, and refuse bad files with their place."""

import errno
import io
import json
import os
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents import opened, texts, write_jsonl, write_parquet
from hypothesis import given
from hypothesis import strategies as st

from lab.data import reading, tokenizers
from lab.data import texts as prepared
from lab.errors import UserError

# Lone surrogates are no text; JSON can spell them all the same.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def split_sizes(corpus):
    held_out = [document.validation for document in corpus.read()]
    return len(held_out) - sum(held_out), sum(held_out)


def test_stdlib_holds_this_interpreters_sources():
    corpus = opened("stdlib")
    documents = {document.name: document for document in corpus.read()}
    assert documents["json/decoder.py"].text == json.decoder.__loader__.get_source("json.decoder")
    assert not any(part in name.split("/") for name in documents for part in ("test", "tests", "site-packages"))
    train, validation = split_sizes(corpus)
    assert train > 300 and 0.02 < validation / (train + validation) < 0.1
    assert opened("stdlib").fingerprint == corpus.fingerprint


@pytest.fixture
def library(tmp_path, monkeypatch):
    root = tmp_path / "library"
    for name in ["a.py", "b/c.py", "b/test/d.py", "b/tests/e.py", "site-packages/f.py", "g.txt", "_sysconfigdata_x.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "latin.py").write_bytes("é".encode("latin-1"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(root))
    return root


def test_stdlib_leaves_out_tests_packages_and_undecodable_files(library):
    assert texts(opened("stdlib")) == ["a.py", "b/c.py"]


def test_stdlib_fingerprint_is_of_names_and_contents(library):
    first = opened("stdlib").fingerprint
    (library / "a.py").write_text("other")
    second = opened("stdlib").fingerprint
    (library / "a.py").rename(library / "aa.py")
    assert len({first, second, opened("stdlib").fingerprint}) == 3


def test_stdlib_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=f"no .py file under {tmp_path}"):
        opened("stdlib")


def write_files(root, count):
    for i in range(count):
        path = root / f"{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"text {i}\r\nß".encode())


def test_files_by_globs(tmp_path):
    write_files(tmp_path, 30)
    (tmp_path / "1" / "x.md").write_text("x")
    assert sorted(texts(opened("files", tmp_path / "**/*.txt"))) == sorted(f"text {i}\r\nß" for i in range(30))
    both = opened("files", f"{tmp_path}/1/*.md, {tmp_path}/2/*.txt,{tmp_path}/2/2.txt")
    assert sorted(texts(both)) == sorted(["x"] + [f"text {i}\r\nß" for i in range(2, 30, 3)])


@pytest.mark.parametrize("count", [2, 3, 200])
def test_files_are_split_whatever_their_number_and_place(tmp_path, count):
    write_files(tmp_path / "here", count)
    write_files(tmp_path / "there", count)
    here, there = (opened("files", tmp_path / place / "**/*.txt") for place in ("here", "there"))
    assert here.fingerprint == there.fingerprint
    assert [d.validation for d in here.read()] == [d.validation for d in there.read()]
    train, validation = split_sizes(here)
    assert train and validation and validation <= max(1, 0.12 * count)


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=40, max_size=4000) | st.text("天地玄黄", min_size=40),
    st.sampled_from(["files", "jsonl"]),
)
def test_a_single_text_is_split_by_blocks(tmp_path_factory, text, kind):
    path = tmp_path_factory.mktemp("single") / "book"
    if kind == "jsonl":
        write_jsonl(path, [{"text": text}])
    else:
        path.write_bytes(text.encode())
        text = text.removeprefix("\ufeff")
    corpus = opened(kind, path)
    documents = list(corpus.read())
    assert "".join(d.text for d in documents) == text
    assert [d.ends for d in documents] == [False] * (len(documents) - 1) + [True]
    held_out = [len(d.text.encode()) for d in documents if d.validation]
    assert 0 < sum(held_out) <= 0.06 * len(text.encode()) + 4 * len(held_out)  # a block ends where a letter does


def test_files_that_are_missing_or_not_text_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.path = '.*\*\.txt' matches no file \(corpus files, searched from"):
        opened("files", tmp_path / "*.txt")
    with pytest.raises(UserError, match=r"data.path is empty; corpus files needs globs"):
        opened("files", " , ")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"\xff" * 100)
        with pytest.raises(UserError, match=r"a.txt is not UTF-8 text"):
            texts(opened("files", tmp_path / "*.txt"))


@given(st.lists(TEXT))
def test_jsonl_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    rows += ["one", "another"]  # a single text is cut
    write_jsonl(path, [{"body": row, "text": 1} for row in rows])
    assert texts(opened("jsonl", path, "body")) == rows


@given(st.lists(TEXT, max_size=8))
def test_parquet_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    rows += ["one", "another"]
    write_parquet(path, rows, pa.large_string())
    assert texts(opened("parquet", path)) == rows


@pytest.mark.parametrize("corpus, write", [("jsonl", None), ("parquet", write_parquet)])
def test_equal_rows_land_in_one_split(tmp_path, corpus, write):
    rows = [f"row {i % 1000}" for i in range(2000)]
    path = tmp_path / "rows"
    _ = write(path, rows) if write else write_jsonl(path, [{"text": row} for row in rows])
    documents = list(opened(corpus, path).read())
    assert [d.validation for d in documents[:1000]] == [d.validation for d in documents[1000:]]
    assert 0.03 < sum(d.validation for d in documents) / 2000 < 0.07


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r"rows\.jsonl, line 3: not JSON \("),
        ("text", r"rows\.jsonl, line 3: not JSON"),
        ("\udcff", r"rows\.jsonl, line 3: not JSON"),
        ("[1]", r"rows\.jsonl, line 3: list, not a JSON object"),
        ('{"body": "x", "id": 1}', r"line 3: no field 'text' \(data\.field\); it has: body, id"),
        ("{}", r"line 3: no field 'text' .*it has: nothing"),
        ('{"text": 5, "id": 1}', r"line 3: field 'text' \(data\.field\) is int, not a string; .*: text, id"),
        ('{"text": null}', r"line 3: field 'text' \(data\.field\) is null; mend it, or set data.missing to skip"),
        (
            '{"text": "a\\ud800b"}',
            r"line 3: field 'text' .* has a lone surrogate at character 1; mend it, or set data.m",
        ),
        ('{"text": NaN}', r"line 3: field 'text' \(data\.field\) is float, not a string"),
        ('{"text": ' + "9" * 5000 + "}", r"line 3: not JSON \(Exceeds the limit"),
        ('{"text": "x", "deep": ' + "[" * 200_000 + "]" * 200_000 + "}", r"line 3: lists or objects lie too deep"),
        ("7", r"line 3: int, not a JSON object"),
    ],
)
def test_bad_jsonl_is_refused_with_its_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(UserError, match=message) as refusal:
        texts(opened("jsonl", path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("corpus", ["jsonl", "parquet", "files", "huggingface"])
def test_of_few_documents_some_are_held_out(tmp_path, corpus, count, monkeypatch):
    for seed in range(8):
        rows = [f"document {i} of {seed} " * 40 for i in range(count)]
        path = tmp_path / f"rows{seed}"
        if corpus == "jsonl":
            write_jsonl(path, [{"text": row} for row in rows])
        elif corpus == "parquet":
            write_parquet(path, rows)
        elif corpus == "huggingface":
            monkeypatch.setattr(reading, "huggingface", lambda path, rows=rows: (("r", {"text": row}) for row in rows))
        else:
            path.mkdir()
            for i, row in enumerate(rows):
                (path / f"{i:02}").write_text(row)
            path /= "*"
        documents = list(opened(corpus, path).read())
        assert "".join(d.text for d in documents) == "".join(rows)
        assert {d.validation for d in documents} == {True, False}


def test_copies_of_one_file_are_cut_alike(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("the same words in both of them, twice and again")
    documents = list(opened("files", tmp_path / "*").read())
    half = len(documents) // 2
    assert [d.validation for d in documents[:half]] == [d.validation for d in documents[half:]]
    assert 0 < sum(d.validation for d in documents) < len(documents) / 4
    assert [d.ends for d in documents[half - 1 :: half]] == [True, True]


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = os.urandom(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [f"row {i} " + "word " * 20 for i in range(3000)]
    pq.write_table(pa.table({"text": rows}), path, compression="snappy", use_dictionary=False, row_group_size=500)
    damage(path)
    with pytest.raises(
        UserError, match=r"cannot read \S+rows\.parquet after row \d+: .*\(the file is damaged"
    ) as refusal:
        texts(opened("parquet", path))
    assert "\n" not in str(refusal.value) and "LAB_CACHE" not in str(refusal.value)


@pytest.mark.parametrize("corpus", ["stdlib", "files", "jsonl", "huggingface"])
def test_a_disk_or_connection_that_fails_while_reading_is_told(tmp_path, monkeypatch, corpus, hub, library):
    """Whatever is read raises EIO after its first bytes; the cache is not blamed."""
    fault = OSError(errno.EIO, "Input/output error")

    class Failing(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            raise fault

    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x"}])
    read = opened(corpus, "org/broken" if corpus == "huggingface" else path)
    monkeypatch.setattr(reading, "unpacked", lambda path: io.BufferedReader(Failing()))
    monkeypatch.setattr(type(path), "read_bytes", lambda path: (_ for _ in ()).throw(fault))
    named = {"stdlib": "a.py", "huggingface": "org/broken"}.get(corpus, "rows.jsonl")
    with pytest.raises(
        UserError, match=rf"cannot read .*{named}.*: (Input/output error|the line went dead) \("
    ) as refusal:
        prepared.prepare(read, tokenizers.Bytes(), 4, "split")
    assert "LAB_CACHE" not in str(refusal.value)


def test_bad_parquet_is_refused(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", ["a", "b", None, "c"])
    with pytest.raises(UserError, match=r"rows\.parquet: no column 'body' \(data\.field\); it has: text, n"):
        texts(opened("parquet", path, "body"))
    with pytest.raises(UserError, match=r"row 3: field 'text' .* is null; mend it, or set data.missing to skip"):
        texts(opened("parquet", path))
    with pytest.raises(UserError, match=r"row 1: field 'n' .* is int, not a string"):
        texts(opened("parquet", path, "n"))
    path.write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"rows\.parquet is not a parquet file"):
        texts(opened("parquet", path))


@pytest.mark.parametrize("corpus", ["jsonl", "parquet"])
def test_fingerprints_follow_contents_and_field(tmp_path, corpus):
    path = tmp_path / "rows"
    seen = []
    for content in (b"x", b"y"):
        path.write_bytes(content)
        seen += [opened(corpus, path, field).fingerprint for field in ("text", "body")]
    assert len(set(seen)) == 4


def dropped():
    yield {"text": "x"}
    raise ConnectionError("the line went dead\nmore")


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the package `datasets`."""

    def load_dataset(name, subset, *, split, streaming):
        if name == "org/broken":
            return dropped()
        if name != "org/stories":
            raise FileNotFoundError(f"{name} is not on the hub\nmore")
        assert (split, streaming) == ("train", True)
        return ({"text": f"{subset} story {i}", "id": i} for i in range(100))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_huggingface_streams_the_train_split(hub):
    assert texts(opened("huggingface", "org/stories")) == [f"None story {i}" for i in range(100)]
    assert texts(opened("huggingface", "org/stories:en"))[7] == "en story 7"
    assert opened("huggingface", "org/stories").streamed


def test_bad_huggingface_is_refused(hub, monkeypatch):
    with pytest.raises(UserError, match=r"org/stories, row 1: no field 'body' .*it has: text, id"):
        texts(opened("huggingface", "org/stories", "body"))
    with pytest.raises(UserError, match=r"'org/none': the dataset cannot be opened: org/none is not on the hub$"):
        texts(opened("huggingface", "org/none"))
    with pytest.raises(UserError, match=r"data.path is empty"):
        opened("huggingface")
    monkeypatch.setitem(sys.modules, "datasets", None)  # what import finds when the package is missing
    with pytest.raises(UserError, match="pip install datasets"):
        texts(opened("huggingface", "org/stories"))


def test_datasets_is_imported_only_when_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert texts(opened("stdlib"))
