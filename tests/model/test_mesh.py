import itertools
import math

import jax
import numpy as np
import pytest
import tiny

from lab.errors import UserError
from lab.model import mesh as lab_mesh
from lab.study.define import plan

SIZES = dict(data=-1, fsdp=1, tensor=1, context=1)


@pytest.mark.parametrize(("asked", "made"), [
    (dict(), (8, 1, 1, 1)),
    (dict(tensor=2, context=2), (2, 1, 2, 2)),
    (dict(data=2, fsdp=-1), (2, 4, 1, 1)),
    (dict(data=1, tensor=8), (1, 1, 8, 1)),
])  # fmt: skip
def test_a_mesh_covers_all_devices(asked, made):
    config = tiny.config().run.mesh
    config.update(SIZES | asked)
    mesh = lab_mesh.make(config)
    assert tuple(mesh.shape.values()) == made and tuple(mesh.axis_names) == ("data", "fsdp", "tensor", "context")


@pytest.mark.parametrize(
    "asked", [dict(data=3), dict(data=16), dict(fsdp=-1), dict(tensor=3), dict(data=0), dict(fsdp=0)]
)
def test_a_mesh_that_does_not_fit_is_refused(asked):
    config = tiny.config().run.mesh
    config.update(SIZES | asked)
    with pytest.raises(UserError, match=r"run.mesh \(data .*\) does not cover 8 devices"):
        lab_mesh.make(config)


def test_batches_that_do_not_divide_are_refused():
    mesh = tiny.mesh(data=2, fsdp=2, context=2)
    lab_mesh.check_rows(mesh, "data.rows", 8, 6)
    with pytest.raises(UserError, match=r"data.rows = 6 does not divide over run.mesh data x fsdp = 4"):
        lab_mesh.check_rows(mesh, "data.rows", 6, 6)
    with pytest.raises(UserError, match=r"rows of 7 tokens do not divide over run.mesh.context = 2"):
        lab_mesh.check_rows(mesh, "data.rows", 8, 7)


def test_every_process_has_rows_of_its_own(monkeypatch):
    """Else each would take its own rows for those of all."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    lab_mesh.check_rows(tiny.mesh(fsdp=2, tensor=4), "data.rows", 8, 6)
    with pytest.raises(UserError, match=r"run.mesh data x fsdp = 1 does not divide over 2 processes"):
        lab_mesh.check_rows(tiny.mesh(tensor=8), "data.rows", 8, 6)


@pytest.mark.parametrize("devices", [1, 8, 12])
def test_meshes_come_from_the_simplest_to_the_least_simple(devices):
    found = [tuple(sizes[axis] for axis in lab_mesh.AXES) for sizes in lab_mesh.simplest_first(devices)]
    every = itertools.product(range(1, devices + 1), repeat=4)
    assert found == sorted((sizes for sizes in every if math.prod(sizes) == devices), key=lambda s: s[::-1])
    assert found[0] == (devices, 1, 1, 1) and found[-1] == (1, 1, 1, devices)


@pytest.mark.parametrize(("fields", "told"), [
    (dict(mesh=dict(fsdp=2), auto_mesh=True), "run.mesh.fsdp = 2 means nothing beside run.auto_mesh = True"),
    (dict(mesh=dict(data=8), auto_mesh=True), "run.mesh.data = 8 means nothing .* choose -1, or run.auto_mesh = False"),
    (dict(device_memory=16.0), "run.device_memory = 16.0 means nothing beside run.auto_mesh = False"),
])  # fmt: skip
def test_a_mesh_is_chosen_or_set(fields, told):
    config = tiny.config()
    config.run.update(fields)
    with pytest.raises(UserError, match=told):
        plan.check_run(config)


@pytest.mark.parametrize("length", [24, 192, 1024])
def test_tokens_are_dealt_out_over_context_with_all_that_belongs_to_them(length):
    batch, mesh = tiny.batch(rows=2, length=length), tiny.mesh(data=2, context=4)
    numbered = jax.tree.map(lambda x: np.broadcast_to(np.arange(length, dtype=np.int32), x.shape), batch)
    order = np.asarray(lab_mesh.place(numbered, mesh).tokens)[0]
    assert sorted(order) == list(range(length))
    placed = jax.device_get(lab_mesh.place(batch, mesh))
    jax.tree.map(lambda got, x: np.testing.assert_array_equal(got, x[:, order]), placed, batch)
    if length >= 4 * 2 * 64:  # whole tiles to deal
        tiles = order.reshape(4, -1, 64)
        assert (np.diff(tiles, axis=-1) == 1).all()  # which stay whole
        assert all(device.min() < length / 2 <= device.max() for device in tiles)


def test_without_context_tokens_stay_where_they_are():
    batch = tiny.batch(rows=8)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(lab_mesh.place(batch, tiny.mesh(data=8))), batch)


def test_heads_that_do_not_divide_are_refused():
    mesh, batch = tiny.mesh(tensor=8), tiny.batch()
    model = tiny.model(tiny.config())
    with jax.set_mesh(mesh), pytest.raises(UserError, match=r"run.mesh.tensor = 8 does not divide 4 query heads"):
        jax.eval_shape(lambda: model(batch.tokens, batch.coordinates))
