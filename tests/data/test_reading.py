"""Paths, packed files, fields and marks of byte order are read as they are meant."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents import opened, texts, write_jsonl

from lab.errors import UserError


def zstd(content):
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "field, rows",
    [
        ("meta.text", [{"meta": {"text": "one"}}, {"meta": None}, {"meta": {"text": "two"}}, {"meta": {"text": None}}]),
        ("meta.text", [{"meta.text": "one", "meta": {"text": "no"}}, {"meta.text": "two", "meta": {"text": "no"}}]),
        ("text", [{"text": "one"}, {"text": None}, {"text": "two"}]),
    ],
)
@pytest.mark.parametrize("corpus", ["jsonl", "parquet"])
def test_fields_of_fields_and_rows_without_text(tmp_path, corpus, field, rows):
    path = tmp_path / "rows"
    if corpus == "jsonl":
        write_jsonl(path, [*rows, {"other": 1}, {field: "\ud800"}, {"meta": ["text"]}])
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    skipping = opened(corpus, path, field, missing="skip")
    documents = [d for d in skipping.read() if not d.missing]
    assert [d.text for d in documents] == ["one", "two"]
    missing = sum(d.missing for d in skipping.read())
    assert missing == len(rows) - 2 + 3 * (corpus == "jsonl")
    assert skipping.fingerprint != opened(corpus, path, field).fingerprint
    if missing:
        with pytest.raises(UserError, match=r"rows, (line|row) \d+: .*set data.missing to skip"):
            texts(opened(corpus, path, field))


@pytest.mark.parametrize("field, says", [("meta.body", "no field 'meta.body'"), ("body.text", "'body.text'")])
@pytest.mark.parametrize("corpus", ["jsonl", "parquet"])
def test_a_field_of_a_field_that_is_not_there(tmp_path, corpus, field, says):
    rows = [{"meta": {"text": "one"}}]
    path = tmp_path / "rows"
    _ = pq.write_table(pa.Table.from_pylist(rows), path) if corpus == "parquet" else write_jsonl(path, rows)
    with pytest.raises(UserError, match=rf"{says} .*it has: meta"):
        texts(opened(corpus, path, field))


@pytest.mark.parametrize(
    "encode", [gzip.compress, zstd, lambda content: gzip.compress(content[:99]) + gzip.compress(content[99:])]
)
def test_packed_files_read_as_plain_ones(tmp_path, encode):
    lines = "".join(json.dumps({"text": f"text {i} ß"}) + "\n" for i in range(200)).encode()
    book = ("\ufeff" + "a book of words, ß and 天 " * 50).encode()
    for name, content in (("plain", book), ("packed", encode(book))):
        (tmp_path / f"{name}.txt").write_bytes(content)
    for name, change in (("plain", bytes), ("packed", encode)):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.jsonl").write_bytes(change(lines))
        for i in range(60):
            (tmp_path / name / f"{i}.txt").write_bytes(change(f"file {i} ß".encode()))

    def read(corpus, path):
        return [(d.text, d.validation, d.ends) for d in opened(corpus, tmp_path / path).read()]

    for corpus, path in (("jsonl", "{}.jsonl"), ("files", "{}.txt"), ("files", "{}/*.txt")):
        assert read(corpus, path.format("packed")) == read(corpus, path.format("plain"))
    (tmp_path / "cut.jsonl").write_bytes(encode(lines)[:-9])
    with pytest.raises(UserError, match=r"cannot read .*cut\.jsonl after line \d+: Truncated.* is damaged"):
        texts(opened("jsonl", tmp_path / "cut.jsonl"))
    (tmp_path / "cut.txt").write_bytes(encode(book)[:-9])
    with pytest.raises(UserError, match=r"cannot read .*cut\.txt: Truncated"):
        texts(opened("files", tmp_path / "cut.txt"))


def test_a_mark_of_byte_order_is_no_text(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + name.encode() * 40)
    assert texts(opened("files", tmp_path / "*.txt")) == ["a.txt" * 40, "b.txt" * 40]
    assert "".join(texts(opened("files", tmp_path / "a.txt"))) == "a.txt" * 40


NAMES = ("a.txt", "data[v2]/b.txt", "data[v2]/c.txt", "one, two.txt", "x/d.txt", "datav/e.txt", "m,n/f.txt")


@pytest.mark.parametrize(
    "path, found",
    [
        ("data[v2]/b.txt", ["data[v2]/b.txt"]),
        ("data[v2]/*.txt", ["data[v2]/b.txt", "data[v2]/c.txt"]),
        ("data[v]/e.txt, a.txt", ["a.txt", "datav/e.txt"]),  # brackets are a pattern where no such name exists
        ("d?ta[v]/*.txt", ["datav/e.txt"]),
        ("d?ta[v2]/*.txt", ["datav/e.txt"]),
        ("dat[a]v/e.txt", ["datav/e.txt"]),
        ("one, two.txt", ["one, two.txt"]),
        ("m,n/*.txt", ["m,n/f.txt"]),
        ("a.txt,x/*.txt", ["a.txt", "x/d.txt"]),
        ("a.txt,x/../a.txt,./a.txt,*.txt", ["a.txt", "one, two.txt"]),
        ("{root}/a.txt,a.txt", ["a.txt"]),
        ("link/d.txt,x/d.txt", ["x/d.txt"]),
        ("a.txt,misspelt*.txt", None),
        ("a.txt,x", None),
    ],
)
def test_paths_name_files(tmp_path, monkeypatch, path, found):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("x")
    path = path.format(root=tmp_path)
    if found is None:
        with pytest.raises(UserError, match=r"data\.path = '[^']+'.* matches no file \(corpus files, searched from"):
            opened("files", path)
    else:
        names = {document.name.partition(" (block")[0] for document in opened("files", path).read()}
        assert sorted(os.path.relpath(os.path.realpath(name), tmp_path) for name in names) == found


def test_a_pattern_that_matches_nothing_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"data\.path = '\S+/b\*', of data.path = '.*a.txt, .*b\*', matches no file"):
        opened("files", f"{tmp_path}/a.txt, {tmp_path}/b*")
