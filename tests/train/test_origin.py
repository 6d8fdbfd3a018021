"""Weights from a checkpoint: found by any path, known by their numbers, put together where a run kept a part."""

import shutil

import jax
import numpy as np
import pytest
import tiny

import lab
from lab.errors import UserError
from lab.model import parameter
from lab.storage import read_json, write_json
from lab.train import checkpoint, compiled, optimizer, origin, partition, step
from lab.train.checkpoint import Checkpoints, Position
from lab.train.partition import Partition
from lab.train.step import Program, State

ADAMW = Program("adamw", "declared", 1)
KEY = jax.random.key(3)
LORA = dict(model__lora__rank=2, model__lora__targets=("mixer",))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two cells: `whole`, and `part`, whose adapters are upon its weights; and the weights of both, put together."""
    place = tmp_path_factory.mktemp("cells")
    whole = tiny.model(tiny.config(model__layers=1), seed=1)
    tiny.saved(place / "whole", whole, tiny.config(model__layers=1))
    config = tiny.config(model__layers=1, checkpoint=str(place / "whole"), train__steps=2, **LORA)
    structure, adapters, rest = parameter.split(partition.parted(whole, Partition.of(config), KEY))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(size=x.shape), np.float32), adapters)
    part = parameter.nnx.merge(structure, adapters, rest)
    tiny.saved(place / "part", part, config)
    return place, whole, partition.whole(part)


def read(path, like, base=None):
    return origin.read(origin.find(path, base), like)


def same(model, expected) -> None:
    assert jax.tree.structure(parameter.split(model)[1]) == jax.tree.structure(parameter.split(expected)[1])
    jax.tree.map(np.testing.assert_array_equal, parameter.split(model)[1], parameter.split(expected)[1])


def test_a_part_is_loaded_upon_its_base_and_whole_models_as_they_were(place):
    place, whole, merged = place
    for path in ("whole", "whole/seed-0", "whole/seed-0/checkpoints/2"):
        same(read(place / path, like=merged), whole)
    same(read(place / "part", like=whole), merged)
    same(lab.load(place / "part")[0], merged)


def test_a_part_keeps_its_part_alone(place):
    part, whole = (checkpoint.newest(place[0] / name / "seed-0" / "checkpoints")[1] for name in ("part", "whole"))
    assert part["frozen"] == whole["weights"] != part["weights"] and "frozen" not in whole
    sizes = [sum(p.stat().st_size for p in (place[0] / name).rglob("*") if p.is_file()) for name in ("part", "whole")]
    assert sizes[0] < sizes[1]


def test_a_digest_is_of_the_numbers_wherever_they_lie(place, tmp_path):
    place, whole, _ = place
    digest = lambda path: origin.digest(origin.find(path))  # noqa: E731
    shutil.copytree(place / "whole", tmp_path / "moved")
    assert digest(tmp_path / "moved" / "seed-0") == digest(place / "whole")
    changed = jax.tree.map(lambda x: x, whole)
    changed.blocks[0].mixer.q = changed.blocks[0].mixer.q.replace(
        changed.blocks[0].mixer.q[...].at[0, 3].multiply(1.001)
    )
    tiny.saved(tmp_path / "changed", changed, tiny.config(model__layers=1))
    digests = [digest(path) for path in (place / "whole", tmp_path / "changed", place / "part")]
    assert len({*digests}) == 3


def test_a_base_that_is_gone_or_another_is_one_line_and_one_that_was_moved_can_be_named(place, tmp_path):
    place, whole, merged = place
    shutil.copytree(place / "part", tmp_path / "part")
    shutil.copytree(place / "whole", tmp_path / "moved")
    stored = read_json(tmp_path / "part" / "config.json")
    write_json(tmp_path / "part" / "config.json", stored | {"checkpoint": str(tmp_path / "gone")})
    with pytest.raises(UserError, match=r"began from weights that it does not hold, .*gone is in no cell") as error:
        lab.load(tmp_path / "part")
    assert "\n" not in str(error.value)
    same(read(tmp_path / "part", like=whole, base=tmp_path / "moved"), merged)
    tiny.saved(tmp_path / "other", tiny.model(tiny.config(model__layers=1), seed=2), tiny.config(model__layers=1))
    with pytest.raises(UserError, match="trained upon other weights than those of its base") as error:
        read(tmp_path / "part", like=whole, base=tmp_path / "other")
    assert "\n" not in str(error.value)


def test_training_begins_from_the_bits_of_a_checkpoint_with_a_fresh_optimizer(place):
    """On a mesh, whole and in part; and a part begins from a part that was put together."""
    place, whole, merged = place
    config = tiny.config(model__layers=1, checkpoint=str(place / "whole"), model_seed=5)
    mesh = tiny.mesh(fsdp=2, tensor=2)
    state = compiled.initial_state(config, ADAMW, mesh)
    same(state.model, whole)
    drawn = compiled.initial_state(tiny.config(model__layers=1), ADAMW, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(drawn)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(drawn), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, theirs.ndim)
    assert not any(np.any(x) for x in jax.tree.leaves(state.optimizer))
    upon = tiny.config(model__layers=1, checkpoint=str(place / "part"), model_seed=5, **LORA)
    begun = compiled.initial_state(upon, ADAMW, mesh)
    same(partition.whole(begun.model), merged)
    assert len(jax.tree.leaves(begun.optimizer)) < len(jax.tree.leaves(state.optimizer))


@pytest.fixture(scope="module")
def trained(place):
    """A partial state after two steps, and what it was before."""
    config = tiny.config(model__layers=1, checkpoint=str(place[0] / "whole"), **LORA)
    mesh = tiny.mesh()
    state = compiled.initial_state(config, ADAMW, mesh)
    before = jax.device_get(state.model)
    number = optimizer.numbers_by_step(config.train)
    run = jax.jit(lambda state, numbers, batch: step.train_step(state, numbers, batch, ADAMW))
    for n in range(2):
        state, _ = run(state, number(n), tiny.batch(n))
    return before, state


@pytest.mark.slow
def test_steps_change_adapters_alone(trained):
    before, state = trained
    jax.tree.map(np.testing.assert_array_equal, parameter.frozen(state.model), parameter.frozen(before))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), *(parameter.split(m)[1] for m in (before, state.model)))
    assert len(jax.tree.leaves(moved)) == 8 and all(jax.tree.leaves(moved))
    assert len(jax.tree.leaves(parameter.frozen(before))) > 8


@pytest.mark.slow
def test_a_partial_state_is_restored_to_the_bit_and_without_its_frozen_weights(trained, tmp_path):
    before, state = trained
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(Position(2, 4), state)
    checkpoints.wait()
    like = State(before, jax.tree.map(jax.numpy.zeros_like, state.optimizer))
    like = jax.device_put(like, parameter.shardings(like, tiny.mesh()))
    position, found = checkpoints.restore(like)
    checkpoints.close()
    assert position == Position(2, 4)
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_a_directory_that_holds_no_weights_is_one_line(place, tmp_path):
    (tmp_path / "empty").mkdir()
    write_json(tmp_path / "config.json", {})
    for path, told in (
        (tmp_path.parent / "nowhere", "is in no cell"),
        (tmp_path, "seed-0/checkpoints does not exist"),
        (place[0] / "whole" / "seed-0" / "checkpoints" / "7", "has no checkpoint 7; there are"),
    ):
        with pytest.raises(UserError, match=told) as error:
            origin.digest(origin.find(path))
        assert "\n" not in str(error.value)


def test_a_base_that_is_another_is_noticed_where_nothing_was_trained(place, tmp_path):
    """As it is where a part was, before anything is read; and its place may change."""
    shutil.copytree(place[0] / "whole", tmp_path / "base")
    untrained = tiny.config(model__layers=1, checkpoint=str(tmp_path / "base"), train__steps=0, train__warmup=0)
    tiny.saved(tmp_path / "asked", place[1], untrained)
    origin.keep(tmp_path / "asked", untrained.checkpoint)
    same(read(tmp_path / "asked", like=place[2]), place[1])
    shutil.move(tmp_path / "base", tmp_path / "moved")
    tiny.saved(tmp_path / "base", tiny.model(tiny.config(model__layers=1), seed=2), tiny.config(model__layers=1))
    with pytest.raises(UserError, match=r"asked began from weights .*base has others now; put them back") as told:
        origin.find(tmp_path / "asked")
    assert "\n" not in str(told.value)
    same(read(tmp_path / "asked", like=place[2], base=tmp_path / "moved"), place[1])
    with pytest.raises(UserError, match="base has others now"):
        origin.find(tmp_path / "asked", base=tmp_path / "base")


def test_a_pinned_checkpoint_stays_that_of_its_step(place, tmp_path):
    shutil.copytree(place[0] / "whole", tmp_path / "base")
    pinned, digest = origin.pinned(tmp_path / "base"), origin.digest(origin.find(tmp_path / "base"))
    assert pinned == str(tmp_path / "base" / "seed-0" / "checkpoints" / "2")
    later = Checkpoints(tmp_path / "base" / "seed-0" / "checkpoints", keep=2)
    other = tiny.model(tiny.config(model__layers=1), seed=2)
    later.save(Position(4, 0), step.initial_state(other, Program("adamw", "declared")))
    later.close()
    assert origin.digest(origin.find(pinned)) == digest != origin.digest(origin.find(tmp_path / "base"))
    same(read(pinned, like=other), place[1])


def test_a_partial_run_does_not_go_on_upon_another_base(trained, tmp_path):
    """What it saved is neither taken nor set aside."""
    before, state = trained
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(Position(2, 4), state)
    checkpoints.wait()
    structure, weights, rest = parameter.split(before)
    rest = jax.tree.map(lambda x: x * 1.5 if x.ndim > 2 else x, rest)
    like = State(parameter.nnx.merge(structure, weights, rest), jax.tree.map(jax.numpy.zeros_like, state.optimizer))
    with pytest.raises(checkpoint.OtherBase, match="trained upon other weights than those of its base; put"):
        checkpoints.restore(jax.device_put(like, parameter.shardings(like, tiny.mesh())))
    checkpoints.close()
    assert (tmp_path / "checkpoints" / "2").is_dir() and not (tmp_path / checkpoint.SET_ASIDE).exists()
