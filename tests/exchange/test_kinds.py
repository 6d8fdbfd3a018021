"""Settings of Hugging Face's format with a value that is another: one line that names it, or a model that is opened.

HOSTILE=1000 tries so many.
"""

import json
import math
import os
import pathlib
import shutil

import hostile
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.errors import UserError
from lab.exchange import architecture, companions, exporting, importing, kinds, rope
from lab.exchange.families import FAMILIES
from lab.exchange.source import CONFIG, INDEX

PLACE = pathlib.Path(__file__).with_name("reference_checkpoints")
NAMES = "gemma3", "llama3", "qwen2-window"
FILES = {CONFIG: kinds.CONFIG, companions.SETTINGS: kinds.SETTINGS, companions.GENERATION: kinds.GENERATION, INDEX: {}}
FEW = [*hostile.JSON, math.inf, -1, 0, 1, 2, 3, 63, 64, 2**31, 2.5, False, "no", "64", 10**30, "a\nb"]
JSON = st.recursive(
    st.sampled_from(FEW) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Copies that may be damaged."""
    return {name: shutil.copytree(PLACE / name, tmp_path_factory.mktemp("damaged") / name) for name in NAMES}


def paths(value, at: tuple = ()) -> list[tuple]:
    """To every value within one of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [path for key, inner in items for path in paths(inner, (*at, key))]


def damaged(value: dict, path: tuple, other) -> dict:
    value = json.loads(json.dumps(value))
    *outer, last = path
    inside = value
    for key in outer:
        inside = inside[key]
    inside[last] = other
    return value


@settings(max_examples=int(os.environ.get("HOSTILE", 40)), deadline=None, suppress_health_check=[*HealthCheck])
@given(st.data())
def test_any_value_anywhere_is_refused_in_one_line_or_read(places, data):
    """What is opened is a model of its family."""
    place = places[data.draw(st.sampled_from(NAMES))]
    name = data.draw(st.sampled_from([CONFIG] * 4 + [name for name in FILES if (place / name).is_file()]))
    file, whole = place / name, (place / name).read_bytes()
    held = json.loads(whole)
    path = data.draw(st.sampled_from(paths(held) + [(key,) for key in FILES[name]]))
    file.write_text(json.dumps(damaged(held, path, data.draw(JSON))))
    try:
        opened = importing.Opened(place)
        opened.end()
    except UserError as error:
        line = str(error)
        assert name in line and "\n" not in line, line
        named = [*map(str, path), f"the model of {CONFIG}", "rope parameters" if "rope_parameters" in path else name]
        assert any(one in line.removeprefix(str(file)) for one in named), (path, line)
        return
    finally:
        file.write_bytes(whole)
    config = opened.config()
    family, made = exporting.expressed(config, {"config": opened.text})
    assert not architecture.differences(config.model, architecture.read(family, made, file))


SPOILT = {
    CONFIG: dict(
        layer_types=[["full_attention"], ["x"] * 4, "full_attention", 3, [None] * 4],
        sliding_window_pattern=[0, "3", -1, 2.5],
        rope_parameters=[[], [1], "x", {"full_attention": 1}, {"full_attention": {"rope_type": []}}],
        bos_token_id=[[1], 64, "1", -1, 1.0, True],
        eos_token_id=[64, "2", [64], [None], {}],
        architectures=[5, "Gemma3ForCausalLM", [5]],
        attention_bias=["no", 1],
        hidden_size=["64", -16, math.nan, math.inf, None, True, 2**40],
        num_key_value_heads=[0, -2, 3],
        rms_norm_eps=[math.nan, -1.0, 0, "1e-6", 1e-60],
        vocab_size=[0, None, 2**31],
        query_pre_attn_scalar=[0, -1, 1e-200],
        model_type=[None, [], {}, 5],
    ),
    companions.SETTINGS: dict(bos_token=[5, [], {"content": 5}], add_bos_token=["yes"], chat_template=[5, [5]]),
    companions.GENERATION: dict(eos_token_id=["2", [[2]], -1]),
}
EACH = [(file, key, value) for file, keys in SPOILT.items() for key, values in keys.items() for value in values]


@pytest.mark.parametrize(("name", "key", "value"), EACH, ids=str)
def test_what_a_value_cannot_be_is_said_with_its_key(places, name, key, value):
    file = places["gemma3"] / name
    whole = file.read_bytes()
    held = json.loads(whole)
    held.pop("layer_types" if key == "sliding_window_pattern" else "", None)
    file.write_text(json.dumps(held | {key: value}))
    try:
        with pytest.raises(UserError, match=rf"{name}: .*{key.replace('rope_', 'rope.')}") as error:
            importing.Opened(file.parent).end()
    finally:
        file.write_bytes(whole)
    assert "\n" not in str(error.value)


def test_every_key_that_is_read_has_a_kind():
    """But those that are compared with what they may be."""
    for family in FAMILIES.values():
        assert {*family.keys, *family.defaults} <= {*kinds.CONFIG}
        kinds.check(family.defaults, kinds.CONFIG, "defaults")
    for kind, keys in rope.KEYS.items():
        assert {kind, *keys} - {*kinds.ROPE} == {kind}


def test_no_error_has_two_lines():
    assert str(UserError("a\nb\r\nc\u2028d")) == "a b c d"
