"""Which models are written as which family, and which are refused; and what is written beside weights."""

import json
import pathlib

import numpy as np
import pytest

import lab.config
from lab.data import tokenizers
from lab.errors import UserError
from lab.exchange import architecture, companions, exporting
from lab.model import extrapolation, presets
from lab.options import set_field


def sized(preset: str | None = None, **fields) -> lab.config.ConfigDict:
    config = lab.config.base()
    if preset:
        presets.apply(config.model, preset)
    for name, value in fields.items():
        set_field(config.model, name.replace("__", "."), value)
    return config


@pytest.mark.parametrize(
    ("preset", "fields", "family", "key", "value"),
    [
        (None, {}, "llama", "num_key_value_heads", 1),
        ("llama", {"position__theta": 5e5}, "llama", "rope_theta", 5e5),
        ("llama", {"rule": "window(9) & causal"}, "mistral", "sliding_window", 9),
        ("llama", {"mixer__bias": "all"}, "llama", "attention_bias", True),
        ("qwen2", {}, "qwen2", "use_sliding_window", False),
        ("qwen3", {"mixer__head_dim": 40}, "qwen3", "head_dim", 40),
        ("gemma2", {"mixer__softmax_scale": 1 / 12}, "gemma2", "query_pre_attn_scalar", 144),
    ],
)
def test_a_model_of_a_family_is_written_as_that(preset, fields, family, key, value):
    found, made = exporting.expressed(sized(preset, **fields), {})
    assert (found.model_type, made[key]) == (family, value)


STRETCHES = {  # what a model was given here, and what of that config.json says
    "linear": (dict(factor=4.0), dict(rope_type="linear", factor=4.0)),
    "linear of a length": (dict(length=2048), dict(rope_type="linear", factor=4.0)),
    "dynamic": (dict(factor=4.0), dict(rope_type="dynamic", factor=4.0)),
    "yarn": (
        dict(factor=4.0, mscale=0.7, mscale_all_dim=0.5),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512, mscale=0.7, mscale_all_dim=0.5),
    ),
    "yarn of a length": (
        dict(length=2048, truncate=False),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512, truncate=False),
    ),
    "yarn up to L": (dict(length=100), dict(rope_type="yarn", factor=1.0)),
    "llama3": (dict(length=1024), dict(rope_type="llama3", factor=2.0, original_max_position_embeddings=512)),
    "longrope": (
        dict(factor=3.0, short_factor=(1.0,) * 12, long_factor=(2.0,) * 12),
        dict(rope_type="longrope", factor=3.0, short_factor=[1.0] * 12, long_factor=[2.0] * 12),
    ),
    "longrope of a length": (
        dict(length=1024, short_factor=(1.0,) * 12, long_factor=(2.0,) * 12),
        dict(rope_type="longrope", factor=2.0, short_factor=[2.0] * 12, long_factor=[2.0] * 12),
    ),
    "ntk": (dict(factor=4.0), dict(rope_theta=1e4 * 4 ** (24 / 22))),
    "dynamic of a length": (dict(length=2048), dict(rope_theta=1e4 * 4 ** (24 / 22))),
    "proportional": (dict(partial_rotary_factor=0.5), dict(rope_type="proportional", partial_rotary_factor=0.5)),
}
LLAMA = dict(mixer__heads=4, mixer__head_dim=24, position__unselected="time", position__trained=512)


def stretched(kind: str) -> lab.config.ConfigDict:
    fields, _ = STRETCHES[kind]
    scaling = {f"position__scaling__{name}": value for name, value in fields.items() if name != "length"}
    name = kind.split()[0]
    length = fields.get("length", 0)
    return sized("llama", **LLAMA, **scaling, position__scaling__name=name, position__length=length)


@pytest.mark.parametrize("kind", STRETCHES)
def test_a_rotary_change_made_here_is_written_too(kind):
    """What config.json cannot say is said otherwise, and the frequencies that are read from it are the same."""
    config = stretched(kind)
    family, made = exporting.expressed(config, {})
    said = {"rope_theta": made["rope_theta"]} | (made["rope_scaling"] or {})
    assert made["max_position_embeddings"] == 512
    for key, value in STRETCHES[kind][1].items():
        assert said[key] == (pytest.approx(value) if key == "rope_theta" else value)
    read = architecture.read(family, json.loads(json.dumps(made)), pathlib.Path("config.json"))
    for length in (512, 2048):
        ours, theirs = (
            extrapolation.frequencies(24, one.position, None if one.position.length else length)
            for one in (config.model, read)
        )
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(position__scaling__name="ntk-by-parts", position__scaling__factor=2.0), "position.scaling.name"),
        (dict(position__map__name="hybrid"), "position.map.name"),
        (dict(position__log_n=True), "position.log_n"),
        (dict(position__temperature=0.1), "position.temperature"),
    ],
)
def test_a_rotary_change_that_config_json_cannot_say_is_refused(fields, named):
    with pytest.raises(UserError, match=rf"no family .*model\.{named.replace('.', '[.]')} = "):
        exporting.expressed(sized("llama", **LLAMA, **fields), {})


@pytest.mark.parametrize(
    ("preset", "field", "value"),
    [
        ("llama", "stream.name", "parallel"),
        ("llama", "rule", "own_branch"),
        ("llama", "feedforward.name", "gelu"),
        ("llama", "mixer.name", "mla"),
        ("llama", "mixer.sink", True),
        ("llama", "position.ratio", 0.5),
        ("llama", "position.name", "none"),
        ("qwen3", "mixer.bias", "qkv"),
        ("gemma2", "norm.bias", True),
        ("gemma2", "embedding_scale", 3.0),
        ("qwen2", "logit_softcap", 5.0),
        ("llama", "pattern", ((("position.theta", 3.0),), ())),
    ],
)
def test_a_model_of_no_family_is_refused_by_its_option(preset, field, value):
    config = sized(preset, layers=2)
    set_field(config.model, field, value)
    named = "position.theta" if field == "pattern" else field
    with pytest.raises(UserError, match=rf"no family .*model\.{named.replace('.', '[.]')}"):
        exporting.expressed(config, {})


@pytest.mark.parametrize(
    "entries", [[1], [1, 1, 1], [1, 2, 1, 2], [1, 2, 1], [1, 1, 2, 1, 1, 2, 1, 1], [1, 2, 3], [2, 1, 1, 1]]
)
def test_a_pattern_is_as_short_as_it_repeats(entries):
    found = architecture.shortest_period(entries)
    assert [found[m % len(found)] for m in range(len(entries))] == entries
    shorter = [entries[:n] for n in range(1, len(found))]
    assert all([one[m % len(one)] for m in range(len(entries))] != entries for one in shorter)


def test_bytes_are_written_as_a_tokenizer_of_bytes(tmp_path):
    assert companions.write(tmp_path, tmp_path, tokenizers.Bytes()) is None
    found = tokenizers.load(tmp_path)
    for text in ("plain words, twice  spaced\n\n\ttabs", "Grüße 東京 🙂 \x00\x7f", "<|endoftext|>"):
        assert found.encode(text).tolist() == tokenizers.Bytes().encode(text).tolist()
        assert found.decode(found.encode(text)) == text
    assert (found.eos, found.size) == (tokenizers.Bytes.eos, tokenizers.Bytes.size)


def spelled(model_type: str, **values) -> lab.config.ConfigDict:
    """config.model of a config.json that says no more than this."""
    family, text = architecture.text_of({"model_type": model_type} | values, pathlib.Path("config.json"))
    return architecture.read(family, text, pathlib.Path("config.json"))


def test_what_config_json_lacks_is_what_transformers_takes():
    """As the published files of these models leave it out."""
    assert (
        spelled("mistral").rule == "causal & window(4096)" and spelled("mistral", sliding_window=None).rule == "causal"
    )
    llama = spelled("llama", hidden_size=2048, num_attention_heads=16)
    assert (llama.mixer.kv_heads, llama.mixer.head_dim, llama.position.theta, llama.tied) == (16, 128, 1e4, False)
    qwen = spelled("qwen2", sliding_window=131072, max_window_layers=21, use_sliding_window=False, rope_theta=1e6)
    assert (qwen.rule, qwen.pattern, qwen.mixer.bias, qwen.position.theta) == ("causal", ((),), "qkv", 1e6)
    assert qwen.position.trained == 32768 and spelled("qwen3").mixer.head_dim == 128
    last = spelled("qwen2", num_hidden_layers=3, max_window_layers=2, use_sliding_window=True, sliding_window=9)
    assert last.pattern == ((), (), (("rule", "causal & window(9)"),))
    gemma2 = spelled("gemma2", query_pre_attn_scalar=144)
    assert gemma2.pattern == ((("rule", "causal & window(4096)"),), ())
    assert (gemma2.mixer.softmax_scale, gemma2.mixer.softcap, gemma2.logit_softcap) == (1 / 12, 50.0, 30.0)
    assert gemma2.embedding_scale == 2304**0.5 and gemma2.tied
    text = {"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "num_hidden_layers": 34}
    gemma3 = spelled("gemma3", text_config=text)
    local = dict(gemma3.pattern[0])
    assert gemma3.pattern == (*[gemma3.pattern[0]] * 5, ())
    assert (local["rule"], local["position.theta"]) == ("causal & window(1024)", 1e4)
    assert local["position.scaling.name"] == "default"
    assert (gemma3.position.theta, gemma3.position.scaling.name, gemma3.position.scaling.factor) == (1e6, "linear", 8.0)
    assert (gemma3.rule, gemma3.mixer.qk_norm, gemma3.mixer.softcap) == ("causal", True, 0.0)
