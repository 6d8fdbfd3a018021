"""Batches are functions of (seed, step): not of hosts, workers, draws, nor of where iteration starts."""

import itertools
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import psutil
import pytest

from lab.data import pipeline
from lab.errors import UserError


@pytest.fixture
def texts():
    """Ragged texts whose tokens are all distinct."""
    lengths = np.random.default_rng(0).integers(2, 5, size=57)
    return [10 * i + np.arange(n, dtype=np.int32) for i, n in enumerate(lengths)]


def assert_same(left, right):
    for (batch, info), (other, other_info) in zip(left, right, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, other)
        assert info == other_info


def ids_of(texts, batch):
    """The ids of the texts in a batch, each once, in no order."""
    return sorted(set(batch.tokens[batch.coordinates.segment >= 0] // 10))


@pytest.mark.parametrize("options", [{}, dict(slots=5, draw="1-3", prompt="first"), dict(align="right", stagger=False)])
@pytest.mark.parametrize("processes", [2, 4])
def test_hosts_together_hold_the_batch_of_one(config, texts, processes, options):
    config.data.update(options)
    parts = [
        list(pipeline.train_batches(config, texts, process_index=i, process_count=processes)) for i in range(processes)
    ]
    whole = list(pipeline.train_batches(config, texts))
    assert len(whole) == config.train.steps
    joined = [
        (jax.tree.map(lambda *rows: np.concatenate(rows), *[batch for batch, _ in step]), step[0][1])
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)
    assert all(len({info for _, info in step}) == 1 for step in zip(*parts, strict=True))


@pytest.mark.slow
def test_worker_processes_change_nothing(config, texts):
    here = list(pipeline.train_batches(config, texts, start=1))
    config.run.workers = 2
    assert_same(pipeline.train_batches(config, texts, start=1), here)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5])
def test_starting_late_equals_having_run(config, texts, start):
    whole = list(pipeline.train_batches(config, texts))
    assert_same(pipeline.train_batches(config, texts, start=start), whole[start:])


def test_starting_far_away_is_immediate(config, texts):
    config.train.steps = 10**9
    begun = time.monotonic()
    next(pipeline.train_batches(config, texts, start=10**9 - 1))
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("prompt", ["none", "first"])
def test_every_draw_sees_the_same_texts(config, texts, prompt):
    seen = []
    config.data.update(texts_per_row=24, rows=1)
    draws = {"none": ("fixed1", "1-5", "3-9"), "first": ("fixed1", "1-3", "2-8")}[prompt]
    for draw, slots, stagger in zip(draws, (0, 0, 9), (True, True, False), strict=True):
        config.data.update(draw=draw, prompt=prompt, slots=slots, stagger=stagger)
        steps = list(pipeline.train_batches(config, texts))
        seen.append([(ids_of(texts, batch), info) for batch, info in steps])
    assert seen[0] == seen[1] == seen[2]
    hashes = [info.text_hash for _, info in seen[0]]
    assert len(set(hashes)) == len(hashes)


def order_of_texts(config, count, steps):
    """The ids in the order that training reads them, found in the batches: text i is (i, i)."""
    config.data.update(draw="fixed1", text_length=2)
    config.train.steps = steps
    texts = [np.array([i, i], np.int32) for i in range(count)]
    return np.concatenate([batch.tokens[:, ::2].ravel() for batch, _ in pipeline.train_batches(config, texts)])


def test_each_epoch_reads_each_text_once_in_another_order(config):
    order = order_of_texts(config, 57, steps=10)[: 4 * 57].reshape(4, 57)
    np.testing.assert_array_equal(np.sort(order), [range(57)] * 4)
    assert len({tuple(epoch) for epoch in order}) == 4


def test_seeds_share_no_epoch(config):
    epochs = set()
    for seed in range(4):
        config.seed = seed
        epochs |= {tuple(epoch) for epoch in order_of_texts(config, 57, steps=10)[: 4 * 57].reshape(4, 57)}
    assert len(epochs) == 16


def test_the_hash_is_of_the_order_of_texts(config, texts):
    def hashes():
        return [info.text_hash for _, info in pipeline.train_batches(config, texts)]

    first = hashes()
    config.model.dim = 8
    assert hashes() == first
    config.seed = 1
    assert not set(hashes()) & set(first)


def test_the_hash_is_of_the_whole_step_and_not_of_its_rows(config, texts):
    def first_hash(rows, texts_per_row):
        config.data.update(rows=rows, texts_per_row=texts_per_row, draw="fixed1")
        return next(pipeline.train_batches(config, texts))[1].text_hash

    assert first_hash(4, 6) == first_hash(3, 8) == first_hash(1, 24)
    assert len({first_hash(rows, 6) for rows in (1, 2, 4)}) == 3


def test_every_row_of_every_step_and_seed_draws_anew(config):
    config.data.update(texts_per_row=12, draw="1-11", slots=20)
    drawn = set()
    for seed in range(3):
        config.seed = seed
        c = pipeline.nominal_coordinates(config, 5 * config.data.rows)
        drawn |= {row.tobytes() for row in np.stack([c.segment, c.branch, c.time], 1)}
    assert len(drawn) == 3 * 5 * 4


def test_fill_and_tokens_are_those_of_the_whole_step(config, texts):
    halves = [pipeline.train_batches(config, texts, process_index=i, process_count=2) for i in range(2)]
    for (left, info), (right, _) in zip(*halves, strict=True):
        segment = np.concatenate([left.coordinates.segment, right.coordinates.segment])
        assert info.tokens == (segment >= 0).sum()
        assert info.fill == pytest.approx((segment >= 0).mean())
        assert 0.5 < info.fill < 1


@pytest.mark.parametrize(
    "low, high, prompt, texts_per_row", [(1, 5, "none", 6), (2, 4, "none", 12), (1, 3, "first", 12), (3, 3, "none", 6)]
)
def test_groups_of_every_row_have_the_sizes_of_the_draw_equally_often(config, low, high, prompt, texts_per_row):
    config.data.update(draw=f"{low}-{high}", prompt=prompt, texts_per_row=texts_per_row, text_length=2)
    c = pipeline.nominal_coordinates(config, 1500)
    sizes = [
        len({*branch[(segment == s) & (branch > 0)]})
        for segment, branch in zip(c.segment, c.branch, strict=True)
        for s in range(segment.max() + 1)
    ]
    share = np.bincount(sizes, minlength=high + 1) / len(sizes)
    values = high - low + 1
    np.testing.assert_allclose(share, [0] * low + [1 / values] * values, atol=0.025)


def test_a_prompt_comes_on_top_of_the_branches(config, texts):
    config.data.update(draw="fixed2", prompt="first")
    batch, _ = next(pipeline.train_batches(config, texts))
    for segment, branch in zip(batch.coordinates.segment, batch.coordinates.branch, strict=True):
        assert [set(branch[segment == s]) for s in range(segment.max() + 1)] == [{0, 1, 2}] * 2


def test_rows_that_hosts_cannot_share_are_refused(config, texts):
    with pytest.raises(UserError, match=r"data\.rows = 4 cannot be shared by 3 processes"):
        pipeline.train_batches(config, texts, process_count=3)
    with pytest.raises(UserError, match=r"rows of an ask = 4 cannot be shared by 3 processes"):
        pipeline.evaluation_batches(config, config.evaluate.loss, texts, 2, process_count=3)


@pytest.mark.parametrize("branches", [1, 2, 3, 6])
def test_evaluation_uses_one_shape_and_full_groups(config, texts, branches):
    config.data.slots = 9
    config.evaluate.loss.update(texts=48, rows=2)
    batches = list(pipeline.evaluation_batches(config, config.evaluate.loss, texts, branches))
    assert [batch.tokens.shape for batch in batches] == [(2, 24)] * 4
    for batch in batches:
        for segment, branch, time_ in zip(
            batch.coordinates.segment, batch.coordinates.branch, batch.coordinates.time, strict=True
        ):
            assert segment.max() + 1 == 6 // branches
            for s in range(6 // branches):
                of_group = segment == s
                assert set(branch[of_group]) == set(range(1, branches + 1))
                assert all(time_[of_group & (branch == b)].min() == 0 for b in range(1, branches + 1))


def test_evaluation_reads_the_same_texts_for_every_cell(config, texts):
    config.evaluate.loss.update(texts=48, rows=2)
    read = []
    for seed, branches, draw in itertools.product([0, 7], [1, 2, 3, 6], ["fixed1", "1-5"]):
        config.seed = seed
        config.data.draw = draw
        read.append(
            [
                ids_of(texts, batch)
                for batch in pipeline.evaluation_batches(config, config.evaluate.loss, texts, branches)
            ]
        )
    assert all(ids == read[0] for ids in read)
    assert len(set(itertools.chain(*read[0]))) == 48


def test_evaluation_hosts_together_hold_the_batch_of_one(config, texts):
    halves = [
        pipeline.evaluation_batches(config, config.evaluate.loss, texts, 3, process_index=i, process_count=2)
        for i in range(2)
    ]
    whole = list(pipeline.evaluation_batches(config, config.evaluate.loss, texts, 3))
    joined = [jax.tree.map(lambda a, b: np.concatenate([a, b]), *step) for step in zip(*halves, strict=True)]
    for batch, other in zip(joined, whole, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, other)


def test_evaluation_needs_enough_texts(config, texts):
    with pytest.raises(UserError, match="there are 23 validation texts, fewer than the 24 that are asked for"):
        pipeline.evaluation_batches(config, config.evaluate.loss, texts[:23], 2)


@pytest.mark.parametrize("options", [{}, dict(slots=5, draw="1-3", prompt="first"), dict(draw="fixed1", align="right")])
def test_nominal_coordinates_are_those_of_full_texts(config, options):
    config.data.update(options)
    full = [np.arange(4, dtype=np.int32)] * 50
    coordinates = [batch.coordinates for batch, _ in pipeline.train_batches(config, full)]
    expected = jax.tree.map(lambda *rows: np.concatenate(rows)[:10], *coordinates)
    jax.tree.map(np.testing.assert_array_equal, pipeline.nominal_coordinates(config, 10), expected)


KILLED = """
import sys
import numpy as np
import lab.config
from lab.data import pipeline

if __name__ == "__main__":
    config = lab.config.base()
    config.run.workers = 2
    batches = pipeline.train_batches(config, [np.arange(32, dtype=np.int32)] * 100)
    next(batches), next(batches)
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_killed_program_leaves_no_workers(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(KILLED)
    environment = os.environ | dict(PYTHONPATH=os.getcwd())
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    program = subprocess.Popen([sys.executable, script], env=environment, **pipes)
    assert program.stdout.readline() == b"ready\n"
    workers = psutil.Process(program.pid).children(recursive=True)
    assert len(workers) >= 2
    program.send_signal(signal.SIGKILL)
    program.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
