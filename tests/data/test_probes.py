"""Every label of a probe follows from the tokens before it, and every row from (seed, step, row) alone."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lab.config
from lab import data
from lab.data import generated, tokenizers
from lab.data.probes import PROBES, RowSettings
from lab.errors import UserError
from lab.evaluate import asks
from lab.options import set_field

LENGTH = 40
SINGLE = [name for name in PROBES if name != "passage"]  # whose rows are one text: tests/data/test_passages.py


def recall(seen, settings):
    """The token after the first occurrence of the last one: for mqar and induction."""
    return seen[seen.index(seen[-1]) + 1]


def copied(seen, settings):
    """As many tokens after the first as the last is after the mark."""
    return seen[len(seen) - 1 - seen.index(1)]


def arrangement(seen, settings):
    """Moves objects about one permutation at a time; ranks by the factorial number system, not by listing."""
    n, held = settings.objects, list(range(settings.objects))
    for token in seen:
        rank, left, moves = token - 2, list(range(n)), []
        for place in range(n, 0, -1):
            digit, rank = divmod(rank, math.factorial(place - 1))
            moves.append(left.pop(digit))
        held = [held[move] for move in moves]
    return 2 + sum(sorted(held[i:]).index(held[i]) * math.factorial(n - 1 - i) for i in range(n))


def odd_one(seen, settings):
    """The only token of the second half of the alphabet."""
    (found,) = [token for token in seen if token >= 2 + settings.symbols // 2]
    return found


SOLVERS = {"mqar": recall, "copy": copied, "induction": recall, "state": arrangement, "needle": odd_one}
ANSWERS = {"mqar": 0, "copy": 0, "induction": -1, "state": 0}  # labels of a row, less its difficulty


@st.composite
def drawn_rows(draw, name):
    """(difficulty, settings, tokens, labels) of a row at any difficulty that fits."""
    probe = PROBES[name]
    settings = RowSettings(LENGTH, draw(st.integers(4, 40)), draw(st.integers(2, 5)))
    fits = [
        d
        for d in range(probe.easiest, LENGTH + 1)
        if probe.tokens(d, settings) <= LENGTH and probe.symbols(d) <= probe.alphabet(settings)
    ]
    difficulty = draw(st.sampled_from(fits))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return difficulty, settings, *generated.padded_row(probe, rng, difficulty, settings)[:2]


@pytest.mark.parametrize("name", SINGLE)
@given(data=st.data())
def test_a_solver_that_reads_only_the_prompt_gives_every_label(name, data):
    _, settings, tokens, labels = data.draw(drawn_rows(name))
    tokens = tokens.tolist()
    for at in np.flatnonzero(labels >= 0):
        assert SOLVERS[name](tokens[: at + 1], settings) == labels[at]


@pytest.mark.parametrize("name", SINGLE)
@given(data=st.data())
def test_rows_have_one_shape_and_ids_of_the_alphabet(name, data):
    difficulty, settings, tokens, labels = data.draw(drawn_rows(name))
    assert tokens.shape == labels.shape == (LENGTH,)
    assert tokens.dtype == labels.dtype == np.int32
    assert tokens.min() >= 0 and max(tokens.max(), labels.max()) < 2 + PROBES[name].alphabet(settings)
    assert (labels[labels != -1] >= 2).all()
    assert (labels >= 0).sum() == (1 if name == "needle" else difficulty + ANSWERS[name])


@given(data=st.data())
def test_a_needle_lies_its_difficulty_before_the_mark(data):
    difficulty, settings, tokens, _ = data.draw(drawn_rows("needle"))
    assert np.argmax(tokens == 1) - np.argmax(tokens >= 2 + settings.symbols // 2) == difficulty


@pytest.mark.parametrize("name", SINGLE)
def test_answers_are_spread_over_the_alphabet(name):
    """A model that always gives the most frequent answer must not look as if it had the ability."""
    settings, rng = RowSettings(LENGTH, 16, 3), np.random.default_rng(0)
    rows = [generated.padded_row(PROBES[name], rng, 4, settings).labels for _ in range(1000)]
    counts = np.bincount(np.concatenate([row[row >= 0] for row in rows]))
    assert counts.max() / counts.sum() < 1.3 / np.count_nonzero(counts)
    assert np.count_nonzero(counts) >= 6


def small(name):
    config = lab.config.base()
    config.data.update(dict(corpus=name, text_length=LENGTH, rows=4))
    if name == "state":
        config.data.probe.objects = 3
    config.evaluate.loss.update(dict(kind="difficulty", texts=12, rows=4, difficulties=(2, 5, 8)))
    config.train.steps = 5
    return config


@pytest.fixture(params=SINGLE)
def probe(request):
    """A small config of each probe."""
    return small(request.param)


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
        assert one[1] == other[1]


def steps_of(config, **options):
    return list(data.train_batches(config, None, **options))


def rows_of(batches):
    return {row.tobytes() for batch in batches for row in batch.tokens}


@pytest.mark.parametrize("start", [1, 4, 5])
def test_starting_late_equals_having_run(probe, start):
    assert_same(steps_of(probe, start=start), steps_of(probe)[start:])


def test_hosts_together_hold_the_batch_of_one(probe):
    joined = [
        (jax.tree.map(lambda *rows: np.concatenate(rows), *[batch for batch, _ in step]), step[0][1])
        for step in zip(*(steps_of(probe, process_index=i, process_count=2) for i in range(2)), strict=True)
    ]
    assert_same(joined, steps_of(probe))


@pytest.mark.slow
def test_worker_processes_change_nothing():
    probe = small("state")
    here = steps_of(probe)
    probe.run.workers = 2
    assert_same(steps_of(probe), here)


def test_seeds_steps_and_evaluation_share_no_row():
    config = lab.config.base()
    config.data.update(dict(corpus="copy", text_length=32, rows=4))
    config.data.probe.difficulty = "fixed16"
    config.evaluate.loss.update(dict(kind="difficulty", texts=20, rows=4, difficulties=(16,)))
    config.train.steps = 5
    rows = [rows_of(generated.evaluation_batches(config, config.evaluate.loss, None, 16))]
    for seed in range(4):
        config.seed = seed
        rows.append(rows_of(batch for batch, _ in data.train_batches(config, None)))
    assert [len(found) for found in rows] == [20] * 5
    assert len(set.union(*rows)) == 100


def test_evaluation_is_the_same_for_every_seed_and_training_difficulty(probe):
    before = list(generated.evaluation_batches(probe, probe.evaluate.loss, None, 5))
    probe.seed, probe.data.probe.difficulty, probe.data.rows = 7, "fixed2", 2
    for one, other in zip(before, generated.evaluation_batches(probe, probe.evaluate.loss, None, 5), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_every_condition_has_the_shape_of_the_others(probe):
    found = asks.conditions(probe.evaluate.loss)
    assert found == (2, 5, 8) and asks.column(probe) == "difficulty"
    for difficulty in found:
        batches = list(generated.evaluation_batches(probe, probe.evaluate.loss, None, difficulty))
        assert [batch.tokens.shape for batch in batches] == [(4, LENGTH)] * 3
        counted = [(batch.labels >= 0).sum(axis=1) for batch in batches]
        expected = 1 if probe.data.corpus == "needle" else difficulty + ANSWERS[probe.data.corpus]
        assert np.all(np.array(counted) == expected)


def test_rows_are_one_causal_segment(probe):
    (batch, info), *_ = steps_of(probe)
    coordinates = data.nominal_coordinates(probe, 4)
    jax.tree.map(np.testing.assert_array_equal, batch.coordinates, coordinates)
    assert np.all(coordinates.segment == 0) and np.all(coordinates.branch == 1)
    assert np.all(coordinates.time == np.arange(LENGTH)) and np.all(coordinates.index == np.arange(LENGTH))
    assert (info.fill, info.tokens) == (1.0, 4 * LENGTH)


@pytest.mark.parametrize("name", ANSWERS)
def test_difficulties_of_training_are_those_of_the_draw(name):
    probe = small(name)
    probe.data.probe.difficulty = "3-5"
    probe.train.steps = 20
    counts = np.concatenate([(batch.labels >= 0).sum(axis=1) for batch, _ in data.train_batches(probe, None)])
    assert set(counts - ANSWERS[probe.data.corpus]) == {3, 4, 5}


def test_the_hash_is_of_what_makes_the_rows(probe):
    def hashes(**changes):
        changed = probe.copy_and_resolve_references()
        changed.update_from_flattened_dict({field.replace("__", "."): value for field, value in changes.items()})
        return [info.text_hash for _, info in data.train_batches(changed, None)]

    first = hashes()
    assert len(set(first)) == 5
    assert hashes(model__dim=8) == hashes(evaluate__loss__difficulties=(3,)) == first
    for change in (dict(seed=1), dict(data__probe__difficulty="2-7"), dict(data__rows=8), dict(data__text_length=50)):
        assert not set(hashes(**change)) & set(first)


def test_a_probe_opens_without_texts_and_writes_ids_as_numbers(probe, tmp_path):
    opened = data.open(probe)
    assert opened.train is opened.validation is None
    opened.tokenizer.save(tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    assert tokenizer.size == probe.model.vocabulary
    assert tokenizer.decode([3, 0, 31]) == "3 0 31"
    np.testing.assert_array_equal(tokenizer.encode("3 0 31"), [3, 0, 31])


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("data.corpus", "mqarr", "data.corpus = 'mqarr' is unknown .*'mqar'.*needle"),
        (
            "data.texts_per_row",
            2,
            "data.texts_per_row = 2 means nothing beside data.corpus = 'mqar'; choose 1, or one of: ",
        ),
        (
            "evaluate.loss.texts_per_row",
            2,
            "evaluate.loss.texts_per_row = 2 means nothing beside evaluate.loss.kind = 'difficulty'; choose 1",
        ),
        ("data.probe.difficulty", "hard", "data.probe.difficulty = 'hard' is not a draw"),
        ("data.probe.difficulty", "2-11", "difficulty = 11 of the probe mqar needs rows of 44 tokens, over .* = 40"),
        ("data.probe.symbols", 15, "difficulty = 8 of the probe mqar needs 16 symbols, over data.probe.symbols = 15"),
        ("data.probe.symbols", 1, "data.probe.symbols = 1 must be at least 2"),
        (
            "data.probe.objects",
            7,
            "data.probe.objects = 7 means nothing beside data.corpus = 'mqar'; choose 5, or one of: .* = 'state'",
        ),
        ("evaluate.loss.difficulties", (), "evaluate.loss.difficulties is empty"),
        ("evaluate.loss.difficulties", (2, 0), r"evaluate.loss.difficulties = \(2, 0\): 0 must be at least 1"),
        (
            "evaluate.loss.difficulties",
            (2, 20),
            "evaluate.loss.difficulties = 20 of the probe mqar needs rows of 80 tokens",
        ),
        (
            "evaluate.loss.texts",
            10,
            "evaluate.loss.texts = 10 is not a multiple of evaluate.loss.rows = 4; the next is 12",
        ),
        ("model.vocabulary", 33, "model.vocabulary = 33 is fewer than the 34 ids of the probe mqar.*at least 34"),
        (
            "evaluate.loss.kind",
            "branches",
            "evaluate.loss.kind = 'branches' asks nothing of data.corpus = 'mqar'; choose 'difficulty'",
        ),
        ("data.rows", 0, "data.rows = 0 must be at least 1"),
    ],
)
def test_bad_fields_are_refused_by_name(field, value, message):
    config = lab.config.base()
    config.data.update(dict(corpus="mqar", text_length=LENGTH, rows=4))
    config.evaluate.loss.update(dict(kind="difficulty", texts=12, rows=4))
    check(config)
    set_field(config, field, value)
    with pytest.raises(UserError, match=message) as refusal:
        check(config)
    assert "\n" not in str(refusal.value)


def check(config):
    data.check(config)
    asks.check(config)


def test_what_a_probe_needs_is_its_own():
    config = lab.config.base()
    config.data.update(dict(corpus="state", text_length=LENGTH, rows=4))
    config.evaluate.loss.update(dict(kind="difficulty", texts=12, rows=4))
    config.model.vocabulary = 100
    with pytest.raises(UserError, match="fewer than the 122 ids of the probe state"):
        data.check(config)
    config.data.probe.objects = 7
    with pytest.raises(UserError, match=r"data\.probe\.objects = 7 must be at most 6"):
        data.check(config)
    config.data.probe.objects = 5
    config.data.corpus = "induction"
    config.data.probe.difficulty = "1-8"
    with pytest.raises(UserError, match=r"data\.probe\.difficulty = 1 is too small; choose at least 2"):
        data.check(config)
