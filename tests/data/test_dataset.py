"""data.open gives both splits apart, tells what was lost, and says when there are too few."""

import concurrent.futures
import json
import multiprocessing

import pytest
from tokenizers import Tokenizer, models

import lab.data
from lab.data import dataset, texts
from lab.errors import UserError
from lab.evaluate import asks


@pytest.fixture(autouse=True)
def nothing_was_said():
    """What is told once is told once in a test."""
    dataset._say.cache_clear()


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


def test_all_validation_texts_are_asked_as_far_as_they_fill_calls(stories):
    stories.evaluate.loss.texts = 0
    count = len(lab.data.open(stories).validation)
    call = stories.evaluate.loss.texts_per_row * stories.evaluate.loss.rows
    filled = asks.filled(stories, range(count)).evaluate.loss.texts
    assert 0 < filled <= count < filled + call and filled % call == 0
    assert stories.evaluate.loss.texts == 0 and asks.filled(stories, range(call)).evaluate.loss.texts == call


def test_fewer_validation_texts_than_a_call_are_refused(stories):
    stories.evaluate.loss.update(texts=0, rows=64)
    with pytest.raises(UserError, match=r"fewer than one call of evaluate.loss.texts_per_row x rows = 6 x 64"):
        lab.data.open(stories)


def test_all_texts_of_a_capped_stream_are_refused(config):
    config.data.update(corpus="huggingface", path="org/stories", texts=100)
    config.evaluate.loss.texts = 0
    with pytest.raises(UserError, match=r"evaluate.loss.texts = 0 asks of all validation texts, and .*name a number"):
        lab.data.open(config)


@pytest.mark.parametrize("texts", [0, 24])
def test_files_that_a_config_does_not_name_are_told_by_size(config, texts):
    config.data.update(corpus="jsonl", texts=100)
    config.evaluate.loss.texts = texts
    said = f"reads 100 training and {texts or 'any number of'} validation texts from corpus jsonl; name its files"
    assert said in dataset.unnamed(config)
    with pytest.raises(UserError, match=said):
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
