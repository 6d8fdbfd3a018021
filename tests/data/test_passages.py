"""Many questions over one passage: answers that a reader finds, branches that an engine can go on from, rows of
(seed, step, row) alone."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lab.config
from lab import data
from lab.data import generated, questions
from lab.data.probes import PROBES, RowSettings
from lab.errors import UserError
from lab.evaluate import asks


def read(text: list[int]) -> dict[int, list[int]]:
    """{name: value} of a passage, read from its end: a fact is what stands between two marks."""
    found, words = {}, []
    for token in [*text, None]:
        if token == 1:
            found[words[0]] = words[1:]
            words = []
        elif token:
            words.append(token)
    assert not words
    return found


@st.composite
def passages(draw):
    """(difficulty, settings, a row)"""
    difficulty, asked = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    made = RowSettings(0, draw(st.integers(4 * difficulty, 80)), 5, asked)
    least = PROBES["passage"].tokens(difficulty, made)
    made = made._replace(length=draw(st.integers(least, least + 20)))
    return difficulty, made, PROBES["passage"].row(np.random.default_rng(draw(st.integers(0, 2**32))), difficulty, made)


@given(passages())
def test_a_reader_of_the_passage_answers_every_question(drawn):
    difficulty, made, row = drawn
    at, count = row.coordinates, row.coordinates.branch.max()
    known = read(row.tokens[at.branch == 0].tolist())
    assert len(known) == difficulty and 1 <= count <= min(difficulty, made.questions)
    asked = []
    for branch in range(1, count + 1):
        (places,) = np.nonzero(at.branch == branch)
        name, *value, end = row.tokens[places]
        assert known[name] == value and end == 1 and 1 <= len(value) <= 3
        assert row.labels[places].tolist() == [*value, 1, -1]
        asked.append(name)
    assert len({*asked}) == count
    every = [symbol for name, value in known.items() for symbol in (name, *value)]
    assert len({*every}) == len(every) and max(every) < 2 + made.symbols and min(every) >= 2


@given(passages())
def test_branches_begin_where_the_passage_ends_and_it_is_never_a_label(drawn):
    _, made, row = drawn
    at = row.coordinates
    prompt = (at.branch == 0).sum()
    assert {len(x) for x in (row.tokens, row.labels, *jax.tree.leaves(at))} == {made.length}
    assert (at.segment == 0).all() and (row.labels[at.branch == 0] == -1).all()
    assert (at.index == np.arange(made.length)).all() and (at.time[:prompt] == np.arange(prompt)).all()
    for branch in range(1, at.branch.max() + 1):
        assert (at.time[at.branch == branch] == prompt + np.arange((at.branch == branch).sum())).all()
    order = np.lexsort((at.branch, at.time))
    assert (order == np.arange(made.length)).all()


def small(**fields):
    config = lab.config.base()
    config.data.update(dict(corpus="passage", text_length=60, rows=4) | fields)
    config.data.probe.update(dict(difficulty="2-6", questions=4))
    config.evaluate.loss.update(dict(kind="difficulty", texts=12, rows=4, difficulties=(2, 5)))
    config.train.steps = 5
    return config


def steps_of(config, **options):
    return list(data.train_batches(config, None, **options))


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
        assert one[1] == other[1]


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    config = small()
    whole = steps_of(config)
    assert_same(steps_of(config, start=2), whole[2:])
    halves = zip(*(steps_of(config, process_index=i, process_count=2) for i in range(2)), strict=True)
    joined = [(jax.tree.map(lambda *x: np.concatenate(x), *[b for b, _ in step]), step[0][1]) for step in halves]
    assert_same(joined, whole)
    nominal = data.nominal_coordinates(config, 8)
    first = jax.tree.map(lambda *x: np.concatenate(x), *(batch.coordinates for batch, _ in whole[:2]))
    jax.tree.map(np.testing.assert_array_equal, nominal, first)
    config.seed = 1
    other = {row.tobytes() for batch, _ in steps_of(config) for row in batch.tokens}
    assert not other & {row.tobytes() for batch, _ in whole for row in batch.tokens} and len(other) == 20


def test_the_hash_tells_of_the_number_of_questions():
    config = small()
    before = [info.text_hash for _, info in steps_of(config)]
    config.data.probe.questions = 5
    assert not {*before} & {info.text_hash for _, info in steps_of(config)}


def test_passages_that_are_asked_are_the_same_whatever_is_trained_and_none_of_it():
    config = small()
    asked = questions.of_facts(config.data, 5, 3, 6)
    for one in asked:
        known = read([int(word) for word in one.context.split()])
        assert len(known) == 5 and len({each.text for each in one.questions}) == len(one.questions) == 3
        for each in one.questions:
            assert each.answers == (" ".join(map(str, known[int(each.text)])),)
    assert len({one.context for one in asked}) == 6 and asked[:2] == questions.of_facts(config.data, 5, 3, 2)
    trained = [
        read(row[at == 0].tolist())
        for b, _ in steps_of(config)
        for row, at in zip(b.tokens, b.coordinates.branch, strict=True)
    ]
    told = generated.evaluation_batches(config, config.evaluate.loss, None, 5)
    trained += [
        read(row[at == 0].tolist()) for b in told for row, at in zip(b.tokens, b.coordinates.branch, strict=True)
    ]
    assert not [one for one in asked if read([*map(int, one.context.split())]) in trained]
    config.seed, config.data.rows, config.data.probe.difficulty = 3, 8, "fixed2"
    assert questions.of_facts(config.data, 5, 3, 6) == asked


@pytest.mark.parametrize(("fields", "told"), [
    ({"text_length": 49}, "difficulty = 6 of the probe passage needs rows of 50 tokens, over data.text_length = 49"),
    ({"probe.symbols": 23}, "difficulty = 6 of the probe passage needs 24 symbols, over data.probe.symbols = 23"),
    ({"probe.questions": 0}, "data.probe.questions = 0 must be at least 1"),
])  # fmt: skip
def test_what_has_no_room_is_refused(fields, told):
    config = small()
    data.check(config)
    config.data.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=told):
        data.check(config)


def test_questions_are_of_passages_alone():
    config = small()
    config.data.update(dict(corpus="mqar"))
    config.data.probe.update(dict(questions=3))
    with pytest.raises(UserError, match=r"data\.probe\.questions = 3 means nothing beside data\.corpus = 'mqar'"):
        data.check(config)
    asks.check(small())
