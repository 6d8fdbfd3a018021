"""What every variant owes when it is trained: a gradient for each weight, one program, the same step on any mesh."""

import functools

import jax
import meshes
import numpy as np
import pytest
import tiny
import variants
from meshes import ADAMW, numbers_of, state_of, trained

from lab import runtime
from lab.model import mesh as lab_mesh
from lab.model import parameter
from lab.train import compiled, optimizer, step
from lab.train.step import Program


@pytest.mark.matrix("variant")
@pytest.mark.parametrize("variant", [*variants.marked(), *variants.marked(variants.ON_STREAMS, ())])
def test_a_step_is_finite_and_every_weight_of_every_layer_has_a_gradient(variant):
    config = variants.config(variant)
    model = tiny.model(config)
    gradient = functools.partial(step.accumulated_gradient, z_loss=0.0, microbatches=1)
    loss, gradients = jax.jit(gradient)(model, tiny.batch(rows=4))
    assert np.isfinite(loss) and 1 < loss < 3 * np.log(tiny.VOCABULARY)
    for path, g in jax.tree.flatten_with_path(gradients)[0]:
        name = jax.tree_util.keystr(path)
        assert np.isfinite(g).all(), name
        layers = g if "blocks" in name else g[None]
        assert all(np.any(layer) for layer in layers), name


FAST_OPTIMIZERS = ("adamw",)


def optimizers_in_turn() -> list:
    """(variant, optimizer): the default with each, the others with the next one each."""
    names = [*optimizer.OPTIMIZERS]
    default = [
        pytest.param("default", name, marks=[] if name in FAST_OPTIMIZERS else pytest.mark.slow) for name in names
    ]
    others = [
        pytest.param(variant, names[place % len(names)], marks=pytest.mark.slow)
        for place, variant in enumerate(variants.VARIANTS)
        if variant != "default"
    ]
    return default + others


@pytest.mark.matrix("variant")
@pytest.mark.parametrize(("variant", "name"), optimizers_in_turn())
def test_an_optimizer_moves_every_weight_and_no_table_and_learns_a_batch(variant, name):
    config = variants.config(variant, train__optimizer=name, train__learning_rate=0.02, train__warmup=0)
    program, mesh, batch = Program.of(config), tiny.mesh(), tiny.batch()
    before = state_of(config, program, mesh)
    _, trainable, tables = jax.device_get(parameter.split(before.model))
    state, numbers, placed = before, numbers_of(config), lab_mesh.place(batch, mesh)
    run, losses = compiled.train_step(state, numbers, placed, program, mesh), []
    for _ in range(30):
        state, metrics = run(state, numbers, placed)
        losses.append(float(metrics.loss))
    _, after, tables_after = jax.device_get(parameter.split(state.model))
    jax.tree.map(np.testing.assert_array_equal, tables_after, tables)
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(trainable), strict=True))
    assert losses[-1] < 0.7 * losses[0]


MESHES = {
    "data": dict(data=8),
    "data fsdp tensor": dict(data=2, fsdp=2, tensor=2),
    "tensor over fewer groups, context": dict(tensor=4, context=2),
    "fsdp": dict(fsdp=8),
    "context": dict(context=8),
    "four devices": dict(data=2, context=2),
    "all but fsdp": dict(data=2, tensor=2, context=2),
}
FAST_MESHES = ("data fsdp tensor",)


def check_same(got, expected) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), got, expected)


@pytest.mark.matrix("variant")
@pytest.mark.slow
@pytest.mark.parametrize("mesh", meshes.MESHES)
@pytest.mark.parametrize("variant", meshes.MODELS.values())
def test_loss_and_gradient_norm_are_those_of_one_device_on_every_axis_and_pair_of_axes(variant, mesh):
    assert meshes.difference(variant, mesh) <= meshes.WITHIN


@functools.cache
def on_one_device(variant: str, **overrides):
    return trained(variants.config(variant, **overrides), tiny.mesh(), tiny.batch(rows=8, length=32))


@pytest.mark.parametrize("mesh", variants.marked(MESHES, fast=FAST_MESHES))
def test_a_step_is_the_same_on_every_mesh(mesh):
    got = trained(variants.config("default"), tiny.mesh(**MESHES[mesh]), tiny.batch(rows=8, length=32))
    check_same(got, on_one_device("default"))


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [
    dict(run__scan=True),
    dict(run__scan=True, run__remat="full"),
    dict(run__implementation="reference"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("variant", ["default", "local : global"])
def test_a_step_is_the_same_on_a_mesh_however_layers_run(variant, overrides):
    mesh = tiny.mesh(**MESHES["all but fsdp"])
    got = trained(variants.config(variant, **overrides), mesh, tiny.batch(rows=8, length=32))
    check_same(got, on_one_device(variant, **overrides))


@pytest.mark.matrix("variant")
@pytest.mark.slow
@pytest.mark.parametrize("variant", variants.marked())
def test_a_step_of_every_variant_is_the_same_on_a_mesh(variant):
    mesh = tiny.mesh(**MESHES["data fsdp tensor" if variants.in_order(variant) else "all but fsdp"])
    check_same(trained(variants.config(variant), mesh, tiny.batch(rows=8, length=32)), on_one_device(variant))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["stream v3m2", "stream v4m1"])
def test_streams_share_one_group_over_devices(variant):
    mesh, one_group = tiny.mesh(**MESHES["tensor over fewer groups, context"]), dict(model__mixer__kv_heads=1)
    got = trained(variants.config(variant, **one_group), mesh, tiny.batch(rows=8, length=32))
    check_same(got, on_one_device(variant, **one_group))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data fsdp tensor", "four devices"])
def test_microbatches_are_the_same_on_a_mesh(mesh):
    program = Program("adamw", "all", 2)
    meshes = tiny.mesh(), tiny.mesh(**MESHES[mesh])
    one, many = (trained(tiny.config(), m, tiny.batch(rows=8, length=32), program) for m in meshes)
    check_same(many, one)


@pytest.mark.slow
def test_evaluation_is_the_same_on_a_mesh():
    config, batch = tiny.config(), tiny.batch(rows=8, length=32)
    results = []
    for mesh in (tiny.mesh(), tiny.mesh(**MESHES["all but fsdp"])):
        model, placed = state_of(config, ADAMW, mesh).model, lab_mesh.place(batch, mesh)
        results.append(jax.device_get(compiled.evaluation_step(model, placed, mesh)(model, placed)))
    assert results[0][2] == results[1][2] == (batch.labels >= 0).sum()
    assert results[0][1] == results[1][1]
    assert results[1][0] == pytest.approx(float(results[0][0]), rel=1e-5)


def test_weights_lie_over_the_mesh_as_declared():
    state = compiled.initial_state(tiny.config(), ADAMW, tiny.mesh(**MESHES["data fsdp tensor"]))
    q, norm = state.model.blocks[0].mixer.q, state.model.norm.weight
    assert q.shape == (2, 16, 4, 8) and q.addressable_shards[0].data.shape == (2, 8, 2, 8)
    assert norm.addressable_shards[0].data.shape == norm.shape
    assert state.model.embedding.addressable_shards[0].data.shape == (tiny.VOCABULARY, 8)  # 29 rows do not halve
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.shape == q.shape]
    assert len(moments) == 2 and all(m.sharding == q.sharding for m in moments)


def test_first_weights_depend_on_the_seed_and_on_no_mesh():
    one, many, other = (
        jax.device_get(jax.tree.leaves(compiled.initial_state(tiny.config(model_seed=seed), ADAMW, mesh).model))
        for mesh, seed in ((tiny.mesh(), 0), (tiny.mesh(**MESHES["data fsdp tensor"]), 0), (tiny.mesh(), 1))
    )
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert any(np.any(a != b) for a, b in zip(one, other, strict=True))


def test_cells_that_differ_in_numbers_and_tables_share_one_executable():
    length = 26  # of no other test, so that the first cell must compile
    counts, found, losses = runtime.CompileCounts(), set(), set()
    cells = [
        {},
        dict(model__position__ratio=1.0),
        dict(model__position__ratio=0.0, model__position__unselected="time"),
        dict(model__position__theta=1e4, model__position__stride=128),
        dict(train__learning_rate=0.1, train__weight_decay=0.5, train__clip=0.1, train__z_loss=0.2),
        dict(
            train__adamw__b1=0.5,
            train__adamw__b2=0.7,
            train__adamw__eps=0.1,
            train__schedule="wsd",
            seed=3,
            data__draw="fixed1",
        ),
    ]
    for cell in cells:
        config, mesh = tiny.config(**cell), tiny.mesh(data=2)
        state, batch = state_of(config, ADAMW, mesh), lab_mesh.place(tiny.batch(length=length), mesh)
        evaluate = compiled.evaluation_step(state.model, batch, mesh)
        train = compiled.train_step(state, numbers_of(config), batch, ADAMW, mesh)
        found.add((evaluate, train))
        nats, _, tokens = evaluate(state.model, batch)
        losses.add(float(nats / tokens))
        train(state, numbers_of(config), batch)
    assert len(found) == 1
    assert counts.counts["train_step"] == counts.counts["evaluation_step"] == 1
    assert len(losses) == 4  # the tables are not what they were: nothing was baked in


@pytest.mark.slow
def test_programs_that_differ_share_nothing():
    config, mesh = tiny.config(), tiny.mesh()
    state, batch = state_of(config, ADAMW, mesh), lab_mesh.place(tiny.batch(), mesh)
    programs = ADAMW, Program("adamw", "all", 1), Program("adamw", "declared", 2)
    assert len({compiled.train_step(state, numbers_of(config), batch, program, mesh) for program in programs}) == 3


@pytest.mark.parametrize("different", [
    dict(model__rule="own_branch"),
    dict(model__mixer__softcap=1.0),
    dict(run__implementation="reference"),
    dict(run__remat="full"),
    dict(model__compute="bfloat16"),
    dict(model__norm__eps=0.1),
], ids=str)  # fmt: skip
def test_models_that_differ_in_more_have_another_structure(different):
    one, other = (jax.tree.structure(tiny.model(tiny.config(**o))) for o in ({}, different))
    assert one != other


def test_another_shape_is_an_error_and_compiles_nothing():
    config, mesh = tiny.config(), tiny.mesh()
    state, batch = state_of(config, ADAMW, mesh), lab_mesh.place(tiny.batch(), mesh)
    run = compiled.evaluation_step(state.model, batch, mesh)
    counts = runtime.CompileCounts()
    with pytest.raises(TypeError):
        run(state.model, lab_mesh.place(tiny.batch(length=20), mesh))
    assert not counts.counts
