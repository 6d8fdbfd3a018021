"""Prepared shards hold the texts of their corpus, are read at random, and tell what is wrong with them."""

import json
import pickle
import shutil

import numpy as np
import pytest
from documents import write_parquet
from shelves import of_prepared, prepared, random

import lab.data
from lab.data import pipeline, reading, shards
from lab.errors import UserError


@pytest.fixture
def shelf(stories, tmp_path):
    """A directory of many shards, and the config that reads it."""
    prepared(stories, tmp_path / "shelf")
    return tmp_path / "shelf", of_prepared(stories, tmp_path / "shelf")


CUTS = [
    {},
    dict(long_texts="truncate", text_length=7),
    dict(text_length=11, text_bytes=9, long_texts="refuse"),
    dict(tokenizer="bpe:300", text_length=5),
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("characters", [1000, 10**6])
def test_they_hold_the_texts_of_the_corpus_in_its_order(stories, tmp_path, cut, characters):
    stories.data.update(cut)
    stories.model.vocabulary = 300
    made = prepared(stories, tmp_path / "out", characters)
    plain, found = lab.data.open(stories), lab.data.open(of_prepared(stories, tmp_path / "out"))
    assert (len(made["shards"]) > 5) == (characters == 1000)
    for split in shards.SPLITS:
        own, there = getattr(plain, split), getattr(found, split)
        assert [text.tolist() for text in there] == [text.tolist() for text in own]
        assert {text.dtype for text in there} == {np.dtype(np.int32)}
        assert made[split]["texts"] == len(own) and made[split]["tokens"] == sum(map(len, own))
        assert there.mean_bytes == own.mean_bytes
        ids = np.random.default_rng(0).permutation(len(own))
        assert there.lengths(ids).tolist() == own.lengths(ids).tolist() == [len(own[i]) for i in ids]
        again = pickle.loads(pickle.dumps(there))
        assert [again[i].tolist() for i in ids[:9]] == [own[i].tolist() for i in ids[:9]]
    assert found.tokenizer.fingerprint == plain.tokenizer.fingerprint
    rows = [json.loads(line)["text"] for line in (tmp_path / "stories.jsonl").read_text().splitlines()]
    assert made["documents"] == 600 and made["bytes"] == sum(len(row.encode()) for row in rows)


def test_large_ids_fit(stories, tmp_path):
    """More than 65,536 ids: of a tokenizer that has a letter there."""
    from tokenizers import Tokenizer, models

    letters = {letter: 70_000 + n for n, letter in enumerate("abcdefgh \nßü€")} | {"</s>": 0}
    Tokenizer(models.BPE(letters, [])).save(str(tmp_path / "letters.json"))
    stories.data.tokenizer = str(tmp_path / "letters.json")
    stories.model.vocabulary = 80_000
    prepared(stories, tmp_path / "out")
    plain, found = lab.data.open(stories), lab.data.open(of_prepared(stories, tmp_path / "out"))
    assert [text.tolist() for text in found.train] == [text.tolist() for text in plain.train]
    assert max(text.max() for text in found.train) > 2**16


@pytest.mark.parametrize("kind", ["parquet", "gz", "files"])
def test_every_kind_of_file_is_prepared(stories, tmp_path, kind):
    texts = [f"{n} is a number of a text" for n in range(300)]
    if kind == "parquet":
        stories.data.update(corpus="parquet", path=str(write_parquet(tmp_path / "a.parquet", texts)))
    elif kind == "gz":
        import gzip

        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
        stories.data.path = str(tmp_path / "a.jsonl.gz")
    else:
        (tmp_path / "a.txt").write_text("\n".join(texts))  # one text, in blocks
        stories.data.update(corpus="files", path=str(tmp_path / "a.txt"))
    prepared(stories, tmp_path / "out")
    plain, found = lab.data.open(stories), lab.data.open(of_prepared(stories, tmp_path / "out"))
    for split in shards.SPLITS:
        own, there = ([text.tolist() for text in getattr(each, split)] for each in (plain, found))
        assert there == own and own


class Counting:
    """Texts that remember which of them were read."""

    def __init__(self, texts):
        self._texts, self.read = texts, []

    def __len__(self):
        return len(self._texts)

    def __getitem__(self, i):
        self.read.append(int(i))
        return self._texts[i]

    def lengths(self, ids):
        return self._texts.lengths(ids)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_host_reads_the_texts_of_its_rows_and_no_others(shelf, processes):
    """Of each step, and together exactly those of the step, each once."""
    _, config = shelf
    texts = lab.data.open(config).train
    whole = list(pipeline.train_batches(config, texts))
    hosts = [Counting(texts) for _ in range(processes)]
    packers = [pipeline._TextSteps(config, each, index, processes) for index, each in enumerate(hosts)]
    for step, (batch, info) in enumerate(whole):
        parts = [packer(step) for packer in packers]
        np.testing.assert_array_equal(np.concatenate([part.tokens for part, _ in parts]), batch.tokens)
        assert {of for _, of in parts} == {info}
        read = [each.read[:] for each in hosts]
        assert {len(ids) for ids in read} == {24 // processes}  # rows x texts_per_row
        ids = np.concatenate(read)
        assert len({*ids}) == 24 and info.text_hash == pipeline._hash(packers[0]._order[step])
        assert sorted(ids) == sorted(packers[0]._order[step])
        for each in hosts:
            each.read.clear()


def test_batches_depend_on_seed_and_step_alone(shelf, stories):
    _, config = shelf
    texts, plain = lab.data.open(config).train, lab.data.open(stories).train
    expected = list(pipeline.train_batches(stories, plain))
    for start in (0, 3):
        for (batch, info), (other, told) in zip(
            pipeline.train_batches(config, texts, start=start), expected[start:], strict=True
        ):
            np.testing.assert_array_equal(batch.tokens, other.tokens)
            np.testing.assert_array_equal(batch.coordinates.time, other.coordinates.time)
            assert info == told


def test_identity_is_of_the_contents_and_not_of_the_place(shelf, stories, tmp_path):
    out, config = shelf
    first = lab.data.open(config)
    shutil.copytree(out, tmp_path / "moved")
    moved = lab.data.open(of_prepared(stories, tmp_path / "moved"))
    assert (moved.fingerprint, moved.validation_fingerprint) == (first.fingerprint, first.validation_fingerprint)
    config.data.texts = 100
    assert lab.data.open(config).fingerprint != first.fingerprint
    path = tmp_path / "stories.jsonl"
    lines = path.read_text().splitlines()
    row = next(n for n in range(50, 200) if len(json.loads(lines[n])["text"]) > 10)
    lines[row] = json.dumps({"text": "x" + json.loads(lines[row])["text"][1:]})
    path.write_text("\n".join(lines))
    prepared(stories, tmp_path / "other")
    assert lab.data.open(of_prepared(stories, tmp_path / "other")).fingerprint != first.fingerprint


def first_shard(out):
    return min(out.glob("train-*.array_record"))


def test_what_is_missing_or_cut_is_named_before_training(shelf):
    out, config = shelf
    path = first_shard(out)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{path.name} has {len(content) - 1} bytes, not {len(content)} .*lab.prepare"):
        lab.data.open(config)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name} is missing \(the command that made it makes it again"):
        lab.data.open(config)
    path.write_bytes(content)
    lengths = out / "train.lengths"
    kept = lengths.read_bytes()
    lengths.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
    with pytest.raises(UserError, match=r"train.lengths is not what was prepared"):
        lab.data.open(config)
    lengths.unlink()
    with pytest.raises(UserError, match=r"train.lengths is missing"):
        lab.data.open(config)
    lengths.write_bytes(kept)
    manifest = out / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"texts": ', '"texts": 1', 1))
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        lab.data.open(config)


def test_what_is_flipped_is_named_when_it_is_read(shelf):
    """Whatever byte of a shard: its texts are read as they were, or not at all. Most of so small a file is padding, so
    half of the bytes are drawn among those that are not 0."""
    out, config = shelf
    path = first_shard(out)
    content = path.read_bytes()
    anywhere, written = np.arange(len(content)), np.flatnonzero(np.frombuffer(content, np.uint8))
    count = json.loads((out / "manifest.json").read_text())["shards"][0]["train"]["texts"]
    texts = [text.tolist() for text in lab.data.open(config).train]
    refused = 0
    for place in np.concatenate([random().choice(among, 20) for among in (anywhere, written)]):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        train = lab.data.open(config).train  # its size is as it was
        for i in range(count):
            try:
                assert train[i].tolist() == texts[i]
            except UserError as error:
                refused += 1
                assert path.name in str(error) and "cannot be read" in str(error)
    assert refused


def test_a_flipped_shard_ends_training_with_one_line(shelf):
    out, config = shelf
    for path in out.glob("train-*.array_record"):
        content = bytearray(path.read_bytes())
        for place in range(64, len(content), 16):
            content[place] ^= 255
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-\d+.array_record: record \d+ cannot be read: .*lab.prepare"):
        list(pipeline.train_batches(config, lab.data.open(config).train))


def test_a_directory_that_is_none_is_refused(config, tmp_path):
    config.data.corpus = "prepared"
    for path, told in (("", "is empty; corpus prepared needs the dir"), (str(tmp_path), r"has no manifest\.json")):
        config.data.path = path
        with pytest.raises(UserError, match=told):
            lab.data.open(config)


@pytest.mark.parametrize(
    "change",
    [
        dict(text_length=8),
        dict(long_texts="truncate"),
        dict(text_bytes=9, long_texts="refuse"),
        dict(tokenizer="bpe:300"),
    ],
    ids=str,
)
def test_texts_that_were_cut_otherwise_are_refused(shelf, change):
    _, config = shelf
    config.data.update(change)
    with pytest.raises(UserError, match=rf"was prepared with data.({'|'.join(change)}) = .*; set that, or prepare"):
        lab.data.open(config)


def test_a_tokenizer_is_known_by_what_it_is(stories, tmp_path):
    """Not by its name: a checkpoint brings its own as a path."""
    stories.data.tokenizer = "bpe:300"
    stories.model.vocabulary = 300
    prepared(stories, tmp_path / "out")
    config = of_prepared(stories, tmp_path / "out")
    shutil.copy(tmp_path / "out" / "tokenizer.json", tmp_path / "copy.json")
    config.data.tokenizer = str(tmp_path / "copy.json")
    lab.data.open(config)
    changed = json.loads((tmp_path / "copy.json").read_text())
    changed["model"]["merges"].pop()
    (tmp_path / "copy.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"was prepared with data.tokenizer = 'bpe:300'"):
        lab.data.open(config)
    shutil.copy(tmp_path / "copy.json", tmp_path / "out" / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer.json is not the tokenizer of .*manifest.json"):
        lab.data.open(config)


def test_lengths_are_those_of_the_manifest(shelf):
    """A record of another length than is told of is refused, though its own sums are right."""
    _, config = shelf
    train = lab.data.open(config).train
    train._lengths = train._lengths + 1
    with pytest.raises(UserError, match=r"record 0 cannot be read: it has \d+ bytes, and \d tokens are told of"):
        train[0]


def test_texts_beyond_the_last_are_none(shelf):
    _, config = shelf
    config.data.texts = 90
    train = lab.data.open(config).train
    assert len(train) == 90
    for i in (-1, 90):
        with pytest.raises(IndexError):
            train[i]


def test_the_sums_of_a_manifest_are_those_of_its_files(shelf):
    out, _ = shelf
    manifest = json.loads((out / "manifest.json").read_text())
    for shard in (shard for run in manifest["shards"] for shard in run.values()):
        assert shard["digest"] == reading.digest(out / shard["file"])
        assert shard["size"] == (out / shard["file"]).stat().st_size
    assert {shard["file"] for run in manifest["shards"] for shard in run.values()} == {
        path.name for path in out.glob("*.array_record")
    }
