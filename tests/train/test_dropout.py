"""Dropout in training: the same numbers however a step is made, others at every step, none where its rate is 0."""

import functools

import jax
import numpy as np
import pytest
import tiny

from lab import kernels
from lab.data import train_batches
from lab.errors import UserError
from lab.model import mesh as lab_mesh
from lab.model import parameter
from lab.study.define import plan, resolve
from lab.train import canonical, dropout, optimizer, step
from lab.train.step import Program
from lab.train.workload import Member, Workload

ON = dict(train__dropout__attention=0.3, train__dropout__embedding=0.2, train__dropout__residual=0.4)


def gradient(config, batch, mesh=None, at: int = 0):
    """(loss, gradient) of a step, by a program of its own for each config and mesh."""
    program, mesh = Program.of(config), mesh or tiny.mesh()
    model = tiny.model(config)
    with jax.set_mesh(mesh):
        numbers = dropout.numbers_by_step(config)(at)
        placed = jax.device_put(model, parameter.shardings(model, mesh))
        found = compiled(program, mesh)(placed, lab_mesh.place(batch, mesh), numbers)
    return jax.device_get(found)


@functools.cache
def compiled(program: Program, mesh):
    def run(model, batch, numbers):
        noise = dropout.noise(numbers, program.dropout)
        return step.accumulated_gradient(model, batch, 0.0, program.microbatches, noise)

    return jax.jit(run)


def numbered(first: int = 0, rows: int = 8):
    return dropout.numbered(tiny.batch(rows=rows, length=32), first)


@functools.cache
def plainly():
    return gradient(tiny.config(**ON), numbered())


def check_same(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, expected)


@pytest.mark.matrix("run")
@pytest.mark.slow
@pytest.mark.parametrize("run", [
    dict(run__implementation="reference", run__scan=True, run__remat="full", run__microbatches=2),
    dict(run__implementation="reference", mesh=dict(data=2, tensor=2, context=2)),
], ids=str)  # fmt: skip
def test_the_same_numbers_are_dropped_however_a_step_is_made(run):
    mesh = tiny.mesh(**run.get("mesh", {}))
    fields = {name: value for name, value in run.items() if name != "mesh"}
    check_same(gradient(tiny.config(**ON, **fields), numbered(), mesh), plainly())


@pytest.mark.slow
def test_the_order_of_a_row_drops_nothing_else_and_another_row_step_or_seed_does():
    config, batch = tiny.config(**ON), numbered()
    order = np.argsort(np.random.default_rng(0).random(batch.tokens.shape), axis=1)
    moved = jax.tree.map(lambda x: np.take_along_axis(x, order, axis=1), batch)
    check_same(gradient(config, moved), plainly())
    others = [
        gradient(config, numbered(first=8)),
        gradient(config, batch, at=1),
        gradient(tiny.config(**ON, model_seed=1), batch),
        gradient(tiny.config(**ON | {"train__dropout__residual": 0.41}), batch),
    ]
    losses = [float(loss) for loss, _ in (plainly(), *others)]
    assert np.abs(np.subtract.outer(losses, losses))[np.triu_indices(5, 1)].min() > 1e-3


def test_a_step_is_told_by_its_number_alone_and_members_have_seeds_of_their_own():
    configs = [tiny.config(**ON, seed=seed, model_seed=seed) for seed in (0, 5)]
    workload = Workload([Member(config, tiny.texts()) for config in configs])
    for _ in range(3):
        numbers = workload.numbers(4)
        assert numbers["step"].tolist() == [4, 4] and numbers["model_seed"].tolist() == [0, 5]
        workload.numbers(1)
    batches = [batch for batch, _ in workload.batches(0)]
    resumed = [batch for batch, _ in workload.batches(3)]
    jax.tree.map(np.testing.assert_array_equal, resumed, batches[3:])
    assert (batches[0].rows == np.arange(2)[None, :, None]).all() and batches[0].rows.shape == batches[0].tokens.shape


def test_rows_are_numbered_over_all_hosts(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    (batch, _), *_ = Workload([Member(tiny.config(**ON, data__rows=6), tiny.texts())]).batches(0)
    assert batch.rows[:, 0].tolist() == [3, 4, 5]


def test_at_rate_0_nothing_is_in_the_program():
    config = tiny.config(model__layers=1)
    assert canonical.train_step(config) == canonical.train_step(tiny.config(model__layers=1, model_seed=3))
    workload = Workload([Member(config, tiny.texts())])
    batch, _ = next(workload.batches(0))
    packed, _ = next(train_batches(config, tiny.texts()))
    assert batch.rows is None and jax.tree.structure(batch) == jax.tree.structure(packed)
    assert workload.numbers(0).keys() == optimizer.ones("adamw").keys() and not Program.of(config).dropout
    assert jax.tree.structure(canonical.abstract_batch(config)) == jax.tree.structure(packed)


def test_rates_are_numbers_and_which_there_are_is_the_program():
    digest = lambda **o: canonical.train_step(tiny.config(model__layers=1, **o))  # noqa: E731
    none, some, more = digest(), digest(train__dropout__residual=0.1), digest(train__dropout__residual=0.2)
    other = digest(train__dropout__embedding=0.1)
    assert some == more and len({none, some, other}) == 3
    shared = [plan.program(tiny.config(train__dropout__attention=rate)) for rate in (0.1, 0.2, 0.0)]
    assert shared[0] == shared[1] != shared[2]


@pytest.mark.parametrize(("fields", "says"), [
    (dict(train__dropout__attention=1.0), "train.dropout.attention = 1.0 must be below 1"),
    (dict(train__dropout__residual=-0.1), "train.dropout.residual = -0.1 must be at least 0"),
    (dict(train__dropout__attention=0.1, run__implementation="cudnn"),
     "run.implementation = 'cudnn' drops no probabilities; choose among: auto, reference, tiled"),
    (dict(train__dropout__attention=0.1, model__mixer__name="delta", model__rule="causal"),
     "model.mixer.name = 'delta' has no probabilities to drop; choose 0, or among: attention, "),
], ids=str)  # fmt: skip
def test_what_cannot_be_dropped_is_refused(fields, says):
    with pytest.raises(UserError, match=says):
        plan.check(*resolve.resolve(tiny.config(**fields)))


def test_what_cannot_be_dropped_anywhere_else_may_be(monkeypatch):
    """A delta net drops of what it puts out, and any kernel serves where attention drops nothing."""
    fields = dict(train__dropout__residual=0.1, model__mixer__name="delta", model__rule="causal")
    plan.check(*resolve.resolve(tiny.config(**fields)))
    plan.check(*resolve.resolve(tiny.config(train__dropout__residual=0.1, run__implementation="cudnn")))
    assert kernels.tile_sizes("auto", 64, dropping=True) == kernels.tile_sizes("tiled", 64)
