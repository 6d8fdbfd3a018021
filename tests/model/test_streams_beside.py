"""The streams of other papers: each against its formula, as test_streams does for those of the notes."""

import functools
import math

import jax
import numpy as np
import pytest
import tiny
import variants
from flax import nnx
from numpy_layers import normed, weights
from numpy_network import Network, check_gradients, check_logits, check_stream, double

from lab import model as lab_model
from lab.errors import UserError
from lab.model import parameter
from lab.model.streams import STREAMS
from lab.model.streams.hyper import sinkhorn

L, SIZES = 4, dict(copies=3, rank=5, blocks=2)
FAST = ("mhc",)


def config(name: str, **overrides):
    sizes = {f"model__stream__{f}": size for f, size in SIZES.items() if f in STREAMS[name].options}
    return tiny.config(model__stream__name=name, model__layers=L, **sizes | overrides)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_normed(x, eps):
    return normed(x, 1.0, eps)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def denseformer(net: Network, x):
    y = [x]
    for m in range(L):
        y.append(net.layer(m, x))
        x = sum(weights(net.stream.alpha[m])[j] * y[j] for j in range(m + 2))
    return x


def muddformer(net: Network, x):
    y, read = [x], [x] * 4
    for m in range(L):
        q, k, v = (net.n1(m, way) for way in read[:3])
        P = net.softmax(net.scores(net.q(m, q), net.k(m, k)) / np.sqrt(net.d))
        h = read[3] + net.output(m, P, net.v(m, v))
        y.append(h + net.mlp(m, h))
        own = net.stream.weights[m]
        A_TX = gelu(rms_normed(y[-1], net.eps) @ weights(own.w1)) @ weights(own.w2)
        ways = 4 if m < L - 1 else 1
        A_TWJ = A_TX.reshape(len(x), ways, m + 2) + weights(own.a)
        read = [sum(A_TWJ[:, w, j, None] * y[j] for j in range(m + 2)) for w in range(ways)]
    return read[0]


def by_copies(net: Network, x, connections):
    """connections: a function of (a site's parameters, its layer, the copies [T, N, D]) to pre, post, res, res from
    copy n (first) to copy m (second)."""
    N = SIZES["copies"]
    H_TND = np.stack([x] * N, axis=1)
    for m in range(L):
        for site, sublayer in (("mixer", net.attention), ("feedforward", net.mlp)):
            pre_TN, post_TN, res_TNM = connections(getattr(net.block.stream, site), m, H_TND)
            y_TD = sublayer(m, sum(pre_TN[:, n, None] * H_TND[:, n] for n in range(N)))
            copies = [
                sum(res_TNM[:, n, to, None] * H_TND[:, n] for n in range(N)) + post_TN[:, to, None] * y_TD
                for to in range(N)
            ]
            H_TND = np.stack(copies, axis=1)
    return H_TND.sum(1)


def hyper(net: Network, x):
    def connections(site, m, H):
        w = {name: weights(getattr(site, name))[m] for name in ("A", "b", "w_a", "w_b", "s_a", "s_b")}
        n = normed(H, weights(site.norm.weight)[m], net.eps)
        A = w["A"] + w["s_a"] * np.tanh(n @ w["w_a"])
        return A[..., 0], w["b"] + w["s_b"] * np.tanh(n @ w["w_b"])[..., 0], A[..., 1:]

    return by_copies(net, x, connections)


def mhc(net: Network, x):
    N = SIZES["copies"]

    def connections(site, m, H):
        w = {name: weights(getattr(site, name))[m] for name in ("w", "a", "b_pre", "b_post", "b_res")}
        inferred = normed(H.reshape(len(H), -1), weights(site.norm.weight)[m], net.eps) @ w["w"]
        pre = sigmoid(w["a"][0] * inferred[:, :N] + w["b_pre"])
        post = 2 * sigmoid(w["a"][1] * inferred[:, N : 2 * N] + w["b_post"])
        M = np.exp(w["a"][2] * inferred[:, 2 * N :].reshape(-1, N, N) + w["b_res"])
        for _ in range(20):
            M = M / M.sum(1, keepdims=True)
            M = M / M.sum(2, keepdims=True)
        return pre, post, np.transpose(M, (0, 2, 1))

    return by_copies(net, x, connections)


def resformer(net: Network, x):
    first = net.v(0, net.n1(0, x))
    for m in range(L):
        v = net.v(m, net.n1(m, x))
        if m:
            from_first, own = weights(net.stream.weights[m - 1])
            v = from_first * first + own * v
        h = x + net.output(m, net.P(m, x), v)
        x = h + net.mlp(m, h)
    return x


def laurel(net: Network, x):
    for m in range(L):
        for site, sublayer in (("mixer", net.attention), ("feedforward", net.mlp)):
            own = getattr(net.block.stream, site)
            a, b, A, B = (weights(w)[m] for w in (own.a, own.b, own.A, own.B))
            x = a * sublayer(m, x) + b * (x + x @ A @ B)
    return x


def attnres(net: Network, x, sublayers: int = 1):
    """Each source by the sublayers whose outputs it sums; a block at work is one of them."""
    outputs = []

    def read(s):
        blocks = [sum(outputs[i : i + sublayers]) for i in range(0, s, sublayers)]
        if s == 0:
            return x
        w = weights(net.stream.w)[s - 1]
        share = softmax(np.stack([rms_normed(y, net.eps) @ w for y in [x, *blocks]], axis=-1))
        return sum(share[:, i, None] * y for i, y in enumerate([x, *blocks]))

    for m in range(L):
        outputs.append(net.attention(m, read(2 * m)))
        outputs.append(net.mlp(m, read(2 * m + 1)))
    return read(2 * L)


def lime(net: Network, x):
    inputs = [x]
    for m in range(L):
        n = [net.n1(m, y) for y in inputs]
        memory = n[0]
        if m:
            share = softmax(weights(net.stream.router[m - 1]))
            memory = np.stack([sum(s * y for s, y in zip(row, n, strict=True)) for row in share], axis=1)
        P = net.softmax(net.scores(net.q(m, n[-1]), net.k(m, memory)) / np.sqrt(net.d))
        h = inputs[-1] + net.output(m, P, net.v(m, memory))
        inputs.append(h + net.mlp(m, h))
    return inputs[-1]


def unet(net: Network, x):
    given = []
    for m in range(L):
        if m >= L // 2:
            x = x + weights(net.stream.s)[L - 1 - m] * given[L - 1 - m]
        x = net.layer(m, x)
        given.append(x)
    return x


FORMULAS = {
    "denseformer": denseformer,
    "muddformer": muddformer,
    "hyper": hyper,
    "mhc": mhc,
    "resformer": resformer,
    "laurel": laurel,
    "attnres": attnres,
    "attnres-block": functools.partial(attnres, sublayers=2 * L // SIZES["blocks"]),
    "lime": lime,
    "unet": unet,
}
MARKED = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FORMULAS]


@pytest.mark.parametrize("name", FORMULAS)
def test_stream_against_numpy(name):
    check_stream(config(name), FORMULAS[name])


@pytest.mark.matrix("name")
@pytest.mark.parametrize("name", MARKED)
def test_logits_against_numpy_and_gradients_against_finite_differences(name):
    got = double(config(name))
    check_logits(got, FORMULAS[name])
    check_gradients(got)


def test_every_stream_has_its_formula_here_or_there():
    of_the_notes = {name for name in STREAMS if name[0] == "v" and name[1].isdigit()}
    assert {*FORMULAS} | of_the_notes == {*STREAMS} - {"plain", "temperature", *variants.LIKE_PLAIN}


def counted(name: str, m) -> int:
    """Parameters beside those of the plain model: L layers, width D, N copies, rank R."""
    L, D, N, R = m.layers, m.dim, m.stream.copies, m.stream.rank
    outputs = [i + 2 for i in range(L)]
    ways = [4] * (L - 1) + [1]
    return {
        "denseformer": L * (L + 3) // 2,
        "muddformer": sum(w * n * (D + w * n + 1) for w, n in zip(ways, outputs, strict=True)),
        "hyper": 2 * L * (D + N * (N + 1) + N + D * (N + 1) + D + 2),
        "mhc": 2 * L * (N * D + N * D * N * (N + 2) + 3 + N * (N + 2)),
        "resformer": 2 * (L - 1),
        "laurel": 2 * L * (2 + 2 * D * R),
        "attnres": 2 * L * D,
        "attnres-block": 2 * L * D,
        "lime": m.mixer.kv_heads * (L * (L + 1) // 2 - 1),
        "unet": L // 2,
    }[name]


@pytest.mark.parametrize("name", FORMULAS)
def test_parameters_equal_their_formulas_and_none_decays(name):
    made = config(name).model
    model = lab_model.abstract(made)
    own = parameter.count(model) - parameter.count(lab_model.abstract(tiny.config(model__layers=L).model))
    assert own == counted(name, made) > 0
    for part in (model.stream, model.blocks[0].stream):
        for variable in jax.tree.leaves(parameter.split(part)[1], is_leaf=lambda x: isinstance(x, nnx.Variable)):
            declared = variable.get_metadata()
            assert declared["decay"] is False and declared["inputs"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [
    ("denseformer", 1e-5), ("muddformer", 1e-5), ("laurel", 1e-5), ("hyper", 1e-3), ("mhc", 0.05),
])  # fmt: skip
def test_what_starts_as_the_plain_residual_does(name, tolerance):
    """Hyper-connections sum N copies before the norm, whose eps then counts for less; mHC starts near."""
    batch = tiny.batch(2, length=24)
    models = [lab_model.build(config(n).model, jax.random.key(1)) for n in (name, "plain")]
    got, expected = (jax.jit(type(m).__call__)(m, batch.tokens, batch.coordinates) for m in models)
    real = batch.coordinates.segment >= 0
    np.testing.assert_allclose(got[real], expected[real], atol=tolerance)


def test_sinkhorn_makes_a_matrix_doubly_stochastic():
    M = np.asarray(sinkhorn(np.exp(np.random.default_rng(0).normal(size=(50, 4, 4)))))
    np.testing.assert_allclose(M.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(M.sum(-2), 1, rtol=1e-5)
    assert (M > 0).all() and M.std() > 0.05


@pytest.mark.slow
def test_mixing_weights_are_reported():
    start = {name: lab_model.build(config(name).model, jax.random.key(0)).stream.mixing() for name in FORMULAS}
    lower = np.tril(np.ones((L, L), bool))
    with_embedding = np.tril(np.ones((L, L + 1), bool), 1)
    assert {name for name in FORMULAS if start[name]} == {"denseformer", "muddformer", "lime"}
    identity = np.where(with_embedding, np.eye(L, L + 1, 1), np.nan)
    np.testing.assert_array_equal(start["denseformer"]["alpha"], identity)
    assert [*start["muddformer"]] == [f"a ({way})" for way in ("query", "key", "value", "residual")]
    for found in start["muddformer"].values():
        np.testing.assert_array_equal(found, identity)
    assert len(start["lime"]) == 2
    for found in start["lime"].values():
        np.testing.assert_allclose(found, np.where(lower, 1 / np.arange(1, L + 1)[:, None], np.nan), rtol=1e-6)


@pytest.mark.parametrize(("name", "overrides", "says"), [
    ("hyper", dict(copies=0), "model.stream.copies = 0 must be at least 1: of the stream"),
    ("laurel", dict(rank=0), "model.stream.rank = 0 must be at least 1"),
    ("plain", dict(copies=4),
     "model.stream.copies = 4 means nothing beside model.stream.name = 'plain'; choose 0, or one of: "),
    ("attnres", dict(blocks=2), "model.stream.blocks = 2 means nothing beside model.stream.name = 'attnres'; choose 0"),
    ("attnres-block", dict(blocks=3), "does not divide model.layers = 4; choose one of: 1, 2, 4"),
])  # fmt: skip
def test_sizes_that_mean_nothing_are_refused(name, overrides, says):
    made = config(name, **{f"model__stream__{field}": value for field, value in overrides.items()})
    with pytest.raises(UserError) as refused:
        lab_model.abstract(made.model)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["muddformer", "resformer", "lime", "unet"])
def test_one_layer_and_mixers_of_another_kind_are_refused(name):
    with pytest.raises(UserError, match=r"model.layers = 1: model.stream.name = "):
        lab_model.abstract(tiny.config(model__stream__name=name, model__layers=1).model)
    if STREAMS[name].mixers:
        with pytest.raises(UserError, match=r"'mla' is unknown.*; choose one of: attention, differential"):
            lab_model.abstract(
                config(name, model__mixer__name="mla", model__mixer__latent=4, model__position__dim=4).model
            )


def test_variants_give_every_size():
    assert {field for stream in STREAMS.values() for field in stream.options} <= {
        *variants.SIZES,
        "accumulate",
        "input",
    }
