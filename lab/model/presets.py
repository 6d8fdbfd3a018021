"""What named models are made of, as options of config.model laid over those of `lab.config.base()`; sizes are the
user's.

A value may be a function of the config, where it follows from the sizes. Heads, key heads and widths are not part of a
preset, but where a name means them (PaLM's one key head).
"""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from lab.errors import choose
from lab.options import set_field

LINEAR_BIASES = {"mixer.bias": "all", "feedforward.bias": True}
LAYER_NORM = {"norm.name": "layer", "norm.bias": True}

PRESETS: dict[str, Mapping[str, object]] = {
    # Radford and others 2019
    "gpt2": LAYER_NORM | LINEAR_BIASES | {"position.name": "learned", "feedforward.name": "gelu-tanh"},
    # arXiv 2204.06745: a quarter of each head rotates
    "gpt-neox": LAYER_NORM
    | LINEAR_BIASES
    | {
        "stream.name": "parallel-two",
        "feedforward.name": "gelu",
        "position.dim": lambda model: max(model.mixer.head_dim // 8, 1) * 2,
        "tied": False,
    },
    # arXiv 1910.10683: scores are not scaled, one table of biases for all layers
    "t5": {
        "norm.eps": 1e-6,
        "position.name": "t5",
        "feedforward.name": "relu",
        "mixer.softmax_scale": 1.0,
        "init.name": "t5",
    },
    # arXiv 2204.02311
    "palm": {"norm.name": "layer", "stream.name": "parallel", "mixer.kv_heads": 1},
    # arXiv 2302.13971
    "llama": {"norm.eps": 1e-6, "tied": False},
    # arXiv 2407.10671
    "qwen2": {"norm.eps": 1e-6, "position.theta": 1e6, "mixer.bias": "qkv", "tied": False},
    # arXiv 2505.09388
    "qwen3": {"norm.eps": 1e-6, "position.theta": 1e6, "mixer.qk_norm": True, "tied": False},
    # arXiv 2501.00656: queries and keys are normed over all heads at once
    "olmo2": {
        "norm.eps": 1e-6,
        "placement.name": "output",
        "position.theta": 5e5,
        "mixer.qk_norm": True,
        "mixer.qk_norm_over": "heads",
        "tied": False,
    },
    # arXiv 2408.00118: every second layer sees 4,096 tokens back
    "gemma2": {
        "norm.name": "rms-zero",
        "norm.eps": 1e-6,
        "placement.name": "sandwich",
        "feedforward.name": "geglu-tanh",
        "mixer.softcap": 50.0,
        "logit_softcap": 30.0,
        "embedding_scale": lambda model: model.dim**0.5,
        "pattern": lambda model: ((("rule", f"({model.rule}) & window(4096)"),), ()),
    },
}


def overrides(model: ConfigDict, name: str) -> tuple[tuple[str, object], ...]:
    """(field of the config, value), ... that make `base().model` the named one at its own sizes. Raises UserError."""
    preset = PRESETS[choose("a preset", name, PRESETS)]
    resolved = {field: value(model) if isinstance(value, Callable) else value for field, value in preset.items()}
    return tuple((f"model.{field}", value) for field, value in resolved.items())


def apply(model: ConfigDict, name: str) -> None:
    """Sets the fields of config.model that the named model is made of. Raises UserError for an unknown name."""
    for field, value in overrides(model, name):
        set_field(model, field.removeprefix("model."), value)
