"""What streams refuse: fields that mean nothing to them, models that they cannot run on, rows beyond their weights."""

import functools

import jax
import numpy as np
import pytest
import tiny
import variants

from lab import model as lab_model
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.model import streams
from lab.model.streams import STREAMS
from lab.options import set_field
from lab.study.define import plan, resolve

NAMES = [name for name in STREAMS if name[0] == "v" or name == "temperature"]


@pytest.mark.parametrize(("overrides", "says"), [
    (dict(name="v1m8"), "did you mean 'v1m"),
    (dict(name="v4m1A", length=0), "model.stream.length = 0 must be at least 1: tokens of a row at most"),
    (dict(name="v4m1", length=8),
     "model.stream.length = 8 means nothing beside model.stream.name = 'v4m1'; choose 0, or one of: "),
    (dict(name="v2m1", accumulate="post"),
     "model.stream.accumulate = 'post' means nothing beside model.stream.name = 'v2m1'; choose 'raw'"),
    (dict(name="v1m1", accumulate="sum"), "choose one of: raw, post"),
    (dict(name="v4mC", length=8, input="normed"),
     "or one of: model.stream.name = 'v4m1D', model.stream.name = 'v4m1E', model.stream.name = 'v4mD'"),
], ids=str)  # fmt: skip
def test_streams_that_mean_nothing_are_refused(overrides, says):
    check_refused({f"model__stream__{field}": value for field, value in overrides.items()}, says)


@pytest.mark.parametrize(("name", "overrides", "says"), [
    *((name, dict(model__layers=1), f"model.layers = 1: model.stream.name = {name!r} combines layers")
      for name in NAMES if name not in ("v4mC", "v4mD", "temperature")),
    *((name, dict(model__mixer__name="delta", model__rule="causal"),
       f"model.mixer.name under model.stream.name = {name!r} = 'delta' is unknown")
      for name in NAMES if name[:2] in ("v3", "v4", "te")),
    ("v3m1", dict(model__mixer__name="s2"), "choose one of: attention, differential"),
    ("v4m1", dict(model__mixer__name="forgetting"), "choose one of: attention, differential, mla, s1, s2, s3, gta"),
    ("v4m1", dict(model__pattern=((), (("mixer.name", "s2"),))),
     "model.pattern has the values attention, s2 of mixer.name"),
    *((name, dict(model__mixer__softmax_scale=0.5),
       f"model.mixer.softmax_scale = 0.5 means nothing beside model.stream.name = {name!r}")
      for name in ("v4m4", "v4m6", "v4m7")),
], ids=str)  # fmt: skip
def test_streams_that_cannot_run_on_a_model_are_refused(name, overrides, says):
    length = dict(model__stream__length=8) if "length" in STREAMS[name].options else {}
    check_refused(dict(model__stream__name=name) | length | overrides, says)


@pytest.mark.parametrize("name", STREAMS)
def test_a_state_that_grows_is_not_scanned(name):
    made = tiny.config(**variants.stream(name, run__scan=True))
    if not STREAMS[name].grows:
        plan.check_run(made)
        return
    with pytest.raises(UserError, match=rf"run.scan = True: model.stream.name = '{name}' has a state that grows"):
        plan.check_run(made)


def check_refused(overrides: dict, says: str) -> None:
    with pytest.raises(UserError) as refused:
        lab_model.abstract(tiny.config(**overrides).model)
    assert says in str(refused.value) and "\n" not in str(refused.value)


POSITIONAL = ["v4m1A", "v4m1B", "v4m1C", "v4mC"]


@functools.cache
def positional(name: str):
    return tiny.model(tiny.config(**variants.stream(name, model__stream__length=8, model__layers=2)))


@pytest.mark.parametrize("name", POSITIONAL)
def test_positions_without_a_weight_are_refused_and_not_slots(name):
    """Whatever the length of the row, of the cache, and of what is padding."""
    model, at = positional(name), Coordinates.single(1, 9)
    says = rf"at position 8 of its segment, beyond model.stream.length = 8: model.stream.name = '{name}' has weights"
    cache = jax.eval_shape(lambda: model.init_cache(1, 32))
    with pytest.raises(UserError, match=says):
        jax.eval_shape(lambda: model(np.zeros((1, 9), np.int32), at))
    with pytest.raises(UserError, match=says):
        jax.eval_shape(lambda cache: model.extend(np.zeros((1, 9), np.int32), at, cache), cache)
    for fine in (Coordinates(at.segment - (at.index == 8), *jax.tree.leaves(at)[1:]),  # the last is padding
                 Coordinates(at.index // 5, at.branch, at.index % 5, at.index % 5)):  # fmt: skip  # two segments
        jax.eval_shape(lambda at=fine: model(np.zeros((1, 9), np.int32), at))
        jax.eval_shape(lambda cache, at=fine: model.extend(np.zeros((1, 9), np.int32), at, cache), cache)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4mC", "v4m1A", "v4m1B", "v4m1C"])
def test_a_longer_cache_gives_the_logits_of_the_full_pass_and_a_traced_position_beyond_gives_nan(name):
    model, at = positional(name), Coordinates.single(1, 8)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (1, 8)).astype(np.int32)
    extend = jax.jit(lambda at, cache: model.extend(tokens, at, cache)[0])
    full = model(tokens, at)
    np.testing.assert_allclose(extend(at, model.init_cache(1, 32)), full, atol=3e-4)
    beyond = extend(tiny.moved(at, index=1), model.init_cache(1, 32))
    assert np.isnan(beyond[0, 7]).all()


@pytest.mark.parametrize("name", POSITIONAL)
def test_longer_rows_than_there_are_weights_for_are_refused(name):
    made = tiny.config(**variants.stream(name, model__stream__length=24))
    streams.check_rows(made.model, "data.texts_per_row", 24)
    with pytest.raises(UserError, match=r"data.texts_per_row makes rows of 25 tokens: model.stream.name = '" + name):
        streams.check_rows(made.model, "data.texts_per_row", 25)
    streams.check_rows(tiny.config(**variants.stream("v4m1")).model, "data.texts_per_row", 25)


@pytest.mark.parametrize("room", ["data", "evaluate.loss"])
def test_a_study_of_longer_rows_than_trained_is_refused_before_it_runs(room):
    made = tiny.config(**variants.stream("v4m1B", model__stream__length=24))
    plan.check(*resolve.resolve(made))
    set_field(made, f"{room}.texts_per_row", 8)
    with pytest.raises(UserError, match=rf"{room}.texts_per_row x data.text_length makes rows of 48 tokens"):
        plan.check(*resolve.resolve(made))
