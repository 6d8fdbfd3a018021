import jax
import numpy as np
import pytest
import tiny

from lab.errors import UserError
from lab.model import mesh as lab_mesh

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
    with jax.set_mesh(mesh), pytest.raises(UserError, match=r"mesh.tensor = 8 does not divide 4 query heads"):
        jax.eval_shape(lambda: model(batch.tokens, batch.coordinates))
