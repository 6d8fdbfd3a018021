"""Norms, placements, branches, initialisers, biases and feed-forwards, each alone, against float64 numpy.

test_transformer.py has whole models of them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from numpy_layers import ACTIVATIONS, NORMED_SIDES, feedforward, through, weights

from lab import model as lab_model
from lab.errors import UserError
from lab.kernels import rules
from lab.model import accounting, branch, init, norm, parameter
from lab.model.feedforward import FEEDFORWARDS, gated_width
from lab.model.mixers import MIXERS
from lab.model.placement import PLACEMENTS
from lab.model.streams import STREAMS

PARTS = (  # a model that has one of every parameter that these parts may have
    dict(model__norm__name="layer", model__norm__bias=True, model__mixer__bias="all", model__feedforward__bias=True,
         model__branch__name="rezero"),
    dict(model__norm__name="rms-zero", model__placement__name="post", model__branch__name="layer-scale"),
)  # fmt: skip


def generic(module, seed: int = 0):
    """A part with random weights in float32."""
    structure, trainable, rest = parameter.split(module)
    return nnx.merge(structure, jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), tiny.drawn(trainable, seed)), rest)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape) + 0.5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", norm.NORMS)
def test_norm_against_numpy(name, bias):
    model = tiny.config(model__norm__name=name, model__norm__eps=0.1).model
    model.norm.bias = bias and name != "none"
    made, x_BTD = generic(norm.make(model, 6)), random(2, 3, 6)
    np.testing.assert_allclose(made(jnp.asarray(x_BTD, jnp.float32)), through(made, ..., x_BTD, model), atol=1e-5)
    rounded = jnp.asarray(x_BTD + 100, jnp.bfloat16)  # whose mean square bfloat16 would round, and its variance more
    got, expected = made(rounded), through(made, ..., np.asarray(rounded, np.float64), model)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=1e-2, atol=1e-2)


def test_norms_start_as_what_they_are_named_after():
    """Of unit multiplier, without a mean where there is one to take away."""
    x_BTD = jnp.asarray(random(2, 3, 6), jnp.float32)
    rms, layer, zero, none = (norm.make(tiny.config(model__norm__name=name).model, 6)(x_BTD) for name in norm.NORMS)
    np.testing.assert_array_equal(zero, rms)
    np.testing.assert_allclose(np.square(rms).mean(-1), 1, rtol=1e-3)
    np.testing.assert_allclose(layer.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(layer.std(-1), 1, rtol=1e-3)
    np.testing.assert_array_equal(none, x_BTD)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placement_against_numpy(name):
    """Of a sublayer tanh, by the formulas of the classes."""
    model = tiny.config(model__placement__name=name, model__branch__name="layer-scale").model
    placement, x_BTD = generic(PLACEMENTS[name](model)), random(2, 3, 16)
    n = lambda side, x: through(getattr(placement, f"{side}_norm"), ..., x, model)  # noqa: E731
    read = n("input", x_BTD) if "input" in NORMED_SIDES[name] else x_BTD
    given = n("output", np.tanh(read)) if "output" in NORMED_SIDES[name] else np.tanh(read)
    given = given * weights(placement.branch.w)
    expected = {
        "post": lambda: n("sum", x_BTD + given),
        "deepnorm": lambda: n("sum", 4**0.25 * x_BTD + given),  # two layers
    }.get(name, lambda: x_BTD + given)()
    x32_BTD = jnp.asarray(x_BTD, jnp.float32)
    got = placement.add(x32_BTD, placement.after(jnp.tanh(placement.before(x32_BTD))))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("name", "pattern", "normed"), [
    ("pre", ((),), True), ("output", ((),), True), ("post", ((),), False), ("deepnorm", ((),), False),
    ("post", ((), (("placement.name", "pre"),)), True), ("pre", ((), (("placement.name", "post"),)), False),
], ids=str)  # fmt: skip
def test_the_head_reads_what_is_normed_once(name, pattern, normed):
    """By the model or by the placement of its last layer."""
    model = lab_model.abstract(tiny.config(model__placement__name=name, model__pattern=pattern).model)
    assert (model.norm is not None) == normed


@pytest.mark.parametrize(("layers", "start"), [(1, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6)])
def test_layer_scale_starts_by_depth_or_as_asked(layers, start):
    asked = tiny.config(model__branch__name="layer-scale", model__layers=layers).model
    np.testing.assert_allclose(branch.LayerScale(asked).w[...], np.full(16, start), rtol=1e-6)
    asked.branch.start = 0.25
    np.testing.assert_array_equal(branch.LayerScale(asked).w[...], np.full(16, 0.25))


def test_rezero_starts_as_no_sublayer_at_all_and_learns_its_number_first():
    model = tiny.config(model__branch__name="rezero").model
    placement, x_BTD = PLACEMENTS["pre"](model), jnp.asarray(random(2, 3, 16), jnp.float32)
    given = lambda placement: placement.add(x_BTD, placement.after(jnp.tanh(placement.before(x_BTD))))  # noqa: E731
    np.testing.assert_array_equal(given(placement), x_BTD)
    gradient = jax.grad(lambda placement: given(placement).sum())(placement)
    assert gradient.branch.a[0] != 0 and not np.any(gradient.input_norm.weight[...])


def test_a_branch_in_bfloat16_stays_there():
    for name in branch.BRANCHES:
        made = branch.BRANCHES[name](tiny.config(model__branch__name=name).model)
        assert made(jnp.ones((1, 1, 16), jnp.bfloat16)).dtype == jnp.bfloat16


def xavier(gain: float, fan_in: int, fan_out: int) -> float:
    """The spread of a Xavier draw, over that of one with variance 1 / fan_in."""
    return gain * math.sqrt(2 / (fan_in + fan_out)) / math.sqrt(1 / fan_in)


D, H, G, K, V, F, L = 16, 4, 2, 8, 8, 24, 3
BETA = (8 * L) ** -0.25
DRAWN = {  # by mixer: {parameter: (what "scaled" multiplies it with, what DeepNorm's Xavier draws do)}
    "attention": {
        "q": (1, xavier(1, D, H * K)), "k": (1, xavier(1, D, G * K)), "v": (1, xavier(BETA, D, G * V)),
        "o": ((2 * L) ** -0.5, xavier(BETA, H * V, D)),
    },
    "mla": {
        "q": (1, xavier(1, D, H * K)), "kv_down": (1, xavier(1, D, G * 12)), "rope": (1, xavier(1, D, 4)),
        "up_k": (1, xavier(1, 12, H * 4)), "up_v": (1, xavier(BETA, 12, H * V)),
        "o": ((2 * L) ** -0.5, xavier(BETA, H * V, D)),
    },
    "delta": {
        "q": (1, xavier(1, D, H * K)), "v": (1, xavier(BETA, D, H * V)), "output_gate": (1, 1),
        "o": ((2 * L) ** -0.5, xavier(BETA, H * V, D)),
    },
    "s2": {"kv": (1, xavier(BETA, D, G * K))},
}  # fmt: skip


def ratios(make, model) -> list[dict[str, float]]:
    """Of the same draws under "scaled" and under "deepnorm" to those under "plain", by parameter."""
    found = []
    for name in ("plain", "scaled", "deepnorm"):
        model.init.name = name
        drawn = {name: w for name, w in vars(make(model)).items() if isinstance(w, nnx.Param)}
        found.append({name: w[...] for name, w in drawn.items() if w.get_metadata()["inputs"]})
    plain, *others = found
    return [{name: float(np.linalg.norm(w) / np.linalg.norm(plain[name])) for name, w in o.items()} for o in others]


@pytest.mark.parametrize("name", DRAWN)
def test_initialisers_of_mixers(name):
    dims = dict(model__position__dim=4, model__mixer__latent=12) if name == "mla" else {}
    model = tiny.config(model__mixer__name=name, model__layers=L, **dims).model
    found = ratios(lambda m: MIXERS[name](m, rules.parse("causal"), jax.random.key(1)), model)
    for parameter_name, expected in DRAWN[name].items():
        assert [one[parameter_name] for one in found] == pytest.approx(expected, rel=1e-5), parameter_name


@pytest.mark.parametrize(("name", "inner"), [("swiglu", ("gate", "up")), ("relu", ("up",))])
def test_initialisers_of_feed_forwards(name, inner):
    model = tiny.config(model__feedforward__name=name, model__layers=L).model
    scaled, deepnorm = ratios(lambda m: FEEDFORWARDS[name](m, jax.random.key(1)), model)
    assert scaled == pytest.approx(dict.fromkeys(inner, 1.0) | {"down": (2 * L) ** -0.5}, rel=1e-5)
    assert deepnorm == pytest.approx(dict.fromkeys(inner, xavier(BETA, D, F)) | {"down": xavier(BETA, F, D)}, rel=1e-5)


def test_low_rank_factors_share_one_gain():
    model = tiny.config(model__mixer__q_rank=6, model__mixer__o_rank=5, model__layers=L).model
    scaled, deepnorm = ratios(lambda m: MIXERS["attention"](m, rules.parse("causal"), jax.random.key(1)), model)
    assert (scaled["o"], scaled["o_up"]) == pytest.approx((1, (2 * L) ** -0.5))
    assert (deepnorm["o"], deepnorm["o_up"]) == pytest.approx((xavier(1, H * V, 5), xavier(BETA, 5, D)))
    assert (deepnorm["q_down"], deepnorm["q"]) == pytest.approx((xavier(1, D, 6), xavier(1, 6, H * K)))
    assert {*init.INITIALISERS} == {"scaled", "plain", "deepnorm", "t5"}
    model.init.name = "t5"
    gains = [init.gain(model, makes, (D, H, K), 1) for makes in ("query", "key", "value", "output")]
    assert gains == pytest.approx([K**-0.5, 1, 1, 1])


@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_feed_forward_against_numpy(name):
    x_BTD = random(2, 3, 16, seed=5)
    for bias in (False, True):
        model = tiny.config(model__feedforward__name=name, model__feedforward__bias=bias).model
        made = generic(FEEDFORWARDS[name](model, jax.random.key(0)))
        got, expected = made(jnp.asarray(x_BTD, jnp.float32)), feedforward(made, ..., x_BTD, model)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert ACTIVATIONS.keys() == FEEDFORWARDS.keys()


@given(st.integers(1, 10_000), st.sampled_from((1, 8, 64)))
def test_a_gated_layer_of_two_thirds_has_the_parameters_of_an_ungated_one(width, multiple):
    found = gated_width(width, multiple)
    assert found % multiple == 0 and found > 0
    assert found == multiple or abs(3 * found - 2 * width) <= 1.5 * multiple  # half a multiple of three matrices
    if width >= 150 * multiple:
        assert 3 * found == pytest.approx(2 * width, rel=0.005)


def counted(**overrides) -> tuple[int, float]:
    """(parameters, training FLOPs of a token)."""
    model = lab_model.abstract(tiny.config(**overrides).model)
    return accounting.parameters(model)["parameters"], accounting.train_flops_per_token(model, [5.0])


def test_vectors_count_as_parameters_and_not_as_matrix_products():
    parameters, flops = counted()
    for overrides in PARTS:
        more, same = counted(**overrides)
        assert same == flops and more != parameters
    _, fewer = counted(model__feedforward__name="relu")
    assert flops - fewer == 3 * 2 * 2 * D * F  # a matrix less in each of two layers
    assert counted(model__stream__name="parallel-two") == (parameters, flops)
    assert counted(model__stream__name="parallel") == (parameters - 2 * D, flops)


@pytest.mark.parametrize("overrides", PARTS, ids=str)
def test_vectors_neither_decay_nor_are_matrices_of_muon(overrides):
    _, trainable, _ = parameter.split(lab_model.abstract(tiny.config(**overrides).model))
    found = jax.tree_util.tree_leaves_with_path(trainable, is_leaf=lambda x: isinstance(x, nnx.Variable))
    declared = {jax.tree_util.keystr(path): (v.get_metadata(), v.get_raw_value().ndim) for path, v in found}
    vectors = {name for name in declared if "bias" in name or "norm" in name or "branch" in name}
    assert len(vectors) >= 4
    for name, (metadata, dimensions) in declared.items():
        assert (metadata["decay"], metadata["inputs"] == 0) == ((False, True) if name in vectors else
                                                                (True, "embedding" in name)), name  # fmt: skip
        assert dimensions == len(metadata["axes"]) + ("blocks" in name), name


def test_biases_lie_as_the_heads_that_they_are_added_to():
    mixer = MIXERS["attention"](tiny.config(model__mixer__bias="all").model, rules.parse("causal"), jax.random.key(0))
    laid = {name: getattr(mixer, f"{name}_bias").get_metadata()["axes"] for name in "qkvo"}
    assert laid == {"q": ("heads",), "k": ("kv_heads",), "v": ("kv_heads",), "o": ("channel",)}
    assert mixer.q_bias.shape == (H * K,) and mixer.v_bias.shape == (G * V,) and mixer.o_bias.shape == (D,)


def test_what_a_pattern_sets_for_attention_gives_no_bias_to_another_mixer():
    made = tiny.config(model__mixer__bias="all", model__pattern=((), (("mixer.name", "differential"),)))
    made.model.rule = "causal"
    attention, differential = (block.mixer for block in lab_model.abstract(made.model).blocks)
    assert attention.o_bias is not None and attention.k_bias is not None
    assert differential.o_bias is differential.q_bias is differential.v_bias is None


def test_embeddings_are_scaled_before_the_code_of_positions():
    made = tiny.config(model__embedding_scale=3.0, model__position__name="fourier")
    model, batch = tiny.model(made), tiny.batch(1, length=12)
    expected = 3 * weights(model.embedding)[batch.tokens] + np.asarray(model.code(batch.coordinates))
    np.testing.assert_allclose(model.embed(batch.tokens, batch.coordinates), expected, atol=1e-5)


@pytest.mark.parametrize(("overrides", "says"), [
    (dict(model__norm__name="laye"), "model.norm.name = 'laye' is unknown (did you mean 'layer'?)"),
    (dict(model__norm__name="none", model__norm__bias=True),
     "model.norm.bias = True means nothing beside model.norm.name = 'none'; choose False, or one of: model.norm.name"),
    (dict(model__norm__name="none", model__norm__eps=1e-3), "model.norm.eps = 0.001 means nothing beside"),
    (dict(model__branch__name="re-zero"), "did you mean 'rezero'"),
    (dict(model__branch__name="rezero", model__branch__start=0.1),
     "model.branch.start = 0.1 means nothing beside model.branch.name = 'rezero'; choose 0.0, or one of: "
     "model.branch.name = 'layer-scale'"),
    (dict(model__branch__name="layer-scale", model__branch__start=-0.1), "model.branch.start = -0.1 must be at least"),
    (dict(model__init__name="xavier"), "model.init.name = 'xavier' is unknown"),
    (dict(model__mixer__bias="kv"), "model.mixer.bias = 'kv' is unknown"),
    (dict(model__mixer__name="differential", model__mixer__bias="qkv"),
     "model.mixer.bias = 'qkv' means nothing beside model.mixer.name = 'differential'; choose 'none', or one of: "
     "model.mixer.name = 'attention'"),
    (dict(model__feedforward__name="swigelu"), "did you mean 'swiglu'"),
    (dict(model__embedding_scale=0.0), "model.embedding_scale = 0.0 must be above 0"),
    (dict(model__logit_softcap=-1.0), "model.logit_softcap = -1.0 must be at least 0"),
    (dict(model__pattern=((("init.name", "plain"),),)), "a field of model.pattern = 'init.name' is unknown"),
    *((dict(model__stream__name=stream, model__placement__name=placement),
       f"model.placement.name under model.stream.name = {stream!r} = {placement!r} is unknown")
      for stream in ("parallel", "parallel-two") for placement in ("output", "post", "deepnorm")),
    (dict(model__stream__name="unet", model__pattern=((), (("placement.name", "post"),))),
     "model.placement.name under model.stream.name = 'unet' = 'post' is unknown; choose one of: pre, output, sandwich"),
], ids=str)  # fmt: skip
def test_parts_that_mean_nothing_are_refused(overrides, says):
    with pytest.raises(UserError) as refused:
        lab_model.abstract(tiny.config(**overrides).model)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_no_stream_but_the_plain_one_leaves_the_sum_to_a_placement():
    norm_the_sum = {name for name, placement in PLACEMENTS.items() if placement.norms_sum}
    assert norm_the_sum == {"post", "deepnorm"}
    assert {name for name, stream in STREAMS.items() if norm_the_sum & {*stream.placements}} == {"plain"}
