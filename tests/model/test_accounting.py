import functools

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import variants

from lab import model as lab_model
from lab.coordinates import Coordinates
from lab.data import Batch
from lab.model import accounting
from lab.model.streams import STREAMS
from lab.train import step

PUBLISHED = {  # (dim, layers, fields of the mixer, width of the feed-forward sublayer)
    "512": (512, 8, dict(heads=8, kv_heads=2, head_dim=64), 1408),
    "h8": (1024, 24, dict(heads=8, kv_heads=2, head_dim=128), 2752),
    "h16": (1024, 24, dict(heads=16, kv_heads=4, head_dim=64), 2752),
    "h32": (1024, 24, dict(heads=32, kv_heads=8, head_dim=32), 2752),
}
MILLIONS = {"512": 25.8, "h8": 272.4, "h16": 272.4, "h32": 272.4}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_published_models(name, tied):
    config = tiny.config().model
    dim, layers, mixer, width = PUBLISHED[name]
    config.update(dim=dim, layers=layers, mixer=mixer, feedforward=dict(width=width), vocabulary=6400, tied=tied)
    counted = accounting.parameters(lab_model.abstract(config))
    assert counted["parameters"] == sum(closed_forms.parameters(config))
    outer = counted["parameters"] - counted["parameters_non_embedding"]
    assert outer == (1 if tied else 2) * 6400 * config.dim
    if tied:
        assert round(counted["parameters"] / 1e6, 1) == MILLIONS[name]


WIDE = dict(model__dim=64, model__mixer__head_dim=16, model__feedforward__width=160, run__implementation="reference")


@pytest.mark.slow
@pytest.mark.matrix("variant")
@pytest.mark.parametrize(
    "variant",
    [
        *variants.marked(
            [n for n in variants.VARIANTS if n.startswith(("mixer ", "low", "mla", "delta"))], ("mixer mla",)
        ),
        *variants.marked(("default", "untied, capped, one group", "local : global"), ("local : global",)),
        *variants.marked(
            [f"stream {name}" for name in ("v1m1", "v2m3", "v3m1", "v3m2", "v4m1", "v4m1E", "v4mD", "hyper", "lime")],
            (),
        ),
    ],
)
def test_flops_against_what_the_compiler_counts(variant):
    config = variants.config(variant, **WIDE)
    if config.model.position.dim:
        config.model.position.dim = 8
    model = lab_model.abstract(config.model, config.run)
    T = 64 if variants.in_order(variant) else 128  # loops are counted once
    tokens = jax.ShapeDtypeStruct((1, T), np.int32)
    batch = Batch(tokens, tokens, Coordinates(tokens, tokens, tokens, tokens))
    gradient = jax.jit(functools.partial(step.accumulated_gradient, z_loss=0.0, microbatches=1))
    counted = gradient.lower(model, batch).compile().cost_analysis()["flops"]
    every_key = [T] * len(model.blocks)  # the reference computes hidden scores too
    formula = T * accounting.train_flops_per_token(model, every_key)
    # Norms, activations, masks and the softmax come on top; at this width they are some per cent.
    assert formula < counted < 1.15 * formula
    if not variants.in_order(variant):
        assert accounting.train_flops_per_token(model, [0] * len(model.blocks)) < 0.95 * formula / T


def test_flops_count_attention_on_visible_keys_of_each_pattern_entry():
    config = tiny.config(model__pattern=((("rule", "window(2)"),), ()), model__layers=3).model
    model = lab_model.abstract(config)
    none, local, global_ = (accounting.train_flops_per_token(model, keys) for keys in ([0, 0], [1, 0], [0, 1]))
    per_key = 3 * 2 * 2 * config.mixer.heads * config.mixer.head_dim
    assert local - none == 2 * per_key  # layers 0 and 2
    assert global_ - none == per_key


@pytest.mark.parametrize("variant", [name for name in variants.VARIANTS if not name.startswith("stream ")])
def test_every_variant_has_the_parameters_and_the_cache_of_its_formula(variant):
    config = variants.config(variant).model
    model = lab_model.abstract(config)
    assert accounting.parameters(model)["parameters"] == sum(closed_forms.parameters(config))
    cached = [closed_forms.cache(layer) for layer in closed_forms.layers(config)]
    assert accounting.cache_per_token_per_layer(model) == pytest.approx(sum(cached) / len(cached))
    layers = jax.eval_shape(lambda: model.init_cache(5, 7)).layers
    kept = sum(x.size for x in jax.tree.leaves(layers) if jnp.issubdtype(x.dtype, jnp.floating))
    state = config.layers * accounting.state_per_layer(model)
    assert kept == pytest.approx(5 * (7 * sum(cached) + state))


def test_flops_count_what_streams_add():
    """Beside the plain model: replays of earlier layers, wider scores, what infers weights; L layers, width D."""
    m = tiny.config(**variants.stream("plain")).model
    L, D, keys = m.layers, m.dim, 10
    flops = {
        name: accounting.train_flops_per_token(lab_model.abstract(tiny.config(**variants.stream(name)).model), [keys])
        for name in STREAMS
    }
    H, G, K = m.mixer.heads, m.mixer.kv_heads, m.mixer.head_dim
    pairs = L * (L - 1) // 2
    values = D * G * K + H * K * D + keys * 2 * H * K
    scores = pairs * keys * H * K
    inferred = sum(D * M + M * M for M in range(1, L + 1))
    N, R, size = variants.SIZES["copies"], variants.SIZES["rank"], 2 * L // variants.SIZES["blocks"]
    averages = [(4 if layer < L - 1 else 1) * (layer + 2) for layer in range(L)]
    reads = range(1, 2 * L + 1)
    for name in STREAMS:
        added = {
            **dict.fromkeys(("v3m1", "v3m3.1", "v3m3.2"), pairs * (values + 3 * D * m.feedforward.width)),
            **dict.fromkeys(("v3m2", "v3m4.1", "v3m4.2"), pairs * values),
            **dict.fromkeys([f"v4m{k}" for k in (*range(1, 8), "1A", "1B", "1C")], scores),
            **dict.fromkeys(("v4m1D", "v4m1E"), scores + inferred),
            "v4mD": L * (D + 1),
            "muddformer": sum(n * (D + n) for n in averages),
            "hyper": 2 * L * N * D * (N + 2),
            "mhc": 2 * L * N * D * N * (N + 2),
            "laurel": 2 * L * 2 * D * R,
            "attnres": sum((1 + s) * D for s in reads),
            "attnres-block": sum((1 + -(-s // size)) * D for s in reads),
        }.get(name, 0)
        assert flops[name] - flops["plain"] == 3 * 2 * added, name


@pytest.mark.parametrize(("overrides", "beside"), [
    (dict(), 0),
    (dict(model__mixer__kv_heads=1, model__pattern=((), ()), model__layers=3), 0),
    (variants.stream("v3m1"), 3 * 2 * 8),  # the values of three replays
    (variants.stream("v4m1E"), 1 + 2 + 3),  # the weights of a key in each layer
    (variants.stream("v4m1"), 0),
], ids=str)  # fmt: skip
def test_cache_formula_against_the_cache(overrides, beside):
    config = tiny.config(**overrides).model
    model = lab_model.abstract(config)
    cache = jax.eval_shape(lambda: model.init_cache(5, 7))
    numbers = sum(x.size for x in jax.tree.leaves((cache.layers, cache.stream))) / (5 * 7 * config.layers)
    expected = 2 * config.mixer.kv_heads * config.mixer.head_dim + beside / config.layers
    assert accounting.cache_per_token_per_layer(model) == numbers == expected


@pytest.mark.parametrize(("name", "maps"), [("plain", 0), ("v2m3", 0), ("v4m1", 0.5), ("v3m2", 1), ("v4mD", 0)])
def test_attention_work_counts_what_streams_attend_with(name, maps):
    """Of the L (L - 1) / 2 pairs of a layer and an earlier one, v4 makes scores again, v3 scores and output."""
    m = tiny.config(**variants.stream(name)).model
    one = 2 * m.mixer.heads * m.mixer.head_dim
    pairs = m.layers * (m.layers - 1) / 2
    assert accounting.attention_work(lab_model.abstract(m)) == pytest.approx(one + maps * one * pairs / m.layers)
