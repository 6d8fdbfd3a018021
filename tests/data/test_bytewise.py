"""Bytes of ids, and texts that bytes cut: the same for every tokenizer, and each byte of them is predicted once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import lab.config
from lab import data as lab_data
from lab.data import bytewise, checks, texts, tokenizers
from lab.data.corpora import Corpus, Document
from lab.errors import UserError

WORDS = [f"def naïve_{a}(x):\n    return {b} * x  # 字\n" for a in ("first", "last") for b in range(40)]
TEXT = st.text() | st.lists(st.sampled_from(["def ", "x", "字", "naïve", "\n", " ", "é", "return"])).map("".join)


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.Json(tokenizers._train(iter(WORDS), 320))


def as_json(bpe, change) -> tokenizers.Json:
    made = Tokenizer.from_str(bpe._text)
    change(made)
    return tokenizers.Json(made.to_str())


@pytest.mark.slow
@settings(max_examples=40)
@given(TEXT)
def test_bytes_of_ids_add_up_to_those_of_the_text(bpe, text):
    for tokenizer in (tokenizers.Bytes(), bpe):
        for written in (text, text + "<|endoftext|>" + text):
            ids = tokenizer.encode(written)
            assert tokenizer.bytes_of_ids[ids].sum() == len(written.encode())
            # And of any part: of each token by itself, as it decodes among others.
            assert all(tokenizer.bytes_of_ids[ids] >= 1)


def test_each_id_stands_for_what_it_was_merged_from(bpe):
    assert bpe.bytes_of_ids[bpe.eos] == 0 and len(bpe.bytes_of_ids) == bpe.size
    for word in (w for text in WORDS for w in ("return", " *", "def", "字", " x", text)):
        pieces = [bpe.decode([id]) for id in bpe.encode(word)]
        for id, piece in zip(bpe.encode(word), pieces, strict=True):
            assert "�" in piece or bpe.bytes_of_ids[id] == len(piece.encode())
    assert (tokenizers.Bytes.bytes_of_ids == [1] * 256 + [0, 0]).all()


def test_special_tokens_are_no_text_and_added_ones_are_theirs(bpe):
    def add(made):
        made.add_special_tokens(["<|system|>"])
        made.add_tokens([AddedToken("naïveté", special=False)])

    made = as_json(bpe, add)
    special, added = made.size - 2, made.size - 1
    assert made.bytes_of_ids[[special, added]].tolist() == [0, len("naïveté".encode())]
    text = "x naïveté <|system|>"
    assert made.bytes_of_ids[made.encode(text)].sum() == len(text.encode()) and added in made.encode(text)


def test_what_is_not_byte_level_counts_no_bytes():
    words = tokenizers.Json(Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str())
    assert words.bytes_of_ids is None and tokenizers.Symbols(9).bytes_of_ids is None


@settings(max_examples=60)
@given(TEXT, st.integers(4, 40))
def test_pieces_are_the_text_and_no_larger_than_asked(text, most):
    found = bytewise.pieces(text, most)
    assert "".join(found) == text
    assert all(0 < len(piece.encode()) <= most for piece in found)
    assert all(len(piece.encode()) > most // 2 - 4 for piece in found[:-1])


def test_pieces_end_with_lines_else_before_words():
    assert bytewise.pieces("one\ntwo\nthree", 10) == ["one\ntwo\n", "three"]
    assert bytewise.pieces("a line of words", 11) == ["a line of", " words"]
    assert bytewise.pieces("\nunbroken", 8) == ["\nunbroke", "n"]  # an end of line that would leave half a text


def corpus(documents):
    return Corpus(f"{len(documents)} documents", "documents", lambda: iter(documents))


def documents(seed):
    rng = np.random.default_rng(seed)
    every = ["".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(30)]
    return [Document(str(i), text, i % 5 == 0, ends=i % 7 != 1) for i, text in enumerate(every)] + [
        Document("empty", "", False)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_tokenizers_have_the_same_texts_and_every_byte_is_a_label_once(bpe, seed):
    made = documents(seed)
    entries = {
        tokenizer: texts.prepare(corpus(made), tokenizer, 66, "refuse", text_bytes=64)
        for tokenizer in (tokenizers.Bytes(), bpe)
    }
    for split, held_out in (("train", False), ("validation", True)):
        read = {}
        for tokenizer, entry in entries.items():
            opened = texts.Texts(entry, split)
            read[tokenizer.name] = [tokenizer.decode(opened[i]) for i in range(len(opened))]
            assert all(opened[i][0] == tokenizer.eos for i in range(len(opened)))
            sizes = [int(tokenizer.bytes_of_ids[opened[i][1:]].sum()) for i in range(len(opened))]
            assert sizes == [len(text.encode()) for text in read[tokenizer.name]]
            assert opened.mean_bytes == pytest.approx(np.mean(sizes))
            ends = sum(opened[i][-1] == tokenizer.eos for i in range(len(opened)))
            assert ends == sum(d.ends and d.text != "" for d in made if d.validation == held_out)
        ours, theirs = read.values()
        assert ours == theirs and "".join(ours) == "".join(d.text for d in made if d.validation == held_out)


def test_a_limit_counts_the_bytes_of_what_is_kept(bpe):
    entry = texts.prepare(corpus(documents(0)), bpe, 66, "refuse", (3, 2), text_bytes=64)
    opened = texts.Texts(entry, "train")
    sizes = [bpe.bytes_of_ids[opened[i]].sum() for i in range(len(opened))]
    assert len(opened) == 3 and opened.mean_bytes == pytest.approx(np.mean(sizes))
    assert texts.Texts(texts.prepare(corpus(documents(0)), bpe, 66, "split"), "train").mean_bytes is None


def test_steps_read_the_same_texts_whatever_the_tokenizer(tmp_path):
    (tmp_path / "some.txt").write_text("".join(WORDS * 4))
    config = lab.config.base()
    config.data.update(corpus="files", path=str(tmp_path / "some.txt"), text_bytes=30, long_texts="refuse")
    config.data.update(text_length=32, rows=4)
    config.evaluate.loss.update(texts=4, rows=4)
    config.train.steps = 30  # more than an epoch
    hashes, asked = [], []
    for name, size in (("bytes", 258), ("bpe:300", 300)):
        config.data.tokenizer, config.model.vocabulary = name, size
        data = lab_data.open(config)
        hashes.append([info.text_hash for _, info in lab_data.train_batches(config, data.train)])
        (batch,) = lab_data.pipeline.evaluation_batches(config, config.evaluate.loss, data.validation, 1)
        asked.append(data.tokenizer.bytes_of_ids[batch.labels[batch.labels >= 0]].sum())
    assert hashes[0] == hashes[1] and len({*hashes[0]}) > 20 and asked[0] == asked[1] > 4 * 15


def test_what_cannot_be_cut_by_bytes_is_refused(bpe):
    config = lab.config.base()
    config.data.update(text_bytes=3, long_texts="refuse")
    with pytest.raises(UserError, match=r"data\.text_bytes = 3 holds not every character; .* at least 4"):
        checks.check_training(config)
    config.data.update(text_bytes=64, long_texts="split")
    with pytest.raises(UserError, match=r"data\.long_texts = 'split' would cut by tokens .*choose refuse"):
        checks.check_training(config)
    with pytest.raises(
        UserError, match=r"a text of 64 bytes of a has 66 tokens, over data\.text_length = 65; raise it"
    ):
        texts.prepare(corpus([Document("a", "x" * 64, False)]), tokenizers.Bytes(), 65, "refuse", text_bytes=64)
    with pytest.raises(
        UserError, match=r"data\.tokenizer = 'symbols' has ids that stand for no number of bytes; .*bpe"
    ):
        texts.prepare(corpus(documents(0)), tokenizers.Symbols(9), 66, "refuse", text_bytes=64)

    spaced = as_json(bpe, lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)))
    with pytest.raises(UserError, match="writes 65 of 64 bytes of a text of a: bits per byte would count others"):
        texts.prepare(corpus([Document("a", "x" * 64, False)]), spaced, 70, "refuse", text_bytes=64)
