"""Key tokens are those that one evaluator predicts from far context alone; LongPPL is over them."""

import jax
import numpy as np
import pytest
import test_long
import tiny

from lab.data.tokenizers import Bytes, Json, _train
from lab.errors import UserError
from lab.evaluate import asks, keys, long
from lab.evaluate.long import LongRows


@pytest.mark.parametrize("bos", [-1, 7])
def test_keys_are_their_definition(bos, monkeypatch):
    monkeypatch.setattr(keys, "GAIN", 0.01)  # of random weights: about a half
    monkeypatch.setattr(keys, "SURE", 3.2)
    config = test_long.config_of(evaluator="x", short=4, block=5, lengths=(17,), bos=bos, stride=3)
    evaluator = tiny.model(config, seed=5)
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(evaluator(tokens)[0]))

    def last(text):
        """Nats of the last token of a text given the others."""
        padded = np.zeros((1, 20), np.int32)
        padded[0, : len(text)] = text
        return -float(forward(padded)[len(text) - 2, text[-1]])

    of = long.rows(config, config.evaluate.long, test_long.texts(), None, 17)
    found = keys.find(evaluator, config.evaluate.long, of, tiny.mesh(), lambda: None)
    first = int(bos >= 0)
    for row in np.nonzero(of.part == 0)[0]:
        text = of.tokens[row]
        for at in range(16):
            target = at + 1
            begin = first + 4 + (target - first - 4) // 5 * 5
            if target < first + 4:
                assert not found[row, at], "the first tokens are never key"
                continue
            near = np.concatenate([text[:first], text[begin - 4 : target + 1]])
            short_loss, long_loss = last(near), last(text[: target + 1])
            if abs(short_loss - long_loss - 0.01) > 1e-4 and abs(long_loss - 3.2) > 1e-4:
                assert found[row, at] == (short_loss - long_loss > 0.01 and long_loss < 3.2)
    assert 0 < found.sum() < (of.part == 0).sum() * 13 and not found[of.part > 0].any()


def test_long_ppl_is_over_keys_and_none_means_no_score():
    config = test_long.config_of(lengths=(6,), stride=0, documents=2)
    rng = np.random.default_rng(0)
    tokens, nats = rng.integers(0, 9, (2, 6)).astype(np.int32), rng.random((2, 6))
    labels = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    chosen = np.zeros((2, 6), bool)
    chosen[0, 2] = chosen[1, 4] = chosen[1, 1] = True
    right = np.zeros((2, 6), bool)
    for of_keys, wanted in ((chosen, np.exp(nats[chosen].mean())), (np.zeros((2, 6), bool), None)):
        of = LongRows(tokens, labels, np.array([0, 1]), np.array([0, 0]), of_keys)
        found = long.summary(config, config.evaluate.long, 6, of, nats, right)
        assert found.further["keys"] == of_keys.sum() and found.documents["keys"] == of_keys.sum(1).tolist()
        assert found.further["long_ppl"] == (None if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize("bos", [-1, 7])
def test_an_evaluator_of_other_tokens_reads_the_same_text(bos, monkeypatch):
    """One of bytes chooses for tokens of several: those that have a byte of a key. The keys are drawn, as bytes."""
    rng, given = np.random.default_rng(bos + 1), "déjà vu, and then and then the theory of the other thing … "
    merged = Json(_train([given * 20], 300))
    lone = next(i for i in range(merged.size) if merged.written([i]) == b"\xa9")  # the end of a letter
    tokens = np.array([[*([merged.eos] if bos >= 0 else []), lone, *merged.encode(given * 4)]], np.int32)
    of, drawn = LongRows(tokens, np.roll(tokens, -1, axis=1), np.zeros(1, int), np.zeros(1, int)), {}

    def choose(model, ask, rows, mesh, stop):
        assert ask.lengths == (rows.tokens.shape[1],) and ask.bos == -1
        drawn["tokens"], drawn["keys"] = rows.tokens[0], rng.random(rows.tokens.shape) < 0.1
        drawn["keys"][:, -1] = False
        return drawn["keys"]

    monkeypatch.setattr(keys, "find", choose)
    config = test_long.config_of(evaluator="x", short=4, block=5)
    found = keys.find_in_text(None, Bytes(), merged, config.evaluate.long, of, None, None)[0]
    assert bytes(drawn["tokens"].tolist()) == (given * 4).encode()
    key_bytes, begin = {at + 2 for at in np.nonzero(drawn["keys"][0])[0]}, 0  # of labels, behind the byte that is lost
    for at, token in enumerate(tokens[0]):
        own = range(begin, begin := begin + len(merged.written([token])))
        assert not at or found[at - 1] == bool(key_bytes & {*own})
    assert 0 < found.sum() < len(found) - 1 and not found[-1]


def test_text_is_found_among_bytes_that_are_none():
    text, places = keys.in_text(b"\x80a\xc3\xa9\xe2\x82b\xff")
    assert text == "aéb" and places.tolist() == [1, 2, 3, 6]
    assert keys.in_text(b"")[0] == ""


def test_a_tokenizer_writes_the_bytes_that_it_counts():
    text = "".join(map(chr, (*range(0x20, 0x180), 0x2026, 0x1F600)))
    made = Json(_train([text], 300))
    ids = made.encode(text)
    assert made.written(ids) == text.encode() and Bytes().written([*b"a", 256, *b"b"]) == b"ab"
    assert [len(made.written([i])) for i in range(made.size)] == made.bytes_of_ids.tolist()


def test_a_short_context_as_long_as_the_document_is_refused():
    with pytest.raises(UserError, match=r"evaluate.long.short = 4096 leaves no key tokens in documents of 5"):
        asks.check(test_long.config_of(evaluator="x"))
