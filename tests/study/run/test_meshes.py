"""The mesh that a study takes where it asks for one: the simplest that divides its cells and fits, and why."""

import dataclasses
import math
import re

import commands
import jax
import pytest
import tiny
import variants

from lab import plan as plan_command
from lab import runtime
from lab.errors import UserError
from lab.model import mesh as lab_mesh
from lab.model import parameter
from lab.study.define.cell import Cell
from lab.study.open import Study
from lab.study.run import meshes
from lab.train import compiled, memory
from lab.train.step import Program

WIDE = dict(model__dim=64, model__feedforward__width=256)  # weights that outweigh what a row keeps


def made(**overrides) -> Cell:
    config = tiny.config(**dict(data__rows=8, evaluate__loss__rows=8, evaluate__loss__texts=32) | overrides)
    config.run.auto_mesh = True
    return Cell("one", {}, config)


def decided(*cells: Cell, gib: float = 1.0) -> tuple[dict[str, int], str]:
    config = cells[0].config.copy_and_resolve_references()
    config.run.device_memory = gib
    sizes, why = meshes.decide(config, [*cells])
    return {axis: size for axis, size in sizes.items() if size > 1}, why


@pytest.fixture(scope="module")
def needed():
    """GiB of a device under a mesh, by estimate."""
    estimate = memory.estimate(made(**WIDE).config)
    return lambda **sizes: estimate(tiny.mesh(**sizes)) / meshes.GIB


def test_data_alone_is_taken_while_it_fits_then_as_little_fsdp_as_does(needed):
    sizes, why = decided(made(**WIDE))
    assert sizes == dict(data=8) and re.fullmatch(r"data 8 chosen: about 0\.\d+ GiB of a device's 1\.0", why)
    for few, many, taken in ((1, 2, dict(data=4, fsdp=2)), (2, 4, dict(data=2, fsdp=4)), (4, 8, dict(fsdp=8))):
        less, more = (needed(data=8 // fsdp, fsdp=fsdp) for fsdp in (many, few))
        assert less < more
        sizes, why = decided(made(**WIDE), gib=(less + more) / 2 / meshes.ROOM)
        assert sizes == taken and "; data 8: 0." in why and "may not fit" not in why


def test_what_fits_nowhere_takes_what_needs_least_and_says_so(needed):
    sizes, why = decided(made(**WIDE), gib=1e-5)
    assert "which may not fit; data 8: 0." in why
    least = min(needed(**each) for each in lab_mesh.simplest_first(8) if 4 % each["tensor"] == 0)
    assert needed(**sizes) == pytest.approx(least, rel=1e-6)


def test_no_axis_is_taken_that_does_not_divide():
    sizes, why = decided(made(data__rows=4))
    assert sizes == dict(data=4, tensor=2)
    assert why.endswith("; data 8: data.rows / run.microbatches = 4 does not divide over run.mesh data x fsdp = 8")
    one_row = dict(data__rows=1, evaluate__loss__rows=1)
    assert decided(made(**one_row))[0] == dict(tensor=4, context=2)  # it has four heads
    assert decided(made(), made(data__rows=4))[0] == dict(data=4, tensor=2)  # one mesh for all cells
    with pytest.raises(UserError, match=r"run.auto_mesh finds no mesh over 8 devices that divides all cells; data 8: "):
        decided(Cell("two", {}, variants.config("delta : attention", **one_row)))


def test_an_estimate_counts_what_lies_over_the_mesh():
    """Weights, moments and gradients, as arrays that are there lie."""
    config = made(**WIDE).config

    def held(mesh) -> int:
        state = compiled.initial_state(config, Program.of(config), mesh)
        arrays = jax.tree.leaves((state, parameter.split(state.model)[1]))
        return sum(x.addressable_shards[0].data.nbytes for x in arrays)

    estimate, meshes_of_eight = memory.estimate(config), [tiny.mesh(data=8), tiny.mesh(data=2, fsdp=4)]
    estimated, there = ([of(mesh) for mesh in meshes_of_eight] for of in (estimate, held))
    assert estimated[0] - estimated[1] == pytest.approx(there[0] - there[1], abs=8) and there[0] > 3 * there[1]


def test_what_is_kept_of_a_row_is_what_attention_and_the_other_products_read():
    """Of plain pre-normed layers: at least their inputs, at most a few times as much; and of remat their inputs."""
    config, length = made(model__layers=8).config, 24
    whole, by_heads, largest = memory._kept(config, "none")
    model, mixer = config.model, config.model.mixer
    read = model.layers * length * 4 * (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim
    assert read <= by_heads <= 6 * read
    assert model.layers * length * 4 * 4 * model.dim <= whole <= 24 * model.layers * length * 4 * model.dim
    assert largest >= length * 4 * tiny.VOCABULARY
    less, none_by_heads, _ = memory._kept(config, "full")
    assert model.layers * length * 4 * model.dim <= less < whole / 3 and none_by_heads < by_heads / 3


def test_the_choice_takes_the_place_of_the_option_in_all_configs():
    cell = made()
    study = Study(cell.config, [cell], [{"name": "one", "executable": "before"}], None).decide_mesh()
    for config in (study.config, study.cells[0].config):
        assert dict(config.run.mesh) == dict(data=8, fsdp=1, tensor=1, context=1) and not config.run.auto_mesh
    assert study.mesh.startswith("data 8 chosen: about ") and study.rows[0]["executable"] != "before"
    other = dataclasses.replace(study, mesh="")
    assert other.decide_mesh() is other


def test_memory_is_that_of_the_device_or_its_share_of_the_host(monkeypatch):
    share = memory.of_device()
    assert share == pytest.approx(math.prod(map(memory.os.sysconf, ("SC_PHYS_PAGES", "SC_PAGE_SIZE"))) / 8, rel=1e-6)
    monkeypatch.setattr(memory, "_stats", lambda: {"bytes_limit": 77})
    assert memory.of_device() == 77


def test_a_plan_shows_the_mesh(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "simulate_devices", lambda config: None)  # they are there
    study = commands.write_study(tmp_path / "tiny.py", commands.write_corpus(tmp_path / "c.jsonl"), commands.ONE_CELL)
    asked = [f"--config={study}", "--config.run.auto_mesh=True", "--config.run.device_memory=2"]
    plan_command.main(asked)
    assert "mesh data 4 x tensor 2 chosen: about 0." in capsys.readouterr().out
