import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import variants
from numpy_layers import feedforward, layered, through, turned, weights

from lab import model as lab_model
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels import rules


def attention(config, mixer, layer: int, x_TD: np.ndarray, at: Coordinates, seen_TS: np.ndarray) -> np.ndarray:
    """One head after another, each with the keys and values of its group."""
    q_DHK, k_DGK, v_DGK, o_HKD = (weights(w)[layer] for w in (mixer.q, mixer.k, mixer.v, mixer.o))
    names = ("q", "k", "v", "o")[: {"none": 0, "qkv": 3, "all": 4}[config.mixer.bias]]
    bias = {name: weights(getattr(mixer, f"{name}_bias"))[layer] for name in names}
    of_heads = lambda name, w: np.tensordot(x_TD, w, 1) + bias.get(name, np.zeros(w[0].size)).reshape(w[0].shape)  # noqa: E731
    q_THK, k_SGK = turned(of_heads("q", q_DHK), at, config), turned(of_heads("k", k_DGK), at, config)
    v_SGK, out_TD = of_heads("v", v_DGK), np.zeros_like(x_TD) + bias.get("o", 0.0)
    H, G, softcap = config.mixer.heads, config.mixer.kv_heads, config.mixer.softcap
    for h in range(H):
        g = h * G // H
        scores_TS = q_THK[:, h] @ k_SGK[:, g].T / np.sqrt(config.mixer.head_dim)
        if softcap:
            scores_TS = softcap * np.tanh(scores_TS / softcap)
        weight_TS = np.where(seen_TS, np.exp(scores_TS), 0)
        out_TD += weight_TS / np.maximum(weight_TS.sum(-1, keepdims=True), 1e-300) @ v_SGK[:, g] @ o_HKD[h]
    return out_TD


def forward(config, model, tokens_T: np.ndarray, at: Coordinates) -> np.ndarray:
    """The whole network on one row, in float64 numpy."""
    seen_TS = np.asarray(rules.visible(rules.parse(config.rule), at, at))
    x_TD = config.embedding_scale * weights(model.embedding)[tokens_T]
    block = model.blocks[0]
    for layer in range(config.layers):
        mix = lambda n, i=layer: attention(config, block.mixer, i, n, at, seen_TS)  # noqa: E731
        feed = lambda n, i=layer: feedforward(block.feedforward, i, n, config)  # noqa: E731
        x_TD = layered(block, layer, x_TD, config, mix, feed)
    if config.placement.name not in ("post", "deepnorm"):
        x_TD = through(model.norm, ..., x_TD, config)
    z_TC = x_TD @ weights(model.embedding if model.head is None else model.head).T
    return config.logit_softcap * np.tanh(z_TC / config.logit_softcap) if config.logit_softcap else z_TC


@pytest.mark.parametrize("overrides", [
    dict(),
    dict(model__placement__name="output"),
    dict(model__placement__name="sandwich"),
    dict(model__tied=False, model__rule="own_branch", model__mixer__softcap=2.0, model__mixer__kv_heads=1,
         model__norm__eps=0.1),
    variants.POST_NORMED,
    variants.PARALLEL,
    dict(model__placement__name="deepnorm", model__norm__name="rms-zero", model__norm__bias=True,
         model__mixer__bias="qkv", model__feedforward__name="squared-relu", model__branch__name="layer-scale"),
    dict(model__stream__name="parallel-two", model__norm__name="none", model__feedforward__name="geglu"),
], ids=str)  # fmt: skip
def test_forward_against_numpy(overrides):
    config = tiny.config(**overrides).model
    model, batch = tiny.model(tiny.config(**overrides), seed=1), tiny.batch(2, length=70)
    logits = jax.jit(lambda model: model(batch.tokens, batch.coordinates))(model)
    assert logits.shape == (2, 70, tiny.VOCABULARY) and logits.dtype == jnp.float32
    for b in range(2):
        at = batch.coordinates.map(lambda x, b=b: x[b])
        real = at.segment >= 0
        expected = forward(config, model, batch.tokens[b], at)
        np.testing.assert_allclose(logits[b][real], expected[real], atol=1e-4, rtol=1e-4)


def test_without_coordinates_a_row_is_one_causal_text():
    model, tokens = tiny.model(tiny.config()), tiny.batch().tokens
    forward = jax.jit(type(model).__call__)
    np.testing.assert_array_equal(forward(model, tokens), forward(model, tokens, Coordinates.single(*tokens.shape)))


def test_bfloat16_computes_near_float32_from_the_same_float32_weights():
    model32, model16 = (tiny.model(tiny.config(model__compute=compute)) for compute in ("float32", "bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(model16)} == {jnp.dtype("float32")}
    batch = tiny.batch()
    expected, got = (jax.jit(type(m).__call__)(m, batch.tokens, batch.coordinates) for m in (model32, model16))
    assert got.dtype == jnp.float32
    difference = np.abs(got - expected)[batch.coordinates.segment >= 0]
    assert 0 < difference.max() < 0.15 * np.abs(expected).max()


@pytest.mark.slow
def test_weights_are_drawn_with_the_declared_spread():
    config = tiny.config(model__dim=64, model__mixer__head_dim=32, model__feedforward__width=256, model__layers=3)
    model = lab_model.build(config.model, jax.random.key(3))
    block, gain = model.blocks[0], (2 * 3) ** -0.5
    expected = {
        "embedding": (model.embedding, 64**-0.5),
        "q": (block.mixer.q, 64**-0.5),
        "o": (block.mixer.o, gain * (4 * 32) ** -0.5),
        "up": (block.feedforward.up, 64**-0.5),
        "down": (block.feedforward.down, gain * 256**-0.5),
    }
    for name, (variable, spread) in expected.items():
        assert np.std(variable[...]) == pytest.approx(spread, rel=0.05), name
    assert (block.mixer_placement.input_norm.weight[...] == 1).all() and (model.norm.weight[...] == 1).all()
    assert len(np.unique(block.mixer.q[...])) > 0.99 * block.mixer.q.size  # no two layers alike


@pytest.mark.parametrize(("overrides", "says"), [
    (dict(model__mixer__kv_heads=3),
     "model.mixer.heads = 4 is not divisible by model.mixer.kv_heads = 3; choose model.mixer.kv_heads among: 1"),
    (dict(model__layers=0), "model.layers = 0 must be at least 1"),
    (dict(model__feedforward__width=-4), "model.feedforward.width = -4 must be at least 1"),
    (dict(model__mixer__name="attentoin"), "did you mean 'attention'"),
    (dict(model__rule="own_brunch"), "did you mean 'own_branch'"),
    (dict(run__implementation="tile"), "did you mean 'tiled'"),
    (dict(model__compute="float16"), "float32, bfloat16"),
    (dict(run__remat="some"), "none, dots, full"),
    (dict(model__pattern=((), (), ())), "model.pattern has 3 entries for model.layers = 2"),
    (dict(model__pattern=()), "model.pattern has 0 entries"),
    (dict(model__pattern=((("dim", 3),),)), "a field of model.pattern = 'dim' is unknown"),
    (dict(model__pattern=((("rule", "windo(3)"),),)), "model.rule = 'windo(3)' is unknown"),
])  # fmt: skip
def test_models_that_mean_nothing_are_refused(overrides, says):
    with pytest.raises(UserError) as refused:
        config = tiny.config(**overrides)
        lab_model.abstract(config.model, config.run)
    assert says in str(refused.value) and "\n" not in str(refused.value)
