"""Documents of retrieval are sized in tokens, and their answers follow from their text; exact means greedy."""

import re
import string
from collections import Counter

import jax
import numpy as np
import pytest
import test_long
import tiny
import tokenizers
from tokenizers import decoders, models, normalizers

import lab.config
from lab.data.tokenizers import Bytes, Json, load
from lab.errors import UserError
from lab.evaluate import asks, conditions, passes, retrieval
from lab.evaluate.long import LongRows
from lab.evaluate.passes import Pass
from lab.evaluate.retrieval import TASKS, document


class Pairs:
    """Two letters a token: tokens are not letters."""

    @staticmethod
    def encode(text):
        letters = np.frombuffer(text.encode().ljust(len(text) + len(text) % 2), np.uint8).reshape(-1, 2)
        return (256 * letters[:, 0].astype(np.int32) + letters[:, 1]).astype(np.int32)

    @staticmethod
    def decode(ids):
        return b"".join(bytes([i // 256, i % 256]) for i in map(int, ids)).decode()


def passkey(text):
    (key,) = {*re.findall(r"The pass key is (\d+)\.", text)}
    assert 1 <= int(key) <= 50_000 and text.count(key) == 2
    return key


def needle(text):
    (asked,) = re.findall(r"What is the magic number of (\w+)\?", text)
    return ", ".join(re.findall(rf"The magic number of {asked} is (\d{{7}})\.", text))


def tracking(text):
    (value,) = re.findall(r"Which variables have the value (\d+)\?", text)
    holds = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text))

    def follow(name):
        return holds[name] if holds[name].isdecimal() else follow(holds[name])

    return " ".join(name for name in holds if follow(name) == value)


def frequent(text):
    body = text.split("Count them. ")[1].split(" Which 3")[0].split()
    ranked = Counter(body).most_common(4)
    assert len({count for _, count in ranked[:3]} | {ranked[2][1] - ranked[3][1] > 0}) >= 3
    assert ranked[2][1] > ranked[3][1] and ranked[0][1] > ranked[1][1] > ranked[2][1]
    return " ".join(word for word, _ in ranked[:3])


SOLVED = {"passkey": passkey, "needle": needle, "needle-keys": needle, "needle-values": needle, "tracking": tracking,
          "frequent": frequent}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokenizer", [Bytes(), Pairs()], ids=["bytes", "pairs"])
def test_answers_follow_from_the_text_which_fills_its_tokens(task, tokenizer):
    seen = set()
    for number in range(3):
        for length in (700, 2000):
            tokens, answer = document(tokenizer, task, number, length)
            text, wanted = tokenizer.decode(tokens), tokenizer.decode(answer).strip()
            assert wanted == f"{SOLVED[task](text)}."
            longest = max(map(len, retrieval.GARBAGE)) + 1
            assert length - longest - 1 <= len(tokens) + len(answer) <= length
            seen.add((number, wanted))
    assert len(seen) == 3, "a document of one number says the same at every length, those of others something else"


@pytest.mark.parametrize("count", [*range(60), 85, 400, 3000])
def test_the_commonest_words_are_the_commonest_however_few_there_are(count):
    content = retrieval.frequent(np.random.default_rng(count))
    ranked = [*Counter(content.filler(count)).most_common(4), ("", 0)]
    assert [word for word, _ in ranked[:3]] == content.answer.strip(" .").split()
    assert ranked[0][1] > ranked[1][1] > ranked[2][1] > ranked[3][1]


def test_an_answer_is_written_behind_its_text():
    """A tokenizer that marks the beginning of what it is given, as that of Llama 2, would mark an answer by itself."""
    made = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate("▁" + string.printable)}, []))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    text, answer = document(Json(made.to_str()), "passkey", 0, 700)
    assert made.encode(TASKS["passkey"].intro).ids[0] == text[0] == 0
    assert "".join(made.id_to_token(i) for i in answer).count("▁") == 1


@pytest.fixture
def chatting(tmp_path):
    """A tokenizer of letters with a chat template."""
    made = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(string.printable)}, []))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<s>", "<end>"])
    made.save(str(tmp_path / "tokenizer.json"))
    template = "<s>{% for m in messages %}{{ m.role }}:{{ m.content }}<end>{% endfor %}assistant:"
    (tmp_path / "chat_template.jinja").write_text(template)
    return load(tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_a_document_in_a_chat_is_a_message_and_its_answer_is_begun(task, chatting):
    plain = document(chatting, task, 0, 800)
    tokens, answer = document(chatting, task, 0, 800, chat=True)
    assert 800 - 60 <= len(tokens) + len(answer) <= 800
    first, end = (chatting.encode_chat(name) for name in ("<s>", "<end>"))
    assert tokens[0] == first and (tokens == end).sum() == 1 and answer.tolist() == plain[1].tolist()
    (at,) = np.flatnonzero(tokens == end)
    body, begun = chatting.decode(tokens[:at]), chatting.decode(tokens[at:])
    question = chatting.decode(plain[0]).rpartition("? ")
    assert body.startswith(f"user:{TASKS[task].intro}") and body.endswith("?")
    assert begun == f"assistant:{question[2]}" and body.split()[-1] == question[0].split()[-1] + "?"


def test_rows_of_a_chat_begin_as_the_template_says_and_others_as_ever(chatting):
    of = dict(lengths=(400,), tasks=("passkey",), texts=2, bos=7)
    begins = chatting.encode_chat("<s>")[0]
    for tokenizer, chat, first in ((chatting, True, begins), (chatting, False, 7), (Bytes(), True, 7)):
        config = asked(chat=chat, **of)
        rows = retrieval.rows(config, config.evaluate.found, None, tokenizer, 400)
        assert (rows.tokens[:, 0] == first).all() and ((rows.tokens >= 0).sum(1) > 330).all()


def test_garbage_alone_grows_with_the_length():
    """What is hidden stands at the same share of every length."""
    shares = []
    for length in (1000, 4000):
        text = Bytes().decode(document(Bytes(), "passkey", 1, length)[0])
        shares.append(text.index("The pass key is") / len(text))
    assert shares[0] == pytest.approx(shares[1], abs=0.12)


def test_what_does_not_fit_is_told():
    with pytest.raises(UserError, match=r"a document of the task needle-values has at least .* over a length of 60"):
        document(Bytes(), "needle-values", 0, 60)


def asked(**fields):
    config = test_long.config_of()
    config.model.vocabulary = 258
    given = dict(lengths=(300, 400), tasks=("passkey", "needle"), texts=2, rows=4, chunk=100) | fields
    lab.config.add_ask(config, "found", "retrieval", **given)
    return config


def test_rows_end_with_their_answers_and_sums_are_kept_by_document():
    config = asked(bos=256)
    of = retrieval.rows(config, config.evaluate.found, None, Bytes(), 300)
    assert of.document.tolist() == [0, 1, 0, 1] and of.part.tolist() == [0, 0, 1, 1]
    right = np.ones(of.labels.shape, bool)
    for row, (task, number) in enumerate((t, n) for t in ("passkey", "needle") for n in (0, 1)):
        tokens, answer = document(Bytes(), task, number, 299)
        whole = np.concatenate([[256], tokens, answer])
        np.testing.assert_array_equal(of.tokens[row][of.tokens[row] >= 0], whole)
        (at,) = np.nonzero(of.labels[row] >= 0)
        np.testing.assert_array_equal(of.labels[row][at], answer)
        np.testing.assert_array_equal(of.labels[row][at], of.tokens[row][at + 1])
    right[1, np.nonzero(of.labels[1] >= 0)[0][-1]] = False  # one token of one answer
    found = retrieval.summary(config, config.evaluate.found, 300, of, np.ones(of.labels.shape), right)
    assert found.documents["exact"] == [[1, 0], [1, 1]] and found.further["exact"] == 0.75
    assert (found.further["exact_passkey"], found.further["exact_needle"]) == (0.5, 1.0)
    assert found.nats == found.tokens == (of.labels >= 0).sum() and found.right == found.tokens - 1
    assert found.further["read"] == (of.tokens >= 0).sum()


def test_every_token_right_is_what_greedy_decoding_finds():
    config = test_long.config_of()
    model = tiny.model(config)
    forward = jax.jit(lambda tokens: model(tokens))
    prompt = np.random.default_rng(0).integers(0, test_long.VOCABULARY, 9).astype(np.int32)
    text = prompt
    for _ in range(4):
        padded = np.pad(text, (0, 16 - len(text)))[None]
        text = np.append(text, np.asarray(forward(padded))[0, len(text) - 1].argmax()).astype(np.int32)
    other = text.copy()
    other[-2] = (other[-2] + 1) % test_long.VOCABULARY
    tokens = np.stack([text, other])
    labels = np.full_like(tokens, -1)
    labels[:, 8:12] = tokens[:, 9:]
    of = LongRows(tokens, labels, np.array([0, 1]), np.array([0, 0]))
    _, right, _ = passes.score_all(model, of, Pass(2, 5, 15), tiny.mesh(), lambda: None)
    assert right[0, 8:12].all() and not right[1, 8:12].all()


def test_an_ask_gives_a_row_for_each_length():
    config = asked(tasks=("passkey",), lengths=(300,))
    model = tiny.model(config)
    (one,) = conditions.evaluate(config, "found", model, None, tiny.mesh(), stop=lambda: False, tokenizer=Bytes())
    assert one.value == 300 and one.further["exact_passkey"] in (0, 0.5, 1) and one.further["documents"] == 2
    assert one.documents["tokens"] == [[len(document(Bytes(), "passkey", n, 300)[1]) for n in (0, 1)]]


@pytest.mark.parametrize(
    ("fields", "told"),
    [(dict(tasks=()), "evaluate.found.tasks is empty"), (dict(tasks=("pass",)), "evaluate.found.tasks"),
     (dict(texts=0), "evaluate.found.texts = 0 is too small")],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(fields, told):
    with pytest.raises(UserError, match=told):
        asks.check(asked(**fields))
