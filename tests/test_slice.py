"""What is read of a program for a slice of TPUs, against numbers worked by hand; see also test_compile_for_tpu.py."""

import math

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lab.config
from lab import kernels, plan
from lab.errors import UserError
from lab.model import mesh as lab_mesh
from lab.slice import chips, hlo, parse, step
from lab.slice.chips import CHIPS
from lab.slice.hlo import Collective
from lab.train import canonical, memory

MESH = {"data": 1, "fsdp": 4, "tensor": 2, "context": 1}


def compiled(function, *shapes, specs, out):
    """The text of a program in which each of eight devices runs `function` on its part of float32 arrays."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), (AxisType.Auto,) * 4)
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    parts = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return jax.jit(parts).lower(*inputs).compile().as_text()


def counted(work: hlo.Work) -> dict:
    """{(kind, axes): (how often, bytes that each device puts in)}"""
    found = {}
    for each, count in work.collectives.items():
        key = each.kind, hlo.axes_of(each, MESH)
        times, put_in = found.get(key, (0, 0))
        found[key] = times + count, put_in + count * each.bytes
    return found


def test_collectives_of_a_program_are_counted_as_often_as_its_loops_turn():
    def function(x, w):
        def turn(x, _):
            whole = jax.lax.all_gather(w + x[0, 0], "fsdp", tiled=True)  # [32, 16] of [8, 16]
            y = jax.lax.psum(x @ whole, "tensor")  # [4, 16]
            return x + jnp.tile(y, 2), None

        x, _ = jax.lax.scan(turn, x, None, length=5)
        scattered = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)  # [4, 8] of [4, 32]
        passed = jax.lax.ppermute(scattered, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return jax.lax.all_to_all(passed, ("fsdp", "tensor"), 1, 0, tiled=True)

    text = compiled(function, (32, 32), (32, 16), specs=(P(("fsdp", "tensor")), P("fsdp")), out=P(("fsdp", "tensor")))
    work = hlo.read(text)
    assert counted(work) == {
        ("all-gather", "fsdp"): (5, 5 * 8 * 16 * 4),
        ("all-reduce", "tensor"): (5, 5 * 4 * 16 * 4),
        ("reduce-scatter", "fsdp"): (1, 4 * 32 * 4),
        ("collective-permute", "fsdp"): (1, 4 * 8 * 4),
        ("all-to-all", "fsdp x tensor"): (1, 4 * 8 * 4),
    }
    assert work.flops == 5 * 2 * 4 * 32 * 16
    assert work.unknown == 0


@pytest.mark.parametrize(
    ("kind", "moved"),
    [("all-gather", 3000), ("all-reduce", 1500), ("reduce-scatter", 750), ("all-to-all", 750),
     ("collective-permute", 1000)],
)  # fmt: skip
def test_each_of_four_devices_receives_what_a_ring_brings(kind, moved):
    assert Collective(kind, ((0, 1, 2, 3),), 1000).moved == moved


def test_groups_are_read_in_every_spelling():
    for told, axes in (
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", "fsdp"),
        ("replica_groups=[4,2]<=[8]", "tensor"),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "fsdp"),
        ("replica_groups=[1,8]<=[8]", "fsdp x tensor"),
        ("replica_groups={}", "fsdp x tensor"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", "fsdp"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", "tensor"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", "fsdp x tensor"),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", "?"),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,1},{3,3},{5,5},{7,7}}", "fsdp"),
        ("source_target_pairs={{0,3},{3,0}}", "fsdp x tensor"),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "?"),
        ("replica_groups=written another way", "?"),
    ):
        groups = parse.groups(f", channel_id=1, {told}, dimensions={{0}}", 8)
        kind = "collective-permute" if "pairs" in told else "all-gather"
        assert hlo.axes_of(Collective(kind, groups, 1), MESH) == axes, told


def test_a_program_of_a_tpu_is_read():
    """As libtpu writes it: products are convolutions, layouts have tiles and memories, collectives lie inside fusions.
    Of a scan's stack a turn reads and writes one layer; what lies in the core's own memory is free."""
    work = hlo.read((commands.REPOSITORY / "tests" / "tpu_program.txt").read_text())
    assert work.flops == 2 * 64 * 32 * 16
    queries, outputs = 4 * 2 * 512 * 24, 4 * 2 * 512 * 16  # scores and outputs; then scores, dv, dp and dk
    assert work.kernels == 2 * (queries + outputs) + 2 * (2 * queries + 2 * outputs)
    gathered, scattered = sorted(work.collectives)
    assert (scattered.kind, scattered.bytes, scattered.moved) == ("reduce-scatter", 4096, 3072)
    assert (gathered.kind, gathered.bytes, gathered.moved) == ("all-gather", 512, 512)
    assert {*work.collectives.values()} == {1}
    assert [hlo.axes_of(each, MESH) for each in (gathered, scattered)] == ["tensor", "fsdp"]
    layer = 64 * 16 * 4
    weights, inputs, product = 32 * 16 * 2, 64 * 32 * 2, 64 * 16 * 2
    copied = 10 * (layer + 4 + layer + 4 + 2 * 4)  # of a turn: in, its number, out; it is added to, and compared
    assert work.bytes == weights + inputs + product + copied + (4096 + 1024) + (512 + 1024)


def test_products_with_holes_are_counted_where_numbers_meet():
    """Of eight products of [16, 32] by [32, 4], one for each batch, in the way in which TPUs write them."""
    line = (
        "  %c = f32[8,16,4]{2,1,0} convolution(%a, %b), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, "
        "dim_labels=0bf_0io->0bf"
    )
    found = parse.instruction(line)
    arrays = {"a": (8, 16, 32), "b": (8, 32, 4)}
    within = {
        name: parse.Instruction(name, (parse.Array(shape, 0, True),), "parameter", ("0",), "", False)
        for name, shape in arrays.items()
    }
    places = [(o, k) for o in range(8) for k in range(8) if (o * 7 + k) % 8 == 0 and o * 7 + k <= 56]
    assert len(places) == 8
    assert hlo._convolution(within, found) == 2 * 8 * 16 * 32 * 4


def test_a_group_of_chips_receives_what_its_links_carry():
    v5e, v5p = CHIPS["v5e"], CHIPS["v5p"]
    row = [(x, 0) for x in range(16)]
    assert chips.received(v5e, (16, 16), row) == 2 * 50e9  # a ring
    assert chips.received(v5e, (8, 8), row[:8]) == 50e9  # a line
    assert chips.received(v5e, (16, 16), row[:4]) == 50e9
    assert chips.received(v5e, (16, 16), row[::4]) == 2 * 50e9 / 4  # its links serve three other groups, too
    assert chips.received(v5e, (16, 16), [(x, y) for x in range(16) for y in range(16)]) == 4 * 50e9
    assert chips.received(v5e, (2, 2), [(0, 0), (0, 1), (1, 0), (1, 1)]) == 2 * 50e9
    assert chips.received(v5p, (4, 4, 4), [(0, y, z) for y in range(4) for z in range(4)]) == 4 * 100e9


def test_a_step_takes_at_best_what_its_slowest_part_does():
    """394 TFLOP at 197 TFLOP/s, 409.5 GB at 819 GB/s, and 15 GB gathered twice by a ring of two links of 50 GB/s."""
    chip, places = CHIPS["v5e"], [(x, y) for x in range(16) for y in range(16)]
    gathered = Collective("all-gather", tuple(tuple(range(16 * x, 16 * x + 16)) for x in range(16)), 10**9)
    work = hlo.Work()
    work.collectives[gathered] = 2
    spent = chips.network(chip, (16, 16), places, work)
    assert spent == {gathered: pytest.approx(2 * 15e9 / 100e9)}
    line = chips.roofline(chip, 394e12, 409.5e9, sum(spent.values()))
    assert line == pytest.approx((2.0, 0.5, 0.3))
    assert (line.best, line.worst, line.bound) == (pytest.approx(2.0), pytest.approx(2.8), "compute")


def test_published_numbers_agree_with_each_other():
    """Of pods: 256 chips of v5e reduce 51.2 TB/s, as its page says, which is what half of their links carry."""
    assert 256 * 4 * CHIPS["v5e"].link == 51.2e12
    assert 256 * 4 * CHIPS["v6e"].link == 102.4e12
    assert all(chip.flops / chip.bandwidth > 150 for chip in CHIPS.values())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v7x:2x2", r"the chip of --topology=v7x:2x2 = 'v7x' is unknown.*choose one of: v4, v5e, v5p, v6e"),
        ("v5e", r"--topology=v5e is no slice; choose CHIP:SIDES, such as v4:8x8x16, v5e:16x16"),
        ("v5e:0x2", r"--topology=v5e:0x2 is no slice; choose CHIP:SIDES"),
        ("v5e:2x2x2", r"a slice of v5e has 2 sides; choose such as v5e:1x1, v5e:2x2,"),
        ("v5p:16x16", r"a slice of v5p has 3 sides; choose such as v5p:2x2x1"),
    ],
)
def test_what_is_no_slice_is_refused(name, told):
    with pytest.raises(UserError, match=told):
        step.open_slice(name)


@pytest.fixture
def no_libtpu(monkeypatch):
    found = step.importlib.util.find_spec
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))


def test_without_libtpu_the_command_that_gets_it_is_said(no_libtpu):
    with pytest.raises(UserError) as caught:
        plan.main(["--config=configs/rope_ablation.py", "--topology=v5e:2x2"])
    assert "needs libtpu" in str(caught.value)
    assert "python -m venv .venv-tpu && .venv-tpu/bin/pip install -r requirements-tpu.txt" in str(caught.value)


def test_a_cell_is_named_for_a_slice_alone():
    with pytest.raises(UserError, match="give a slice too, such as --topology=v5e:16x16"):
        plan.main(["--config=configs/rope_ablation.py", "--cell=x"])


def sliced(devices) -> step.Slice:
    return step.Slice("v5e:2x4", CHIPS["v5e"], (2, 4), devices)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (dict(fsdp=3), r"does not cover 8 devices; their product must be 8"),
        (dict(fsdp=16), r"does not cover 8 devices"),
        (dict(data=1, fsdp=8), r"data.rows / run.microbatches = 4 does not divide over run.mesh data x fsdp = 8"),
        (dict(context=8), r"rows of 12 tokens do not divide over run.mesh.context = 8"),
    ],
)
def test_a_mesh_that_does_not_cover_the_slice_is_refused(fields, told):
    config = lab.config.base()
    config.data.update(dict(rows=4, text_length=12))
    config.run.mesh.update(fields)
    with pytest.raises(UserError, match=told):
        step.check(config, sliced(jax.devices()))


def test_what_is_compiled_for_a_tpu_takes_its_kernels():
    assert kernels.resolve("auto", 4096) == "tiled"
    with kernels.compiled_for("tpu"):
        assert kernels.resolve("auto", 4096) == "pallas_tpu"
    assert kernels.resolve("auto", 4096) == "tiled"


def test_a_step_is_described_as_it_lies_over_the_mesh():
    """Of each device: its share of weights and optimizer, and its rows and tokens of the batch."""
    config = lab.config.base()
    config.model.update(dict(dim=64, layers=2, vocabulary=260))
    config.model.mixer.kv_heads = 2
    config.run.mesh.update(dict(data=1, fsdp=2, tensor=2, context=2))
    mesh = lab_mesh.make(config.run.mesh)
    state, numbers, batch = step.described(config, mesh)
    whole = canonical.abstract_batch(config)
    assert jax.tree.structure(batch) == jax.tree.structure(whole)
    for x in jax.tree.leaves(batch):
        assert x.sharding.shard_shape(x.shape) == (config.data.rows // 2, config.data.text_length // 2)
    trained = [x for x in jax.tree.leaves(state) if x.ndim > 1 and x.dtype == jnp.float32 and math.prod(x.shape) > 999]
    held = [(x.shape, x.sharding.shard_shape(x.shape)) for x in trained]
    assert len(held) >= 3 * 7 and all(math.prod(whole) == 4 * math.prod(part) for whole, part in held), held
    assert all(x.sharding.is_fully_replicated for x in numbers.values())


def test_what_does_not_fit_names_microbatches_that_divide_over_the_mesh():
    """9 GiB that shrink with the rows beside 10 that do not, on 12: a fifth would fit; 64 rows over 8 devices are cut
    into 1, 2, 4 or 8."""
    config = lab.config.base()
    config.data.rows, config.run.remat = 64, "full"
    told = memory.unfit(config, 10 * 2**30, 9 * 2**30, 12 * 2**30, over=8)
    assert told.startswith("a training step needs 19.0 GiB of a device, and it has 12.0; choose run.microbatches = 8 ")
    assert "microbatches" not in memory.unfit(config, 13 * 2**30, 2**30, 12 * 2**30, over=8)


@pytest.mark.parametrize(
    "said",
    [
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm.",
        "Ran out of memory on HBM, the total required for HLO temporaries (21.50G) exceeds available HBM (15.75G).",
    ],
)
def test_the_compiler_is_understood_where_memory_is_too_small(said):
    made = step._unfit(None, 1.0, 2**30, RuntimeError(f"RESOURCE_EXHAUSTED: {said}"))
    assert (made.total, made.limit, made.work) == (int(21.5 * 2**30), 15.75 * 2**30, None)


@pytest.mark.parametrize("said", ["another", "RESOURCE_EXHAUSTED: memory space vmem. Used 21.50M of 16.00M vmem."])
def test_what_else_a_compiler_says_is_no_lack_of_memory(said):
    with pytest.raises(RuntimeError, match=said):
        step._unfit(None, 1.0, 0, RuntimeError(said))


def test_rows_over_a_mesh_of_tpus_may_split_a_side():
    """The same devices in the same order as jax.make_mesh gives them, where it gives any."""
    config = lab.config.base().run.mesh
    config.update(dict(data=2, fsdp=2, tensor=2))
    made = jax.make_mesh((2, 2, 2, 1), lab_mesh.AXES, (AxisType.Auto,) * 4)
    assert np.array_equal(lab_mesh.make(config).devices, made.devices)
    assert lab_mesh.make(config) == made
