"""Presets give the logits of the implementations in `transformers`, with the same weights: reference_models.npz."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lab.config
import lab.options
from lab import model as lab_model
from lab.errors import UserError
from lab.model import presets

WHOLE = np.load(pathlib.Path(__file__).with_name("reference_models.npz"))
D, H, HD, F, C, L = 16, 4, 4, 24, 24, 2
FAST = ("llama",)
FAMILIES = sorted({name.split("/")[0] for name in WHOLE.files})
SIZES = {  # what the tiny models have beside the sizes of all
    "gpt2": {"mixer.kv_heads": H, "position.length": 32},
    "gpt-neox": {"mixer.kv_heads": H, "position.dim": 2, "position.theta": 100.0},
    "t5": {"mixer.kv_heads": H, "position.buckets": 8, "position.distance": 8},
    "olmo2": {"norm.eps": 1e-5},
    "gemma2": {
        "mixer.softcap": 5.0,
        "logit_softcap": 3.0,
        "mixer.softmax_scale": 1 / 3,
        "pattern": ((("rule", "causal & window(4)"),), ()),
    },
}


def weights(family: str) -> dict[str, np.ndarray]:
    prefix = f"{family}/weights/"
    return {name.removeprefix(prefix): WHOLE[name] for name in WHOLE.files if name.startswith(prefix)}


def config(family: str):
    model = lab.config.base().model
    model.update(dict(dim=D, layers=L, vocabulary=C))
    model.mixer.update(dict(heads=H, kv_heads=2, head_dim=HD))
    model.feedforward.width = F
    presets.apply(model, family)
    if "theta" in model.position and family in ("llama", "qwen2", "qwen3", "olmo2", "gemma2"):
        model.position.theta = 100.0
    for field, value in SIZES.get(family, {}).items():
        lab.options.set_field(model, field, value)
    return model


def projections(family: str, w: dict, layer: int) -> dict[str, np.ndarray]:
    """q, k, v [D, heads, HD], o [H, HD, D] and their biases, of one layer."""
    if family == "gpt2":
        at = f"transformer.h.{layer}.attn."
        q, k, v = np.split(w[at + "c_attn.weight"], 3, axis=1)
        biases = np.split(w[at + "c_attn.bias"], 3)
        o, o_bias = w[at + "c_proj.weight"], w[at + "c_proj.bias"]
    elif family == "gpt-neox":
        at = f"gpt_neox.layers.{layer}.attention."
        turned = [2, 3, 0, 1]  # the first of a head rotate there, the last here
        whole = w[at + "query_key_value.weight"].reshape(H, 3, HD, D)
        biases = list(np.moveaxis(w[at + "query_key_value.bias"].reshape(H, 3, HD), 1, 0))
        q, k, v = (np.moveaxis(whole[:, i], 2, 0) for i in range(3))
        q, k = q[..., turned], k[..., turned]
        biases[:2] = [b[:, turned] for b in biases[:2]]
        o, o_bias = w[at + "dense.weight"].T, w[at + "dense.bias"]
    elif family == "t5":
        at = f"block.{layer}.layer.0.SelfAttention."
        q, k, v, o = (w[f"{at}{name}.weight"].T for name in "qkvo")
        biases = o_bias = None
    else:
        at = f"model.layers.{layer}.self_attn."
        q, k, v, o = (w[f"{at}{name}_proj.weight"].T for name in "qkvo")
        biases = [w[f"{at}{name}_proj.bias"] for name in "qkv"] if f"{at}q_proj.bias" in w else None
        o_bias = None
    found = {name: x.reshape(D, -1, HD) for name, x in zip("qkv", (q, k, v), strict=True)}
    found["o"] = o.reshape(H, HD, D)
    if biases is not None:
        found |= {f"{name}_bias": b.reshape(-1) for name, b in zip("qkv", biases, strict=True)}
    if o_bias is not None:
        found["o_bias"] = o_bias
    for name in ("q_norm", "k_norm"):
        if f"{at}{name}.weight" in w:
            found[f"{name}.weight"] = w[f"{at}{name}.weight"]
    return {f"mixer.{name}": x for name, x in found.items()}


def feedforward(family: str, w: dict, layer: int) -> dict[str, np.ndarray]:
    named = {
        "gpt2": (f"transformer.h.{layer}.mlp.", "c_fc", "c_proj"),
        "gpt-neox": (f"gpt_neox.layers.{layer}.mlp.", "dense_h_to_4h", "dense_4h_to_h"),
        "t5": (f"block.{layer}.layer.2.DenseReluDense.", "wi", "wo"),
    }
    if family in named:
        at, up, down = named[family]
        turn = (lambda x: x) if family == "gpt2" else (lambda x: x.T)
        found = {"up": turn(w[f"{at}{up}.weight"]), "down": turn(w[f"{at}{down}.weight"])}
        if f"{at}{up}.bias" in w:
            found |= {"up_bias": w[f"{at}{up}.bias"], "down_bias": w[f"{at}{down}.bias"]}
    else:
        found = {name: w[f"model.layers.{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up", "down")}
    return {f"feedforward.{name}": x for name, x in found.items()}


NORMS = {  # before and after the mixer, before and after the feed-forward
    "gpt2": ("transformer.h.{}.ln_1", None, "transformer.h.{}.ln_2", None, "transformer.ln_f"),
    "gpt-neox": ("gpt_neox.layers.{}.input_layernorm", None, "gpt_neox.layers.{}.post_attention_layernorm", None,
                 "gpt_neox.final_layer_norm"),
    "t5": ("block.{}.layer.0.layer_norm", None, "block.{}.layer.2.layer_norm", None, "final_layer_norm"),
    "olmo2": (None, "model.layers.{}.post_attention_layernorm", None, "model.layers.{}.post_feedforward_layernorm",
              "model.norm"),
    "gemma2": ("model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm",
               "model.layers.{}.pre_feedforward_layernorm", "model.layers.{}.post_feedforward_layernorm", "model.norm"),
}  # fmt: skip
LLAMA = "model.layers.{}.input_layernorm", None, "model.layers.{}.post_attention_layernorm", None, "model.norm"
PLACES = ("mixer_placement.input_norm", "mixer_placement.output_norm", "feedforward_placement.input_norm",
          "feedforward_placement.output_norm")  # fmt: skip


def norms(family: str, w: dict, layer: int) -> dict[str, np.ndarray]:
    found = {}
    for place, name in zip(PLACES, NORMS.get(family, LLAMA)[:4], strict=True):
        if name is not None:
            parts = {part: f"{name.format(layer)}.{part}" for part in ("weight", "bias")}
            found |= {f"{place}.{part}": w[key] for part, key in parts.items() if key in w}
    return found


def put(module, path: str, value: np.ndarray) -> None:
    for name in path.split("."):
        module = getattr(module, name)
    assert isinstance(module, nnx.Param) and module.shape == value.shape, (path, module.shape, value.shape)
    module[...] = jnp.asarray(value)


def loaded(family: str):
    """The model of the preset with the family's weights, each parameter set exactly once."""
    model, w = lab_model.build(config(family), jax.random.key(0)), weights(family)
    P = len(model.blocks)
    for p, block in enumerate(model.blocks):
        layers = [projections(family, w, m) | feedforward(family, w, m) | norms(family, w, m) for m in range(p, L, P)]
        for path in layers[0]:
            put(block, path, np.stack([layer[path] for layer in layers]))
        assert len(layers[0]) == len(nnx.to_flat_state(nnx.state(block, nnx.Param)))
    final = NORMS.get(family, LLAMA)[4]
    for part in ("weight", "bias"):
        if f"{final}.{part}" in w:
            put(model.norm, part, w[f"{final}.{part}"])
    embedding = next(x for name, x in w.items() if "wte" in name or "embed_in" in name or "embed_tokens" in name)
    put(model, "embedding", embedding)
    if "lm_head.weight" in w and model.head is not None:
        put(model, "head", w["lm_head.weight"])
    return model, w


@pytest.mark.matrix("family")
@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=[] if one in FAST else pytest.mark.slow) for one in FAMILIES]
)
def test_a_preset_gives_the_logits_of_the_model_that_it_is_named_after(family):
    model, w = loaded(family)
    if family == "gpt2":
        put(model.code, "table", w["transformer.wpe.weight"])
    if family == "t5":
        put(model, "added.table", w["block.0.layer.0.SelfAttention.relative_attention_bias.weight"].T)
    found = np.asarray(model(jnp.asarray(WHOLE[f"{family}/tokens"])))
    np.testing.assert_allclose(found, WHOLE[f"{family}/logits"], rtol=1e-5, atol=1e-5 * np.abs(found).max())


def turned(x_THK: np.ndarray, theta: float) -> np.ndarray:
    """RoPE: number i of a head and number i + K / 2 are a pair."""
    half = x_THK.shape[-1] // 2
    angle_T1F = np.arange(len(x_THK))[:, None, None] * theta ** (-np.arange(half) / half)
    one, other = x_THK[..., :half], x_THK[..., half:]
    cos, sin = np.cos(angle_T1F), np.sin(angle_T1F)
    return np.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)


def layer_normed(x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    centred = x_TD - x_TD.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight_D


def test_palm_against_its_formulas_in_float64():
    """`transformers` has none: y = x + attention(N(x)) + feed-forward(N(x)), one key head, no biases, a tied head."""
    made, rng, T = config("palm"), np.random.default_rng(), 7
    made.position.theta = 100.0
    model = lab_model.build(made, jax.random.key(int(rng.integers(2**31))))
    for module, path in [(model, "norm.weight"), (model.blocks[0], "mixer_placement.input_norm.weight")]:
        shape = (D,) if module is model else (L, D)
        put(module, path, rng.normal(1, 0.3, shape).astype(np.float32))
    stacked = {"/".join(map(str, path)): np.asarray(leaf[...], np.float64)
               for path, leaf in nnx.to_flat_state(nnx.state(model.blocks[0], nnx.Param))}  # fmt: skip
    assert {*stacked} == {
        "mixer_placement/input_norm/weight", *(f"mixer/{name}" for name in "qkvo"),
        *(f"feedforward/{name}" for name in ("gate", "up", "down")),
    }  # fmt: skip
    tokens_T = rng.integers(0, C, T)
    embedding_CD = np.asarray(model.embedding[...], np.float64)
    x_TD = embedding_CD[tokens_T]
    for layer in range(L):
        w = {name.split("/")[-1]: x[layer] for name, x in stacked.items()}
        n_TD = layer_normed(x_TD, w["weight"], made.norm.eps)
        q_THK, k_TGK = (turned(np.einsum("td,dhk->thk", n_TD, w[name]), 100.0) for name in "qk")
        s_HTS = np.einsum("thk,sk->hts", q_THK, k_TGK[:, 0]) / np.sqrt(HD)
        p_HTS = np.where(np.tri(T, dtype=bool), np.exp(s_HTS), 0)
        p_HTS /= p_HTS.sum(-1, keepdims=True)
        attended = np.einsum("hts,sk,hkd->td", p_HTS, np.einsum("td,dgk->tgk", n_TD, w["v"])[:, 0], w["o"])
        gate_TF = n_TD @ w["gate"]
        x_TD = x_TD + attended + (gate_TF / (1 + np.exp(-gate_TF)) * (n_TD @ w["up"])) @ w["down"]
    final = np.asarray(model.norm.weight[...], np.float64)
    expected = layer_normed(x_TD, final, made.norm.eps) @ embedding_CD.T
    found = np.asarray(model(jnp.asarray(tokens_T[None])))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_what_follows_from_sizes_follows_from_the_configs_own():
    model = lab.config.base().model
    model.rule, model.mixer.head_dim = "own_branch", 20
    assert dict(presets.overrides(model, "gemma2"))["model.pattern"][0] == (("rule", "(own_branch) & window(4096)"),)
    assert dict(presets.overrides(model, "gpt-neox"))["model.position.dim"] == 4  # pairs, about a quarter


def test_an_unknown_preset_is_refused_by_name():
    with pytest.raises(UserError, match=r"gpt9.*gpt2"):
        presets.apply(lab.config.base().model, "gpt9")
