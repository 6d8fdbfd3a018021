"""Frequencies of every rope type of `transformers`, against what it computes (reference_rotations.py)."""

import json
import pathlib

import numpy as np
import pytest
from reference_rotations import SETTINGS, TYPES

from lab import config as lab_config
from lab.errors import UserError
from lab.exchange.rope import KEYS, from_rope_parameters
from lab.model import extrapolation, position
from lab.options import set_field

CASES = json.loads(pathlib.Path(__file__).with_name("reference_rotations.json").read_text())


def kind_of(case: dict) -> str:
    whole = case["config"].get("rope_scaling") or case["config"]["rope_parameters"]
    given = whole.get(case["layer_type"], whole)
    return given.get("rope_type", given.get("type"))


def model_of(config: dict, layer_type: str = "full_attention"):
    """config.model with the options that a config.json means, checked."""
    model = lab_config.base().model
    model.mixer.head_dim = config["head_dim"]
    for name, value in from_rope_parameters(config, layer_type, 1e4, partial=True).items():
        set_field(model, name, value)
    return model


def test_the_matrix_is_whole():
    found = {kind: [case for case in CASES if kind_of(case) == kind and case["length"] is None] for kind in TYPES}
    assert {kind: len(cases) for kind, cases in found.items()} == dict.fromkeys(TYPES, SETTINGS)
    for kind, cases in found.items():
        texts = [json.dumps(case["config"]) for case in cases]
        assert all(any(key in text for text in texts) for key in KEYS[kind])
        assert len(set(texts)) == SETTINGS


@pytest.mark.parametrize("kind", TYPES)
def test_frequencies_and_attention_factors_are_those_of_transformers(kind):
    for case in CASES:
        if kind_of(case) != kind:
            continue
        model = model_of(case["config"], case["layer_type"])
        model.position.length = case["length"] or 0
        position.check(model)
        R = position.rotary_dim(model)
        inverse, factor = extrapolation.frequencies(R, model.position)
        np.testing.assert_allclose(inverse, case["inverse"], rtol=1e-6, atol=1e-9, err_msg=str(case["config"]))
        np.testing.assert_allclose(factor, case["factor"], rtol=1e-6)


COMMON = {"head_dim": 16, "max_position_embeddings": 128}


@pytest.mark.parametrize(("given", "says"), [
    ({"rope_type": "yarm", "factor": 2.0}, "rope_type = 'yarm' is unknown (did you mean 'yarn'?)"),
    ({"rope_type": "axial"}, "rope_type = 'axial' is unknown"),
    ({"rope_type": "linear", "factor": 2.0, "alpha": 1}, "parameters of type 'linear' = 'alpha' is unknown"),
    ({"rope_type": "yarn", "factor": 2.0, "mrope_section": [1]}, "'mrope_section' is unknown"),
    ({"rope_type": "linear"}, "rope parameters of type 'linear' lack factor"),
    ({"rope_type": "linear", "factor": "2"}, "factor = '2' must be a number above 0"),
    ({"rope_type": "linear", "factor": 2.0, "type": "dynamic"}, "beside type = 'dynamic'"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate = 1 must be a truth value"),
    ({"rope_type": "longrope", "short_factor": 1.0, "long_factor": []}, "short_factor = 1.0 must be a list"),
    ({"sliding_attention": {"rope_type": "default"}}, "'full_attention' is unknown"),
], ids=str)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(given, says):
    with pytest.raises(UserError) as refused:
        from_rope_parameters(COMMON | {"rope_parameters": given}, "full_attention", 1e4, "a/config.json")
    assert str(refused.value).startswith("a/config.json: ") and says in str(refused.value)


def test_a_part_of_a_head_is_refused_where_nobody_asks_for_it():
    given = COMMON | {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    with pytest.raises(UserError, match="rotates the first 8 of 16 dimensions"):
        from_rope_parameters(given, "full_attention", 1e4)
    assert from_rope_parameters(given, "full_attention", 1e4, partial=True)["position.dim"] == 8


def test_layers_without_a_rotation_have_none():
    given = COMMON | {"rope_parameters": {"full_attention": None, "sliding_attention": {"rope_type": "default"}}}
    assert from_rope_parameters(given, "full_attention", 1e4) == {"position.name": "none"}
    assert from_rope_parameters(given, "sliding_attention", 5.0)["position.theta"] == 5.0


def test_truncate_of_a_type_of_layers_is_read_and_the_difference_told(caplog):
    yarn = {"rope_type": "yarn", "factor": 4.0, "truncate": False}
    whole = {"full_attention": yarn, "sliding_attention": {"rope_type": "default"}}
    found = from_rope_parameters(COMMON | {"rope_parameters": whole}, "full_attention", 1e4)
    assert found["position.scaling.truncate"] is False and "truncate = False" in caplog.text
