"""The order of a row's tokens changes nothing but the work."""

import jax
import numpy as np
import pytest
import tiny
import variants

from lab.kernels import tiled
from lab.model.arrangement import Arrangement

ANY_ORDER = [name for name in variants.VARIANTS if not variants.in_order(name)]


@pytest.mark.matrix("variant")
@pytest.mark.parametrize("variant", variants.marked(ANY_ORDER, fast=("default", "local : global")))
def test_logits_are_those_of_the_token_wherever_it_lies(variant):
    model, batch = tiny.model(variants.config(variant)), tiny.batch(rows=2, length=24)
    order = np.argsort(np.random.default_rng(0).random((2, 24)), axis=1)
    moved = jax.tree.map(lambda x: np.take_along_axis(x, order, axis=1), batch)
    given, found = (np.asarray(model(b.tokens, b.coordinates)) for b in (batch, moved))
    real = moved.coordinates.segment >= 0
    expected = np.take_along_axis(given, order[..., None], axis=1)
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("overrides", [
    dict(model__rule="own_branch"),
    dict(model__pattern=((("rule", "own_branch"),), (("rule", "own_branch & window(8)"),))),
], ids=str)  # fmt: skip
def test_a_batch_is_rearranged_whole(monkeypatch, overrides):
    monkeypatch.setattr(tiled, "tile_sizes", lambda T, S: (8, 8))
    batch = tiny.batch(rows=3, length=96)
    config = tiny.config(**overrides)
    found, share = Arrangement(config.model, config.run, 96)(batch)
    before, after = (np.stack(jax.tree.leaves(b), axis=-1) for b in (batch, found))
    assert (before != after).any() and 0 < share < 1
    for row in range(3):  # the same tokens, each with its label and coordinates
        assert sorted(map(tuple, before[row].tolist())) == sorted(map(tuple, after[row].tolist()))


def test_layers_that_read_tokens_in_turn_keep_their_order(monkeypatch):
    monkeypatch.setattr(tiled, "tile_sizes", lambda T, S: (8, 8))
    batch = tiny.batch(rows=3, length=96)
    hybrid = ((("rule", "own_branch"),), (("mixer.name", "delta"), ("rule", "causal")))
    config = tiny.config(model__pattern=hybrid)
    found, share = Arrangement(config.model, config.run, 96)(batch)
    jax.tree.map(np.testing.assert_array_equal, found, batch)
    assert 0 < share < 1


def test_relative_attention_computes_every_pair_in_any_order(monkeypatch):
    monkeypatch.setattr(tiled, "tile_sizes", lambda T, S: (8, 8))
    batch = tiny.batch(rows=3, length=96)
    config = tiny.config(model__position__name="shaw", model__rule="own_branch")
    found, share = Arrangement(config.model, config.run, 96)(batch)
    jax.tree.map(np.testing.assert_array_equal, found, batch)
    assert share == 1
    config = tiny.config(model__pattern=((("position.name", "shaw"),), ()), model__rule="own_branch")
    assert Arrangement(config.model, config.run, 96)(batch)[1] < 1
