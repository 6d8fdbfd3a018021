import errno
import itertools
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tiny

from lab.data import train_batches
from lab.errors import UserError
from lab.train import compiled, loop, optimizer
from lab.train.checkpoint import Checkpoints, DiskFull, Position
from lab.train.step import Program
from lab.train.workload import Member, Workload

STEPS = 6
ADAMW = Program("adamw", "declared", 1)


class Run(NamedTuple):
    trained: loop.Trained
    records: list[loop.Record]
    start: int


class Watched(Checkpoints):
    """Checkpoints that note when they are written."""

    def __init__(self, directory, events: list):
        super().__init__(directory, keep=9)
        self.events = events

    def save(self, position, state):
        self.events.append(("save", position.step))
        super().save(position, state)


def run(directory, config=None, *, texts=None, mesh=None, stop=lambda step: False, events=None) -> Run:
    """A whole call of `train`. What it reports is kept even if it raises: events gets ("step", n) and ("save", n)."""
    events, records, starts = [] if events is None else events, [], []

    def on_checkpoint(step, state):
        """Comes right after every checkpoint; the state can be read."""
        assert events[-1] == ("save", step)
        jax.tree.map(np.asarray, state)

    def on_step(members):
        (record,) = members
        records.append(record)
        events.append(("step", record.step))

    checkpoints = Watched(directory, events)
    callbacks = dict(on_start=starts.append, on_step=on_step, on_checkpoint=on_checkpoint, stop=stop)
    try:
        workload = Workload([Member(config or tiny.config(), texts or tiny.texts())])
        made = loop.train(workload, checkpoints, mesh or tiny.mesh(), **callbacks)
    finally:
        checkpoints.close()
    return Run(made, records, *starts)


def saved(directory) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir())


def check_equal(got, expected) -> None:
    """To the bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(expected))


def run_until(directory, last: int, **options) -> None:
    """Stops after so many steps."""
    with pytest.raises(loop.Stopped):
        run(directory, stop=lambda step: step + 1 == last, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"))


def test_every_step_is_reported_once_and_in_order(undisturbed):
    config, records = tiny.config(), undisturbed.records
    assert undisturbed.start == 0 and undisturbed.trained.steps == STEPS
    assert [r.step for r in records] == list(range(STEPS))
    batches = [info for _, info in train_batches(config, tiny.texts())]
    assert [(r.text_hash, r.fill, r.tokens) for r in records] == [tuple(info) for info in batches]
    assert undisturbed.trained.tokens == sum(info.tokens for info in batches)
    np.testing.assert_array_equal([r.learning_rate for r in records], optimizer.schedule(config.train))
    assert all(0 < r.grad_norm < 100 for r in records) and records[0].loss == pytest.approx(np.log(29), rel=0.2)
    assert 0 <= undisturbed.trained.outside <= undisturbed.trained.seconds


def test_the_loop_does_what_its_steps_do(undisturbed):
    """By hand: the step on each batch in turn."""
    config, mesh = tiny.config(), tiny.mesh()
    program = ADAMW
    state, numbers = compiled.initial_state(config, program, mesh), optimizer.numbers_by_step(config.train)
    for n, (batch, _) in enumerate(train_batches(config, tiny.texts())):
        state, metrics = undisturbed.trained.executable(state, numbers(n), loop.lab_mesh.place(batch, mesh))
        assert float(metrics.loss) == undisturbed.records[n].loss
    check_equal(state, undisturbed.trained.state)


@pytest.mark.slow
def test_another_seed_is_another_run(tmp_path, undisturbed):
    other = run(tmp_path, tiny.config(seed=1))
    assert {r.text_hash for r in other.records}.isdisjoint(r.text_hash for r in undisturbed.records)
    assert other.records[0].loss != undisturbed.records[0].loss


@pytest.mark.parametrize(
    "mesh", [dict(), pytest.param(dict(data=2), marks=pytest.mark.slow)], ids=["1 device", "2 devices"]
)
def test_stopped_and_resumed_equals_undisturbed_to_the_bit(tmp_path, undisturbed, mesh):
    mesh = tiny.mesh(**mesh)
    if mesh.size > 1:
        undisturbed = run(tmp_path / "undisturbed", mesh=mesh)
    for last in (1, 4, 5):  # at, between and next to the configured checkpoints
        run_until(tmp_path / "run", last, mesh=mesh)
        assert saved(tmp_path / "run")[-1] == last
    resumed = run(tmp_path / "run", mesh=mesh)
    assert resumed.start == 5 and resumed.trained.steps == 1
    assert resumed.records == undisturbed.records[5:]
    check_equal(resumed.trained.state, undisturbed.trained.state)


def test_a_stop_reports_all_steps_and_saves_that_very_step(tmp_path, undisturbed):
    events = []
    with pytest.raises(loop.Stopped, match="step 3"):
        run(tmp_path, stop=lambda step: step == 2, events=events)
    assert [n for kind, n in events if kind == "step"] == [0, 1, 2]
    assert saved(tmp_path)[-1] == 3
    resumed = run(tmp_path)
    assert resumed.start == 3 and resumed.records == undisturbed.records[3:]


def test_a_stop_at_the_last_step_is_the_end(tmp_path, undisturbed):
    ended = run(tmp_path, stop=lambda step: step == STEPS - 1)
    check_equal(ended.trained.state, undisturbed.trained.state)


def test_a_run_that_is_done_makes_no_step(tmp_path, undisturbed):
    run(tmp_path)
    again = run(tmp_path)
    assert again.start == STEPS and again.trained.steps == 0 and again.records == []
    assert again.trained.executable is None
    check_equal(again.trained.state, undisturbed.trained.state)


def test_killed_between_checkpoints_it_repeats_the_steps_since(tmp_path, undisturbed):
    class Killed(BaseException):
        pass

    def kill(step):
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, stop=kill)
    assert saved(tmp_path)[-1] == 2
    resumed = run(tmp_path)
    assert resumed.start == 2 and resumed.records == undisturbed.records[2:]
    check_equal(resumed.trained.state, undisturbed.trained.state)


def test_checkpoints_come_when_configured_and_at_the_end(tmp_path):
    run(tmp_path, tiny.config(run__checkpoint__every=4))
    assert [step for step in saved(tmp_path) if step] == [4, STEPS]


def test_a_save_waits_for_the_metrics_of_its_step(tmp_path):
    events = []
    run(tmp_path, events=events)
    for at, (kind, step) in enumerate(events):
        if kind == "save" and step:
            assert events[at - 1] == ("step", step - 1)
    assert [e for e in events if e[0] == "save" and e[1]] == [("save", 2), ("save", 4), ("save", 6)]


def test_the_position_of_the_data_is_saved(tmp_path):
    run_until(tmp_path, 3)
    config = tiny.config()
    state = compiled.initial_state(config, ADAMW, tiny.mesh())
    position, _ = Checkpoints(tmp_path, keep=1).restore(state)
    assert position == Position(3, 3 * config.data.rows * config.data.texts_per_row)


def check_stops_as_non_finite(directory, config, step: int, good: int) -> None:
    before = set(saved(directory)) if directory.exists() else set()
    events = []
    with pytest.raises(loop.NonFinite) as raised:
        run(directory, config, events=events)
    text_hash = next(itertools.islice(train_batches(config, tiny.texts()), step, None))[1].text_hash
    said = str(raised.value)
    assert raised.value.step == step
    assert said.startswith(f"step {step}: ") and text_hash in said and "\n" not in said
    assert re.search(rf"last good checkpoint: .*\b{good}\b", said)
    assert ("step", step) not in events
    assert max(saved(directory)) == good and max(before, default=0) <= good


@pytest.mark.parametrize(("every", "good"), [(1, 1), (2, 0)])
def test_a_rate_that_is_too_large_stops_the_run(tmp_path, every, good):
    config = tiny.config(train__learning_rate=1e38, train__warmup=0, run__checkpoint__every=every)
    check_stops_as_non_finite(tmp_path, config, step=1, good=good)


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
@pytest.mark.parametrize(("at", "good"), [(0, 0), (3, 2), (4, 4), (STEPS - 1, 4)])
def test_a_step_that_is_not_finite_is_not_saved(tmp_path, monkeypatch, what, at, good):
    honest, steps = compiled.train_step, itertools.count()

    def compiled_train_step(*arguments):
        step = honest(*arguments)

        def run(*inputs):
            state, metrics = step(*inputs)
            return state, metrics._replace(**{what: metrics.loss * np.nan}) if next(steps) == at else metrics

        return run

    monkeypatch.setattr(compiled, "train_step", compiled_train_step)
    check_stops_as_non_finite(tmp_path, tiny.config(), step=at, good=good)


def test_weights_that_are_nan_stop_a_resumed_run(tmp_path, undisturbed):
    state = undisturbed.trained.state
    broken = state._replace(model=jax.tree.map(lambda x: x * np.nan, state.model))
    checkpoints = Checkpoints(tmp_path, keep=9)
    checkpoints.save(Position(3, 24), broken)
    checkpoints.close()
    check_stops_as_non_finite(tmp_path, tiny.config(), step=3, good=3)


def test_a_full_disk_ends_the_run_and_a_second_call_goes_on(tmp_path, monkeypatch, undisturbed):
    honest = Watched.save

    def save(self, position, state):
        if position.step == 4:
            full = OSError(errno.ENOSPC, "No space left on device")
            monkeypatch.setattr(self._manager, "save", lambda *_, **__: (_ for _ in ()).throw(full))
        honest(self, position, state)

    monkeypatch.setattr(Watched, "save", save)
    with pytest.raises(DiskFull, match="the disk is full"):
        run(tmp_path)
    monkeypatch.setattr(Watched, "save", honest)
    resumed = run(tmp_path)
    assert resumed.start == 2 and resumed.records == undisturbed.records[2:]
    check_equal(resumed.trained.state, undisturbed.trained.state)


def test_what_does_not_fit_a_device_is_refused_before_the_first_step(tmp_path, monkeypatch):
    def refuse(executable, config):
        assert executable.memory_analysis()
        raise UserError("it does not fit")

    monkeypatch.setattr(loop.memory, "check", refuse)
    events = []
    with pytest.raises(UserError, match="it does not fit"):
        run(tmp_path, events=events)
    assert ("save", 0) in events and not [event for event in events if event[0] == "step"]
