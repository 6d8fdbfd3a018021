"""Tokenizers give back what they were given, and survive being saved."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.data import tokenizers
from lab.data.corpora import Corpus, Document
from lab.errors import UserError

SENTENCES = [f"the {a} branch decodes {b} tokens, naïvely\n" for a in ("first", "last") for b in range(40)]


def corpus(texts=SENTENCES, fingerprint="sentences"):
    held_out = [Document("held out", "zzqqzzqq " * 50, True)]
    return Corpus(fingerprint, "sentences", lambda: iter([Document("t", t, False) for t in texts] + held_out))


def opened(config, name, **options):
    config.data.tokenizer = name
    return tokenizers.open(config.data, corpus(**options))


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.Json(tokenizers._train(iter(SENTENCES), 300))


@given(st.text())
def test_bytes_round_trip(text):
    ids = tokenizers.Bytes().encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizers.Bytes().decode(ids) == text


@given(st.text())
def test_bpe_round_trip(bpe, text):
    for written in (text, text + "<|endoftext|>" + text):
        ids = bpe.encode(written)
        assert ids.dtype == np.int32
        assert bpe.eos not in ids
        assert bpe.decode(ids) == written
        np.testing.assert_array_equal(bpe.encode_batch([text, written])[1], ids)


@given(st.binary())
def test_bytes_decode_anything(content):
    assert tokenizers.Bytes().decode([*content, 256, 257]) == content.decode("utf-8", "replace")


def test_bytes_describe_themselves():
    tokenizer = tokenizers.Bytes()
    assert (tokenizer.size, tokenizer.eos) == (258, 256)


def test_bpe_learns_the_training_split_alone(config):
    tokenizer = opened(config, "bpe:300")
    assert tokenizer.size == 300
    assert tokenizer.decode([tokenizer.eos]) == ""
    assert len(tokenizer.encode(SENTENCES[0])) < len(SENTENCES[0]) / 2
    assert len(tokenizer.encode("zzqqzzqq")) == 8


def test_bpe_is_trained_once_and_always_alike(config, cache_root, monkeypatch):
    first = opened(config, "bpe:300")
    assert opened(config, "bpe:300", fingerprint="the same again").fingerprint == first.fingerprint
    assert opened(config, "bpe:280").fingerprint != first.fingerprint
    monkeypatch.setattr(tokenizers, "_train", None)
    assert opened(config, "bpe:300").fingerprint == first.fingerprint
    assert len(list((cache_root / "tokenizers").iterdir())) == 3


def test_a_corpus_smaller_than_the_vocabulary_gives_a_smaller_tokenizer(config):
    tokenizer = opened(config, "bpe:5000", texts=["ab"] * 5)
    assert 257 <= tokenizer.size < 300
    assert tokenizer.encode("ab").max() < tokenizer.size


@pytest.mark.parametrize("name", ["bytes", "bpe:300"])
def test_saved_tokenizers_load(config, tmp_path, name):
    tokenizer = opened(config, name)
    tokenizer.save(tmp_path / "cell")
    loaded = tokenizers.load(tmp_path / "cell")
    assert (loaded.size, loaded.eos, loaded.fingerprint) == (tokenizer.size, tokenizer.eos, tokenizer.fingerprint)
    np.testing.assert_array_equal(loaded.encode(SENTENCES[3]), tokenizer.encode(SENTENCES[3]))


def test_any_tokenizer_json_opens(config, bpe, tmp_path):
    bpe.save(tmp_path)
    tokenizer = opened(config, str(tmp_path / "tokenizer.json"))
    assert (tokenizer.size, tokenizer.eos, tokenizer.fingerprint) == (bpe.size, bpe.eos, bpe.fingerprint)


def test_a_tokenizer_without_an_end_of_text_has_none(config, tmp_path):
    from tokenizers import Tokenizer, models

    path = tmp_path / "words.json"
    # Ids may have gaps: the size is what an embedding must hold.
    Tokenizer(models.WordLevel({"a": 0, "b": 7, "?": 2}, unk_token="?")).save(str(path))
    tokenizer = opened(config, str(path))
    assert (tokenizer.size, tokenizer.eos) == (8, None)


def test_a_file_that_is_no_tokenizer_is_refused(config, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer.json"):
        opened(config, str(path))
    with pytest.raises(UserError, match=r"holds no tokenizer.json"):
        tokenizers.load(tmp_path / "elsewhere")
