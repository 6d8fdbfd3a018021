"""The supported families: what config.json of each means, and what its tensors are called.

A row differs from Llama's in few lines. Defaults are those of `transformers` 5.24 for a key that config.json lacks.
Every weight of a linear map is [out, in] there, and rotary pairs are half a head apart as they are here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

SLIDING, FULL = "sliding_attention", "full_attention"  # what an entry of layer_types may be
Values = Mapping[str, object]  # of config.json, with defaults where it has none


def as_it_is(value):
    """The value."""
    return value


class Field(NamedTuple):
    """The option of config.model that a key of config.json becomes.

    read, write: from its value to the option's, and back. choices: the only values that are supported, and the
    option's of each.
    """

    option: str
    read: Callable = as_it_is
    write: Callable = as_it_is
    choices: Mapping[str, object] | None = None


class Family(NamedTuple):
    """A row.

    keys: what is read of config.json beside windows and rotation. defaults: of keys that it lacks. always: options
    that every model of the family has, or functions of the values. types: of a model's layers, SLIDING or FULL, where
    layer_types does not say. names_types: whether config.json may say. only: values beside which a key is refused.
    thetas: bases of rotation by type of layer, where config.json has none. whole, layer: the tensors of our parameters.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, Field]
    defaults: Values
    always: Mapping[str, object]
    types: Callable[[Values], list[str]]
    names_types: bool
    only: Mapping[str, Sequence]
    thetas: Mapping[str, float]
    whole: Mapping[str, str]
    layer: Mapping[str, str]


def no_windows(values: Values) -> list[str]:
    """Every layer sees all before it."""
    return [FULL] * values["num_hidden_layers"]


def all_windows(values: Values) -> list[str]:
    """Every layer has a window, if there is one at all."""
    return [FULL if values["sliding_window"] is None else SLIDING] * values["num_hidden_layers"]


def last_windows(values: Values) -> list[str]:
    """Layers from max_window_layers on have a window, if use_sliding_window says so."""
    used = values["use_sliding_window"] and values["sliding_window"] is not None
    layers = range(values["num_hidden_layers"])
    return [SLIDING if used and m >= values["max_window_layers"] else FULL for m in layers]


def periodic_windows(values: Values) -> list[str]:
    """The last of every sliding_window_pattern layers sees all before it, the others have a window."""
    period = values["sliding_window_pattern"]
    return [SLIDING if (m + 1) % period else FULL for m in range(values["num_hidden_layers"])]


def alternating_windows(values: Values) -> list[str]:
    """The first layer has a window, the second sees all before it, and so on."""
    return [FULL if m % 2 else SLIDING for m in range(values["num_hidden_layers"])]


def _cap(value):
    return value or 0.0


def _no_cap(value):
    return value or None


def _scale(scalar):
    return float(scalar) ** -0.5


def _scalar(scale):
    scalar = scale**-2.0
    return round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar


GATES = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu-tanh", "gelu": "geglu", "relu": "reglu", "sigmoid": "glu"}
BIASES = Field("mixer.bias", lambda biased: "all" if biased else "none", lambda bias: bias == "all")

KEYS = {
    "hidden_size": Field("dim"),
    "num_hidden_layers": Field("layers"),
    "vocab_size": Field("vocabulary"),
    "intermediate_size": Field("feedforward.width"),
    "num_attention_heads": Field("mixer.heads"),
    "num_key_value_heads": Field("mixer.kv_heads"),
    "head_dim": Field("mixer.head_dim"),
    "rms_norm_eps": Field("norm.eps"),
    "tie_word_embeddings": Field("tied", bool),
    "hidden_act": Field("feedforward.name", choices=GATES),
}
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=KEYS | {"attention_bias": BIASES, "mlp_bias": Field("feedforward.bias", bool)},
    defaults={
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": None,  # as many as there are heads
        "head_dim": None,  # hidden_size over heads
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 2048,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    always={"norm.name": "rms", "position.name": "rope2d", "position.ratio": 0.0, "position.unselected": "time"},
    types=no_windows,
    names_types=False,
    only={
        "attention_dropout": (0, None),
        "quantization_config": (None,),
        "use_bidirectional_attention": (False, None),
        "num_local_experts": (None,),
        "num_experts": (None,),
    },
    thetas={FULL: 1e4, SLIDING: 1e4},
    whole={"embedding": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head": "lm_head.weight"},
    layer={
        "mixer_placement.input_norm.weight": "input_layernorm.weight",
        **{f"mixer.{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"},
        **{f"mixer.{x}_bias": f"self_attn.{x}_proj.bias" for x in "qkvo"},
        "feedforward_placement.input_norm.weight": "post_attention_layernorm.weight",
        **{f"feedforward.{x}": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
        **{f"feedforward.{x}_bias": f"mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
    },
)
NORMED_HEADS = {f"mixer.{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
QWEN2 = LLAMA._replace(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=KEYS,
    defaults=LLAMA.defaults
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    always=LLAMA.always | {"mixer.bias": "qkv"},
    types=last_windows,
    names_types=True,
)
QWEN3 = QWEN2._replace(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=KEYS | {"attention_bias": BIASES},
    defaults=QWEN2.defaults | {"head_dim": 128},
    always=LLAMA.always | {"mixer.qk_norm": True},
    layer=LLAMA.layer | NORMED_HEADS,
)
MISTRAL = LLAMA._replace(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=KEYS,
    defaults=LLAMA.defaults
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    types=all_windows,
)
GEMMA_KEYS = {key: row for key, row in KEYS.items() if key != "hidden_act"} | {
    "hidden_activation": Field("feedforward.name", choices=GATES),
    "attention_bias": BIASES,
    "query_pre_attn_scalar": Field("mixer.softmax_scale", _scale, _scalar),
    "final_logit_softcapping": Field("logit_softcap", _cap, _no_cap),
}
GEMMA2 = LLAMA._replace(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    keys=GEMMA_KEYS | {"attn_logit_softcapping": Field("mixer.softcap", _cap, _no_cap)},
    defaults={
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "vocab_size": 256000,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    always=LLAMA.always
    | {
        "norm.name": "rms-zero",
        "placement.name": "sandwich",
        "embedding_scale": lambda values: values["hidden_size"] ** 0.5,
    },
    types=alternating_windows,
    names_types=True,
    layer=LLAMA.layer
    | {
        "mixer_placement.output_norm.weight": "post_attention_layernorm.weight",
        "feedforward_placement.input_norm.weight": "pre_feedforward_layernorm.weight",
        "feedforward_placement.output_norm.weight": "post_feedforward_layernorm.weight",
    },
)
GEMMA3 = GEMMA2._replace(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys=GEMMA_KEYS,
    types=periodic_windows,
    defaults={key: value for key, value in GEMMA2.defaults.items() if key != "attn_logit_softcapping"}
    | {
        "vocab_size": 262208,
        "final_logit_softcapping": None,
        "max_position_embeddings": 131072,
        "sliding_window_pattern": 6,
    },
    always=GEMMA2.always | {"mixer.qk_norm": True},
    only=LLAMA.only | {"attn_logit_softcapping": (0, None)},
    thetas={FULL: 1e6, SLIDING: 1e4},
    layer=GEMMA2.layer | NORMED_HEADS,
)

FAMILIES = {row.model_type: row for row in (LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA2, GEMMA3)}
# Models of text and pictures, whose text is one of these: under text_config, with tensors called otherwise.
NESTED = {"gemma3": "gemma3_text"}
OUTER = ("language_model.model.", "model.language_model.")  # how tensors of the text begin there, for "model."
OUTER_HEAD = "language_model.lm_head."
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
