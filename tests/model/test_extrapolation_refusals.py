"""What methods for longer texts refuse: fields that mean nothing to them, layers that they cannot stretch."""

import pytest
import tiny
from long_texts import of_map, spec

from lab import model as lab_model
from lab.errors import UserError
from lab.model import extrapolation


@pytest.mark.parametrize(("overrides", "says"), [
    (dict(position__scaling__name="yarn", position__trained=0), "model.position.trained = 0, the length that"),
    (dict(position__map__name="dca", position__trained=0), "is needed by model.position.map.name = 'dca'"),
    (dict(position__map__name="rerope", position__trained=0), "is needed by model.position.map.name = 'rerope'"),
    (dict(position__log_n=True, position__trained=1), "is needed by model.position.log_n = True"),
    (dict(position__scaling__name="linear"), "model.position.scaling.factor = 0 is taken from model.position.length"),
    (dict(position__map__name="self-extend", position__map__window=10), "is not divisible by model.position.map.group"),
    (dict(position__map__name="hybrid", position__map__cf=1.23456), "is no ratio of whole numbers"),
    (dict(position__map__name="hybrid", position__map__cf=0.5), "model.position.map.cf = 0.5 must be at least 1"),
    (dict(position__map__name="dca", position__map__local=13), "make chunks of -1 tokens"),
    (dict(position__scaling__name="ntk", position__scaling__factor=2.0, position__dim=2), "at least 4 rotary dimens"),
    (dict(position__scaling__name="yarn", position__scaling__factor=2.0, position__scaling__beta_fast=0.5),
     "beta_fast = 0.5 must be above model.position.scaling.beta_slow"),
    (dict(position__scaling__name="longrope", position__scaling__factor=2.0), "short_factor has 0 numbers for 4"),
    (dict(position__scaling__factor=2.0), "model.position.scaling.factor = 2.0 means nothing beside"),
    (dict(position__map__name="hybrid", position__unselected="index"), "4 rotary pairs turn by the index"),
    (dict(position__map__name="rerope", mixer__rotate="qkv"), "'rerope' rotates queries and keys; choose 'qk'"),
    (dict(position__map__name="rerope", mixer__name="forgetting"), "does not take model.position.map.name = 'rerope'"),
    (dict(position__log_n=True, mixer__name="mla", mixer__latent=8, position__dim=4), "does not take model.position."),
    (dict(position__scaling__name="yarn", position__scaling__factor=2.0, mixer__name="s2"), "attention factor 1.06931"),
    (dict(position__map__name="rerope", stream__name="v4m1"), "looks into scores, and does not take"),
    (dict(position__log_n=True, position__temperature=1.0), "two growths of queries"),
    (dict(position__scaling__name="dynamic", position__map__name="dca"), "depends on the length of the text, and besi"),
    (dict(position__map__name="stretched"), "'stretched' is unknown"),
    (dict(position__temperature_step=9), "temperature_step = 9 means nothing beside model.position.temperature = 0.0"),
    (dict(position__length=9), "length = 9 means nothing beside model.position.scaling.name = 'default'; choose 0, or"),
    (dict(position__scaling__name="linear", position__scaling__factor=2.0, position__length=9),
     "length = 9 means nothing beside model.position.scaling.factor = 2.0; choose 0, or another"),
    (dict(position__scaling__name="proportional", position__length=9), "beside model.position.scaling.name = 'propor"),
    (dict(position__scaling__name="ntk", position__scaling__factor=2.0,
          position__scaling__original_max_position_embeddings=9), "nothing beside model.position.scaling.factor = 2.0"),
    (dict(position__scaling__name="yarn", position__scaling__factor=2.0, position__scaling__mscale=0.7),
     "scaling.mscale = 0.7 means nothing beside model.position.scaling.mscale_all_dim = 0.0; choose 0.0, or another"),
    (dict(position__scaling__name="yarn", position__scaling__factor=2.0, position__scaling__mscale_all_dim=0.7),
     "scaling.mscale_all_dim = 0.7 means nothing beside model.position.scaling.mscale = 0.0; choose 0.0, or another"),
    (dict(position__scaling__name="yarn", position__scaling__factor=2.0, position__scaling__mscale=0.7,
          position__scaling__mscale_all_dim=0.7, position__scaling__attention_factor=1.1), "attention_factor = 1.1"),
    (dict(pattern=((), (("position.temperature_step", 9),))), "temperature_step = 9 means nothing beside model"),
], ids=str)  # fmt: skip
def test_methods_that_mean_nothing_are_refused(overrides, says):
    with pytest.raises(UserError) as refused:
        lab_model.spec.check(spec(**overrides))
    assert says in str(refused.value)


def test_a_method_of_a_model_without_a_rotation_is_refused():
    for field, value in (("map", "hybrid"), ("scaling", "linear")):
        model = tiny.config(model__position__name="none").model
        model.position[field].name = value
        with pytest.raises(UserError, match=rf"model.position.{field}.name = '{value}' means nothing beside .*'none'"):
            lab_model.spec.check(model)


def test_a_map_that_says_a_pair_twice_is_refused(monkeypatch):
    twice = extrapolation.POSITION_MAPS["rerope"]._replace(
        pieces=lambda chosen: 2 * extrapolation.position_maps.rerope(chosen)
    )
    monkeypatch.setitem(extrapolation.POSITION_MAPS, "rerope", twice)
    with pytest.raises(UserError, match="are a pair of bands"):
        lab_model.spec.check(of_map("rerope"))
