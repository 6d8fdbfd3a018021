import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import variants
from flax import nnx
from numpy_layers import normed, weights
from numpy_network import LENGTH, Network, check_gradients, check_logits, check_stream, double

from lab import model as lab_model
from lab.kernels import reference
from lab.model import parameter
from lab.model.placement import PLACEMENTS
from lab.model.streams import STREAMS, v1
from lab.train import compiled, optimizer, step
from lab.train.checkpoint import Checkpoints, Position
from lab.train.step import Program

L = 4
NAMES = [name for name in STREAMS if name[0] == "v" or name == "temperature"]
POST = [f"{name}, post" for name in v1.METHODS]
NORMED = [f"{name}, normed" for name in NAMES if "input" in STREAMS[name].options]
PLACED = ["v1m7, sandwich", "v2m3, output", "v3m1, output", "v3m4.1, sandwich", "v4m1, sandwich"]
FAST = ("v2m3",)


def config(name: str, **overrides):
    """Four layers; "v1m1, post" and "v4mD, normed" set the option of the stream, "v1m7, sandwich" where norms stand."""
    name, _, option = name.partition(", ")
    fields = dict.fromkeys(PLACEMENTS, "placement__name") | {"post": "stream__accumulate", "normed": "stream__input"}
    given = {f"model__{fields[option]}": option} if option else {}
    if "length" in STREAMS[name].options:
        given["model__stream__length"] = LENGTH
    return tiny.config(model__stream__name=name, model__layers=L, **given | overrides)


def by_v1(name: str, net: Network, x):
    """The table of version 1."""
    post, a, f = net.config.stream.accumulate == "post", [], []
    for m in range(L):
        A, F = (sum(outputs, np.zeros_like(x)) for outputs in (a, f))
        mean = lambda total, m=m: total / m if m else total  # noqa: E731
        now = net.attention(m, x)
        h = {"v1m1": A, "v1m2": mean(A), "v1m3": x, "v1m4": x, "v1m5": A, "v1m6": F, "v1m7": A}[name] + now
        out = net.mlp(m, h)
        x = {"v1m1": h, "v1m2": h, "v1m3": F, "v1m4": mean(F), "v1m5": A, "v1m6": F, "v1m7": F}[name] + out
        a.append(h if post else now)
        f.append(x if post else out)
    return x


def softmax_of(net: Network, m: int) -> np.ndarray:
    w = np.exp(weights(net.stream.weights.w[m - 1])) if m else np.ones(1)
    return w / w.sum()


def by_v2(name: str, net: Network, x):
    a, f = [], []
    for m in range(L):
        a.append(net.attention(m, x))
        h = x + (sum(a) / (m + 1) if name == "v2m2" else a[m])
        f.append(net.mlp(m, h))
        weight = softmax_of(net, m) if name == "v2m3" else np.full(m + 1, 1 / (m + 1))
        x = h + (f[m] if name == "v2m2" else sum(w * y for w, y in zip(weight, f, strict=True)))
    return x


def by_v3(name: str, net: Network, x):
    P = []
    for m in range(L):
        a_again = [net.drawn(i, P[i], x) for i in range(m)]
        f_again = [net.mlp(i, x + a_again[i]) for i in range(m)]
        P.append(net.P(m, x))
        a = net.attention(m, x)
        learned = softmax_of(net, m) if name in ("v3m3.2", "v3m4.2") else None
        mean = np.full(m + 1, 1 / (m + 1))
        if name in ("v3m2", "v3m4.1", "v3m4.2"):
            weight = {"v3m2": np.ones(m + 1), "v3m4.1": mean, "v3m4.2": learned}[name]
            h = x + sum(w * y for w, y in zip(weight, [*a_again, a], strict=True))
            x = h + net.mlp(m, h)
        else:
            weight = {"v3m1": np.ones(m + 1), "v3m3.1": mean, "v3m3.2": learned}[name]
            h = x + a
            x = h + sum(w * y for w, y in zip(weight, [*f_again, net.mlp(m, h)], strict=True))
    return x


def inferred(net: Network, of, x_TD, layer: int, stacked: bool) -> np.ndarray:
    """A = GELU(RMSNorm(X) W1) W2 + bias [T, M], with the exact GELU."""
    norm, w1, w2, bias = (weights(w) for w in (of.norm.weight, of.w1, of.w2, of.bias))
    if stacked:
        norm, w1, w2, bias = norm[layer], w1[layer], w2[layer], bias[layer]
    X = net.n1(layer, x_TD) if net.config.stream.input == "normed" else x_TD
    hidden = normed(X, norm, net.config.norm.eps) @ w1
    gelu = hidden * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2))) / 2
    return gelu @ w2 + bias


def coefficients(name: str, net: Network, m: int, x_TD) -> list:
    """c_(m,i) for each i <= m, to be multiplied with l_i [H, T, S]."""
    M, d, s, index = m + 1, net.d, net.stream, net.at.index
    if name in ("v4m1", "v4m2", "v4m3"):
        return [{"v4m1": d**-0.5, "v4m2": (d * M) ** -0.5, "v4m3": 1 / (M * d**0.5)}[name]] * M
    if name == "v4m4":
        return [d ** -weights(s.a)[m] * M ** -weights(s.b)[m]] * M
    if name == "v4m5":
        return [1 / (a * d**0.5) for a in np.exp(weights(s.log_a[m]))]
    if name == "v4m6":
        return [1 / (a * d**b) for a, b in zip(np.exp(weights(s.log_a[m])), weights(s.b[m]), strict=True)]
    if name == "v4m7":
        return list(1 / np.exp(weights(s.log_a[m])))
    if name == "v4m1A":
        return [np.exp(W[index][:, index]) / d**0.5 for W in weights(s.w[m])]
    if name == "v4m1B":
        return [np.exp(w[index])[None, :] / d**0.5 for w in weights(s.w[m])]
    if name == "v4m1C":
        return [np.exp(w[index])[:, None] / d**0.5 for w in weights(s.w[m])]
    if name in ("v4m1D", "v4m1E"):
        A_TM = inferred(net, s.infer[m], x_TD, m, stacked=False)
        return [(np.exp(A)[:, None] if name == "v4m1D" else np.exp(A)[None, :]) / d**0.5 for A in A_TM.T]
    own = {
        "v4mC": lambda: weights(net.block.stream.w)[m][index][:, None],
        "v4mD": lambda: inferred(net, net.block.stream, x_TD, m, stacked=True),
        "temperature": lambda: weights(net.block.stream.w)[m],
    }[name]()
    return [0] * m + [np.exp(own) / d**0.5]


def by_v4(name: str, net: Network, x):
    past = []
    for m in range(L):
        past.append(net.own_scores(m, x))
        z = sum(c * l for c, l in zip(coefficients(name, net, m, x), past, strict=True))
        h = x + net.drawn(m, net.softmax(z), x)
        x = h + net.mlp(m, h)
    return x


BY_VERSION = {"v1": by_v1, "v2": by_v2, "v3": by_v3, "v4": by_v4, "te": by_v4}


def formula(net: Network, x):
    return BY_VERSION[net.name[:2]](net.name, net, x)


def marked(names: list) -> list:
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", NAMES + POST + NORMED + PLACED)
def test_stream_against_numpy(name):
    check_stream(config(name), formula)


@pytest.mark.matrix("name")
@pytest.mark.parametrize("name", marked(NAMES + POST))
def test_logits_against_numpy_and_gradients_against_finite_differences(name):
    got = double(config(name))
    check_logits(got, formula)
    check_gradients(got)


class Fixed:
    """A block whose sublayers give what they were told, whatever they read."""

    def __init__(self, a, f):
        self.a, self.f = a, f

    def mix(self, x, view, cache):
        return self.a, cache

    def feed(self, h):
        return self.f


def test_v2m1_rescales_feedforward_outputs_by_harmonic_numbers():
    """x_L = x_0 + sum_i a_i + sum_i f_i (H_L - H_i)."""
    rng = np.random.default_rng(0)
    x, a, f = rng.normal(size=(2, 3, 8)), *rng.normal(size=(2, 6, 2, 3, 8))
    model = tiny.config(model__stream__name="v2m1", model__layers=6).model
    stream = STREAMS["v2m1"](model, None)
    with jax.enable_x64(True):
        state = stream.start(jnp.asarray(x), None)
        for m in range(6):
            state, _ = stream.layer(state, Fixed(a[m], f[m]), None, None, m=m)
        got, _ = stream.finish(state)
    H = np.concatenate([[0], np.cumsum(1 / np.arange(1, 7))])
    np.testing.assert_allclose(got, x + a.sum(0) + sum(f[i] * (H[6] - H[i]) for i in range(6)), rtol=1e-12)


def test_v1m6_is_v1m3_but_for_layer_0():
    six, three = (tiny.model(config(name)) for name in ("v1m6", "v1m3"))
    batch = tiny.batch(1, length=LENGTH)
    view = six.views(batch.coordinates, batch.coordinates)[0]
    blocks = [jax.tree.map(lambda w, m=m: w[m], six.blocks[0]) for m in range(L)]
    x_BTD = six.embed(batch.tokens, batch.coordinates)

    def run(stream, state, layers: range):
        for m in layers:
            state, _ = stream.layer(state, blocks[m], view, None, m=m)
        return state

    @jax.jit
    def both(x_BTD):
        first = [run(stream, stream.start(x_BTD, None), range(1)) for stream in (six.stream, three.stream)]
        return first, [run(stream, first[1], range(1, L)) for stream in (six.stream, three.stream)]

    first, last = both(x_BTD)
    assert np.abs(first[0].x - first[1].x).max() > 0.01
    np.testing.assert_allclose(last[0].x, last[1].x, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(first[1].x, first[1].F)


@pytest.mark.parametrize("name", ["v4m1", "v4m7"])
def test_v4_concatenated_equals_dense_summed_scores(name):
    """In float32, of a long row, with rotation and two heads to a group."""
    made = config(name, model__rule="causal")
    model, batch = tiny.model(made), tiny.batch(2, length=200)
    view = model.views(batch.coordinates, batch.coordinates)[0]
    rng, past = np.random.default_rng(0), []

    @jax.jit
    def both(x_LBTD):
        for m in range(L):
            mixer = jax.tree.map(lambda w, m=m: w[m], model.blocks[0]).mixer
            q, kept, _ = mixer.project(x_LBTD[m], view, None)
            past.append((q, kept[0]))
        m, v = L - 1, kept[1]
        c = list(model.stream.c(m))
        folded = model.stream.attend(m, past, v, c, [1.0] * L, view, mixer)
        z_BGRTS = sum(c_i * reference.scores(q, k, 1.0) for c_i, (q, k) in zip(c, past, strict=True))
        return folded, reference.attend_scores(z_BGRTS, v, view.queries, view.keys, mixer.rule, 0.0)

    folded, dense = both(rng.normal(size=(L, 2, 200, made.model.dim)).astype(np.float32))
    for got, expected in zip(folded, dense, strict=True):
        real = np.isfinite(expected)
        np.testing.assert_allclose(got[real], expected[real], atol=1e-5, rtol=1e-5)
    assert past[0][0].shape[2] == 2 * past[0][1].shape[2]


def counted(name: str, made) -> int:
    """Parameters beside those of the plain model, as the formulas say; L layers, width D, T positions."""
    L, D, T = made.layers, made.dim, made.stream.length
    pairs = L * (L + 1) // 2
    return {
        **dict.fromkeys(("v2m3", "v3m3.2", "v3m4.2"), pairs - 1),
        "v4m4": 2 * L,
        **dict.fromkeys(("v4m5", "v4m7"), pairs),
        "v4m6": 2 * pairs,
        "v4m1A": T * T * pairs,
        **dict.fromkeys(("v4m1B", "v4m1C"), T * pairs),
        **dict.fromkeys(("v4m1D", "v4m1E"), L * D + (D + 1) * pairs + L * (L + 1) * (2 * L + 1) // 6),
        "v4mC": L * T,
        "v4mD": L * (2 * D + 2),
        "temperature": L,
    }.get(name, 0)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_equal_their_formulas(name):
    made, plain = config(name).model, config("plain").model
    own = parameter.count(lab_model.abstract(made)) - parameter.count(lab_model.abstract(plain))
    assert own == counted(name, made)
    published = {"v4m1D": 22_768, "v4m1E": 22_768, "v4mD": 8 * (2 * 512 + 2)}
    if name in published:
        made.update(layers=8, dim=512)
        plain.update(layers=8, dim=512)
        own = parameter.count(lab_model.abstract(made)) - parameter.count(lab_model.abstract(plain))
        assert own == counted(name, made) == published[name]


@pytest.mark.parametrize("name", NAMES)
def test_no_parameter_of_a_stream_decays_or_is_muons(name):
    model = lab_model.abstract(config(name).model)
    for part in (model.stream, model.blocks[0].stream):
        variables = jax.tree.leaves(parameter.split(part)[1], is_leaf=lambda x: isinstance(x, nnx.Variable))
        for variable in variables:
            declared = variable.get_metadata()
            assert declared["decay"] is False and declared["inputs"] == 0


STARTS_AS = {
    **dict.fromkeys(("v4m5", "v4m6", "v4m7", "v4m1A", "v4m1B", "v4m1C"), "v4m1"),
    "v4m4": "v4m3",
    "v4mC": "plain",
    "temperature": "plain",
    "v2m3": "v2m1",
    "v3m3.2": "v3m3.1",
    "v3m4.2": "v3m4.1",
}


@pytest.mark.matrix("name")
@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS_AS)
def test_learned_weights_start_as_the_method_without_them(name):
    batch = tiny.batch(2, length=LENGTH)
    models = [lab_model.build(config(n).model, jax.random.key(1)) for n in (name, STARTS_AS[name])]
    got, expected = (jax.jit(type(m).__call__)(m, batch.tokens, batch.coordinates) for m in models)
    real = batch.coordinates.segment >= 0
    np.testing.assert_allclose(got[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name in ("v2m3", "v3m3.2", "v3m4.2")])
def test_mixing_weights_are_reported(name):
    start = lab_model.build(config(name).model, jax.random.key(0)).stream.mixing()
    ((label, at_start),) = start.items()
    lower = np.tril(np.ones((L, L), bool))
    assert label == "softmax(w)" and (np.isfinite(at_start) == lower).all()
    np.testing.assert_allclose(at_start[lower], (1 / np.arange(1, L + 1)[:, None] * lower)[lower], rtol=1e-6)
    stream = tiny.model(config(name)).stream
    found = stream.mixing()[label]
    for m in range(1, L):
        w = np.exp(weights(stream.weights.w[m - 1]))
        np.testing.assert_allclose(found[m, : m + 1], w / w.sum(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4m4", "v4m5", "v4m6", "v4m7"])
def test_summed_scores_report_their_weights_in_units_of_ordinary_attention(name):
    start = lab_model.build(config(name).model, jax.random.key(0)).stream.mixing()["c sqrt(d)"]
    lower = np.tril(np.ones((L, L), bool))
    expected = 1 / np.arange(1, L + 1)[:, None] * lower if name == "v4m4" else lower
    assert (np.isfinite(start) == lower).all()
    np.testing.assert_allclose(start[lower], expected[lower], rtol=1e-6)
    made, model = config(name), tiny.model(config(name))
    net, found = Network(made.model, model, tiny.batch().coordinates.map(lambda x: x[0])), model.stream.mixing()
    for m in range(L):
        expected = np.array(coefficients(name, net, m, None)) * net.d**0.5
        np.testing.assert_allclose(found["c sqrt(d)"][m, : m + 1], expected, rtol=1e-5)


@pytest.mark.slow
def test_streams_without_learned_weights_of_layers_report_none():
    learned = {"v2m3", "v3m3.2", "v3m4.2", "v4m4", "v4m5", "v4m6", "v4m7"}
    for name in ("plain", *NAMES):
        model = lab_model.abstract(config(name).model)
        if name not in learned:
            assert model.stream.mixing() == {}


@pytest.mark.slow
@pytest.mark.matrix("name")
@pytest.mark.parametrize("name", [name for name in STREAMS if name not in variants.LIKE_PLAIN])
def test_stopped_and_resumed_equals_undisturbed_to_the_bit(name, tmp_path):
    program, mesh, made = Program("adamw", "declared", 1), tiny.mesh(), tiny.config(**variants.stream(name))
    numbers = optimizer.numbers_by_step(made.train)(0)
    first, second = (tiny.batch(seed) for seed in (0, 1))

    def state_of(seed: int):
        state = step.initial_state(tiny.model(made, seed), program)
        return jax.device_put(state, parameter.shardings(state, mesh))

    state = state_of(seed=0)
    run = compiled.train_step(state, numbers, first, program, mesh)
    state, _ = run(state, numbers, first)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(Position(1, 0), state)
    checkpoints.wait()
    undisturbed = run(state, numbers, second)
    _, restored = checkpoints.restore(state_of(seed=1))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, run(restored, numbers, second), undisturbed)


def test_every_stream_keeps_the_contracts():
    kept = {variants.config(name).model.stream.name for name in variants.VARIANTS | variants.ON_STREAMS}
    assert kept | {*variants.LIKE_PLAIN} == {*STREAMS}


@pytest.mark.matrix("variant")
@pytest.mark.parametrize(
    ("variant", "scan"), variants.both_ways(variants.marked(variants.ON_STREAMS | variants.VARIANTS))
)
def test_the_stream_stays_in_the_precision_of_the_model(variant, scan):
    made = variants.config(variant, model__compute="bfloat16", run__scan=scan)
    batch = tiny.batch()

    def read_by_head(model):
        views = model.views(batch.coordinates, batch.coordinates)
        return model.run_layers(model.embed(batch.tokens, batch.coordinates), views)[0]

    assert jax.eval_shape(read_by_head, lab_model.abstract(made.model, made.run)).dtype == jnp.bfloat16
