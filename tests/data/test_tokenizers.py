"""Tokenizers give back what they were given, and survive being saved."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

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
    path = tmp_path / "words.json"
    # Ids may have gaps: the size is what an embedding must hold.
    Tokenizer(models.WordLevel({"a": 0, "b": 7, "?": 2}, unk_token="?")).save(str(path))
    tokenizer = opened(config, str(path))
    assert (tokenizer.size, tokenizer.eos) == (8, None)


@pytest.mark.parametrize("setting", ["truncation", "padding", "dropout", "all"])
def test_settings_of_its_maker_are_switched_off(bpe, setting):
    made = Tokenizer.from_str(bpe._text)
    if setting in ("truncation", "all"):
        made.enable_truncation(8)
    if setting in ("padding", "all"):
        made.enable_padding(pad_id=0, pad_token="<|endoftext|>", length=64)
    if setting in ("dropout", "all"):
        made.model.dropout = 0.5
    for ids, expected in zip(
        tokenizers.Json(made.to_str()).encode_batch(SENTENCES), bpe.encode_batch(SENTENCES), strict=True
    ):
        np.testing.assert_array_equal(ids, expected)


def words(**options):
    made = Tokenizer(models.WordLevel({"the": 0, "first": 1, "[UNK]": 2}, **options))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def letters(text, normalizer=None, **options):
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(text)}, [], **options))
    made.normalizer = normalizer
    return made


def byte_level():
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    return made


def bert(*pieces):
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(("[UNK]", *pieces))}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def removing(pattern):
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "removed"), made.pre_tokenizer])
    return made


FALLING_BACK = Tokenizer(models.BPE({f"<0x{i:02X}>": i for i in range(256)} | {"a": 256}, [], byte_fallback=True))
PIECES = [("?", 0.0), ("a", -1.0), ("b", -1.0)]
LOWER = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])


@pytest.mark.parametrize(
    "made, text, lost",
    [
        (letters("lonrives t"), "cloud river, stone", "cud,"),
        (letters("ab?", unk_token="?"), "abxa?y", "xy?"),  # the sign itself cannot be told from what it stands for
        (words(unk_token="[UNK]"), "the first  cat\n", "cat"),
        (letters("eabc", normalizer=LOWER), "É Bc\u200d\t\u00ad", ""),  # written otherwise, or never seen
        (letters("é", normalizer=normalizers.NFC()), "e\u0301é", ""),
        (letters("ﬁ"), "fi", "fi"),
        (byte_level(), "naïve 天地 \ud7ff text", ""),
        (bert("i", "do", "not", "##d", "!"), "I do not dod!", ""),  # its decoder makes it don't
        (FALLING_BACK, "a天", ""),
        (Tokenizer(models.Unigram(PIECES, unk_id=0)), "aXb", "X"),
        (removing("x"), "axbx", "xx"),
        (letters("a"), "", ""),
        (letters("ab "), "axb ", "x"),  # as many letters are left out as spaces are at the end
        (letters("ab "), "x天axb \n  ", "xx天"),
        (Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])), "axb \n", "x"),
    ],
)
def test_lost_characters_are_counted(made, text, lost):
    tokenizer = tokenizers.Json(made.to_str())
    batch = [text, text, ""]
    found = tokenizer.lost(batch, tokenizer.encode_batch(batch))
    assert found == Counter(lost * 2)


@given(st.text("abxé天 \t\n"))
def test_a_bpe_loses_the_letters_that_it_does_not_have(text):
    tokenizer = tokenizers.Json(letters("ab é\n").to_str())
    assert tokenizer.lost([text], [tokenizer.encode(text)]) == Counter(c for c in text if c in "x天")


@given(st.text())
def test_bpe_and_bytes_lose_nothing(bpe, text):
    for tokenizer in (bpe, tokenizers.Bytes()):
        assert not tokenizer.lost([text], [tokenizer.encode(text)])


@pytest.mark.parametrize(
    "made", [words(), Tokenizer(models.WordPiece({"a": 0})), Tokenizer(models.Unigram([("a", 0.0)]))], ids=str
)
def test_a_tokenizer_without_an_unknown_token_is_one_clear_line(config, tmp_path, made):
    path = tmp_path / "words.json"
    made.save(str(path))
    config.data.update(tokenizer=str(path))
    tokenizer = opened(config, str(path))
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(
            UserError, match=r"data.tokenizer = '.*words.json' cannot write the corpus: .*; give it an unk"
        ):
            encode("quark b")


@pytest.mark.parametrize(
    "name, message",
    [
        ("bpe:99999999999999999999", "too large; choose at most bpe:1048576"),
        ("bpe:1048577", "too large"),
        ("bpe:" + "9" * 5000, "too large"),
        ("bpe:00000256", "too small; choose at least bpe:257"),
        ("bpe:٣٠٠", "is neither bytes"),
        ("x" * 5000, "is neither bytes"),
        ("~nobody-of-this-name/x", "is neither bytes"),
    ],
)
def test_names_of_tokenizers_that_cannot_be(name, message):
    with pytest.raises(UserError, match=f"data.tokenizer = '.*{message}"):
        tokenizers.check(name)


def test_an_end_of_text_is_taken_or_refused_by_name(config, bpe, tmp_path):
    bpe.save(tmp_path)
    path = str(tmp_path / "tokenizer.json")
    usual = opened(config, path)
    config.data.eos = "<|endoftext|>"
    assert opened(config, path).fingerprint == usual.fingerprint
    config.data.eos = "a"
    other = opened(config, path)
    assert other.decode([other.eos]) == "a" and other.fingerprint != usual.fingerprint
    other.save(tmp_path / "cell")
    loaded = tokenizers.load(tmp_path / "cell", "a")
    assert (loaded.eos, loaded.fingerprint) == (other.eos, other.fingerprint)
    config.data.eos = "</doc>"
    with pytest.raises(
        UserError, match=r"data.eos = '</doc>' is no token of .*; its special tokens are: <\|endoftext\|>"
    ):
        opened(config, path)
    with pytest.raises(UserError, match=r"data.eos = '</doc>' is no token of data.tokenizer = 'bytes'"):
        opened(config, "bytes")


@pytest.mark.parametrize("content", [b"", b'{"version"', b"{}", b"\xff", None])
def test_a_damaged_bpe_is_trained_again(config, cache_root, caplog, content):
    first = opened(config, "bpe:300")
    (entry,) = (cache_root / "tokenizers").iterdir()
    if content is None:
        entry.unlink()
        entry.mkdir()
    else:
        entry.write_bytes(content)
    assert opened(config, "bpe:300").fingerprint == first.fingerprint
    assert [str(entry) in record.getMessage() for record in caplog.records] == [True] * (content != b"{}")


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"{}", b'{"lab": "symbols", "size"', b'{"lab": "symbols", "size": null}']
)
def test_a_damaged_tokenizer_of_a_cell_is_one_line(tmp_path, content):
    (tmp_path / tokenizers.FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is ") as error:
        tokenizers.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_tokenizer_is_refused(config, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer.json"):
        opened(config, str(path))
    with pytest.raises(UserError, match=r"holds no tokenizer.json"):
        tokenizers.load(tmp_path / "elsewhere")
