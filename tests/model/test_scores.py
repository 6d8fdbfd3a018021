"""Positions that rotate nothing: what they add to scores, to keys and values, to the embedding, against float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import packs
import pytest
import tiny

from lab import kernels
from lab import model as lab_model
from lab.coordinates import Coordinates
from lab.data import packing, pipeline
from lab.errors import UserError
from lab.kernels import rules
from lab.model import accounting, codes, relative, scores
from lab.model.mixers import MIXERS
from lab.model.position import POSITIONS
from lab.model.streams import STREAMS
from lab.study.define import plan, resolve
from lab.study.define.cell import Cell
from lab.study.run import attention

ADDED = [name for name, row in POSITIONS.items() if row.added]
SMALL = {  # options under which few time steps reach every entry of a table
    "t5": dict(model__position__buckets=8, model__position__distance=14),
    "shaw": dict(model__position__clip=3),
    "learned": dict(model__position__length=24),
}
LENGTH = 26


def config(name: str, **overrides):
    return tiny.config(model__position__name=name, **SMALL.get(name, {}) | overrides)


# T5's buckets and ALiBi's slopes by their definitions.


def times(distance) -> tuple[Coordinates, Coordinates]:
    """Queries that are so far after their keys, at time 9."""
    none = np.zeros_like(distance)
    return Coordinates(none, none, 9 + distance, none), Coordinates(none, none, none + 9, none)


def index_of(distance, **options) -> np.ndarray:
    made = scores.Buckets(tiny.config(model__position__name="t5", **options).model, 4, (8, 8), jax.random.key(0))
    return np.asarray(made().index.values(*times(distance)))


def test_buckets_are_the_published_ones():
    known = {-5: 0, 0: 0, 1: 1, 15: 15, 16: 16, 32: 21, 64: 26, 127: 31, 128: 31, 10**6: 31}
    np.testing.assert_array_equal(index_of(np.array([*known])), [*known.values()])


def bucket(n: int, buckets: int = 32, distance: int = 128) -> int:
    """That of a distance, in float32 and cut off towards zero."""
    exact, one = buckets // 2, np.float32
    if n < exact:
        return n
    wide = np.log(one(n) / one(exact)) / one(math.log(distance / exact)) * one(buckets - exact)
    return min(exact + int(wide), buckets - 1)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (32, 256), (8, 20), (4, 4), (64, 512)])
def test_buckets_round_as_in_float32(buckets, distance):
    n = np.arange(4096)
    found = index_of(n, model__position__buckets=buckets, model__position__distance=distance)
    np.testing.assert_array_equal(found, [bucket(int(each), buckets, distance) for each in n])
    assert {*found} == {*range(buckets)}


def slopes_by_the_paper(n: int) -> list[float]:
    """The geometric sequence that starts at 2^(-8/n), with that same value as its ratio; else of the power below, and
    of every second one of the power above."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    power = 2 ** math.floor(math.log2(n))
    return slopes_by_the_paper(power) + slopes_by_the_paper(2 * power)[0::2][: n - power]


def test_slopes_of_any_number_of_heads():
    for heads in range(1, 33):
        np.testing.assert_allclose(scores.alibi_slopes(heads), slopes_by_the_paper(heads), rtol=1e-12)


# One layer against float64.


def weights(variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


def layer(name: str, pack: str = "interleaved", **overrides):
    """(config, mixer of one layer, x [2, T, D], coordinates, view)"""
    made = config(name, **dict(model__layers=1, run__implementation="reference") | overrides)
    model = tiny.model(made)
    at = packs.PACKS[pack](np.random.default_rng(4), 2, LENGTH)
    x_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(2, LENGTH, made.model.dim)), jnp.float32)
    mixer = jax.tree.map(lambda w: w[0], model.blocks[0].mixer)
    return made.model, mixer, x_BTD, at, model.views(at, at)[0]


def mixed(config, mixer, x_TD, at, table_HN=None) -> np.ndarray:
    """What a layer makes of one row, one map after another."""
    position, options = config.position, config.mixer
    q_THK, k_SGK, v_SGV = (np.tensordot(x_TD, weights(w), 1) for w in (mixer.q, mixer.k, mixer.v))
    seen_TS = np.asarray(rules.visible(mixer.rule, at, at))
    distance_TS = at.time[:, None] - at.time[None, :]
    r_TS = np.clip(-distance_TS, -position.clip, position.clip) + position.clip
    (_, H, K), outputs = q_THK.shape, []
    for h in range(H):
        g = h * k_SGK.shape[1] // H
        s_TS = q_THK[:, h] @ k_SGK[:, g].T
        if position.name == "shaw":
            s_TS = s_TS + np.einsum("tk,tsk->ts", q_THK[:, h], weights(mixer.added.keys)[r_TS])
        s_TS = s_TS * (options.softmax_scale or K**-0.5)
        if options.softcap:
            s_TS = options.softcap * np.tanh(s_TS / options.softcap)
        if position.name == "alibi":
            s_TS = s_TS - slopes_by_the_paper(H)[h] * distance_TS
        if position.name == "t5":
            of = np.array([bucket(n, position.buckets, position.distance) for n in range(LENGTH)])
            s_TS = s_TS + table_HN[h][of[np.maximum(distance_TS, 0)]]
        e_TS = np.where(seen_TS, np.exp(s_TS), 0)
        sink = 0 if mixer.sink is None else np.exp(weights(mixer.sink)[h])
        p_TS = e_TS / np.maximum(e_TS.sum(-1, keepdims=True) + sink, 1e-300)
        o_TV = p_TS @ v_SGV[:, g]
        if position.name == "shaw":
            o_TV = o_TV + np.einsum("ts,tsv->tv", p_TS, weights(mixer.added.values)[r_TS])
        outputs.append(o_TV)
    o_THV = np.stack(outputs, 1)
    if options.name == "differential":
        share_TH = 1 / (1 + np.exp(-x_TD @ weights(mixer.subtracted)))
        o_THV = o_THV[:, ::2] - share_TH[..., None] * o_THV[:, 1::2]
    return np.tensordot(o_THV, weights(mixer.o), 2)


@pytest.mark.parametrize(("name", "pack", "overrides"), [
    ("none", "interleaved", {}),
    ("t5", "scattered", dict(model__mixer__name="differential", model__rule="causal")),
    ("t5", "interleaved", dict(model__position__shared=False, model__mixer__softcap=1.5)),
    ("alibi", "scattered", dict(model__mixer__heads=6, model__mixer__softmax_scale=1.0, model__rule="causal")),
    ("shaw", "scattered", dict(model__mixer__softcap=1.5, model__mixer__sink=True, model__rule="causal")),
    ("shaw", "interleaved", dict(model__mixer__v_head_dim=6, model__mixer__kv_heads=1)),
], ids=str)  # fmt: skip
def test_a_layer_against_matrices(name, pack, overrides, monkeypatch):
    monkeypatch.setattr(relative, "CHUNK", 10)  # no divisor of the row
    made, mixer, x_BTD, at, view = layer(name, pack, **overrides)
    got = jax.jit(lambda mixer, view: mixer(x_BTD, view)[0])(mixer, view)
    added = view.added if mixer.added is None else mixer.added()
    table = weights(added.table_HN) if name == "t5" else None
    for b in range(2):
        row = at.map(lambda x, b=b: x[b])
        real = row.segment >= 0
        expected = mixed(made, mixer, np.asarray(x_BTD[b], np.float64), row, table)
        assert np.abs(expected[real]).max() > 0.05
        np.testing.assert_allclose(np.asarray(got[b])[real], expected[real], atol=3e-5, rtol=3e-5)
    if pack == "scattered":  # where keys of a later time are seen
        assert (rules.visible(mixer.rule, row, row) & (row.time[None, :] > row.time[:, None])).any()


def test_the_gradient_of_a_table_of_buckets_against_finite_differences():
    made, mixer, x_BTD, at, view = layer("t5", model__position__shared=False)
    x_TD, row = np.asarray(x_BTD[1], np.float64), at.map(lambda x: x[1])
    rng = np.random.default_rng(2)
    pull_TD = rng.normal(size=x_TD.shape) * (row.segment >= 0)[:, None]
    loss = jax.jit(jax.grad(lambda mixer: (pull_TD * mixer(x_BTD, view)[0][1]).sum()))
    got, table, step = weights(loss(mixer).added.table), weights(mixer.added.table), 1e-5
    for _ in range(5):
        along = rng.normal(size=table.shape)
        ends = [(pull_TD * mixed(made, mixer, x_TD, row, table + sign * step * along)).sum() for sign in (1, -1)]
        np.testing.assert_allclose((got * along).sum(), (ends[0] - ends[1]) / (2 * step), atol=1e-4, rtol=1e-4)
    assert (np.abs(got).max(0) > 1e-4).sum() >= 7  # buckets that some pair is in


# Whole models.


def test_a_shared_table_is_felt_by_every_layer_of_a_scan():
    """Its gradient against the loss at two tables."""
    model, batch = tiny.model(config("t5", run__scan=True, run__implementation="reference")), tiny.batch()
    towards = jnp.asarray(np.random.default_rng(3).normal(size=model.added.table.shape), jnp.float32)

    @jax.jit
    def along(by):
        """(the loss, its slope) that far along."""

        def loss(by):
            add = lambda path, w: w + by * towards if ".added" in jax.tree_util.keystr(path) else w  # noqa: E731
            moved = jax.tree_util.tree_map_with_path(add, model)
            return jnp.sin(moved(batch.tokens, batch.coordinates)).sum()

        return jax.value_and_grad(loss)(by)

    (above, _), (_, slope), (below, _) = (along(by) for by in (0.02, 0.0, -0.02))
    assert abs(slope) > 0.1
    np.testing.assert_allclose((above - below) / 0.04, slope, rtol=0.02)


def test_decoding_equals_the_full_pass():
    """The contracts have the other positions."""
    pattern = ((), (("position.name", "learned"), ("position.length", 32)))
    model, batch = tiny.model(config("alibi", model__pattern=pattern, run__implementation="reference")), tiny.batch()
    full = jax.jit(lambda: model(batch.tokens, batch.coordinates))()
    extend = jax.jit(lambda part, cache: model.extend(part.tokens, part.coordinates, cache))
    cache, found = model.init_cache(2, 27), []
    for begin in range(0, 24, 8):
        logits, cache = extend(jax.tree.map(lambda x, begin=begin: x[:, begin : begin + 8], batch), cache)
        found.append(logits)
    real = batch.coordinates.segment >= 0
    np.testing.assert_allclose(np.concatenate(found, 1)[real], full[real], atol=3e-4)


@pytest.mark.parametrize("name", [name for name, mixer in MIXERS.items() if kernels.Bias in mixer.adds])
def test_every_mixer_that_takes_a_bias_adds_it(name):
    """Where it decodes, and in a full pass, which asks for a bias of as many heads; traced."""
    more = dict(mla=dict(model__mixer__latent=12), s1=dict(model__mixer__v_head_dim=10))
    made = config("t5", model__mixer__name=name, **(more | {"gta": more["s1"]}).get(name, {}))
    model, batch = lab_model.abstract(made.model, made.run), tiny.batch()
    cache = jax.eval_shape(lambda: model.init_cache(2, 27))
    extend = lambda model, cache: model.extend(batch.tokens, batch.coordinates, cache)  # noqa: E731
    check_added(lambda: jax.eval_shape(extend, model, cache))
    jax.eval_shape(lambda model: model(batch.tokens, batch.coordinates), model)


@pytest.mark.parametrize("name", [name for name, stream in STREAMS.items() if stream.mixers and stream.adds])
def test_every_stream_that_looks_into_mixers_keeps_what_is_added(name):
    length = dict(model__stream__length=32) if "length" in STREAMS[name].options else {}
    made, batch = config("t5", model__stream__name=name, **length), tiny.batch()
    model = lab_model.abstract(made.model, made.run)
    check_added(lambda: jax.eval_shape(lambda model: model(batch.tokens, batch.coordinates), model))


def check_added(trace) -> None:
    with kernels.recorded() as calls:
        trace()
    assert len(calls) == 2 and all(call["biased"] for call in calls)


def test_codes_of_the_time():
    made = config("sinusoidal").model
    at = packs.interleaved(np.random.default_rng(0), 2, 12)
    angle_BTF = at.time[..., None] * 10_000.0 ** (-2 * np.arange(8) / 16)
    expected = math.sqrt(2 / 16) * np.concatenate([np.sin(angle_BTF), np.cos(angle_BTF)], -1)
    np.testing.assert_allclose(codes.SinusoidalCode(made)(at), expected, atol=1e-5)
    code = codes.LearnedCode(config("learned", model__position__length=200).model, jax.random.key(0))
    np.testing.assert_array_equal(code(at), np.asarray(code.table[...])[at.time])
    assert np.std(code.table[...]) == pytest.approx(0.25, rel=0.1)


def test_a_pattern_gives_its_one_code_to_the_embedding():
    made = config("none", model__pattern=((), (("position.name", "learned"), ("position.length", 24))))
    model, batch = tiny.model(made), tiny.batch()
    added = model.embed(batch.tokens, batch.coordinates) - model.embedding[...][batch.tokens]
    np.testing.assert_allclose(added, model.code.table[...][batch.coordinates.time], atol=1e-6)
    counted = accounting.parameters(model)
    assert counted["parameters"] - counted["parameters_non_embedding"] == (tiny.VOCABULARY + 24) * 16


def test_a_time_without_a_vector_is_refused_and_nan_where_it_is_traced():
    code = codes.LearnedCode(config("learned", model__position__length=8).model, jax.random.key(0))
    at = Coordinates.single(1, 9)
    with pytest.raises(UserError, match=r"a token is at time 8, beyond model.position.length = 8: .* at least 9"):
        code(at)
    padded = Coordinates(at.segment - (at.index == 8), at.branch, at.time, at.index)
    assert np.isfinite(code(padded)).all()
    lost = np.isnan(jax.jit(code.__call__)(at))
    assert lost[0, 8].all() and not lost[0, :8].any()
    assert np.isfinite(jax.jit(code.__call__)(padded)).all()


@pytest.mark.parametrize(("data", "times"), [
    ({}, 12), (dict(prompt="first"), 18), (dict(stagger=False), 6), (dict(stagger=False, prompt="first"), 12),
], ids=str)  # fmt: skip
def test_as_many_time_steps_as_a_row_may_have(data, times):
    made = tiny.config()
    made.data.update(data | dict(draw="fixed3", texts_per_row=12))
    assert packing.most_times(made.data) == times
    texts = np.random.default_rng(0).integers(1, 7, 12)
    layout = pipeline.training_layout(made)
    rows = [layout.row([np.zeros(n, np.int32) for n in texts], np.random.default_rng(i)) for i in range(30)]
    assert times - 5 <= max(row.coordinates.time.max() for row in rows) < times


def test_texts_beyond_the_vectors_are_refused_before_a_study_runs():
    plan.check(*resolve.resolve(config("learned", model__position__length=12)))
    with pytest.raises(UserError, match=r"data.text_length = 6, .* a token may be at time 11, beyond model.position"):
        plan.check(*resolve.resolve(config("learned", model__position__length=11)))


@pytest.mark.parametrize("name", ADDED)
def test_an_implementation_that_adds_nothing_is_refused_by_name(name, monkeypatch):
    monkeypatch.setattr(kernels, "_obstacle", lambda name: None)  # as where it runs
    made = config(name, run__implementation="cudnn")
    model, batch = lab_model.abstract(made.model, made.run), tiny.batch()
    with pytest.raises(UserError, match="'cudnn' adds no bias to scores; choose among: auto, reference, tiled"):
        jax.eval_shape(lambda model: model(batch.tokens, batch.coordinates), model)
    plain, every = Cell("plain", {}, config("none")), [*kernels.IMPLEMENTATIONS]
    assert attention._able([plain, Cell("added", {}, made)], every) == ["reference", "tiled"]
    assert attention._able([plain], every) == every


@pytest.mark.parametrize(("name", "overrides", "says"), [
    ("none", dict(model__position__theta=9.0), "model.position.theta = 9.0 means nothing beside model.position.name ="),
    ("t5", dict(model__position__dim=4), "model.position.dim = 4 means nothing beside model.position.name = 't5'"),
    ("fourier", dict(model__position__share=0.5), "model.position.share = 0.5 means nothing beside"),
    ("rope2d", dict(model__position__share=1.5), "model.position.share = 1.5 must be at most 1"),
    ("none", dict(model__mixer__rotate="qk"), "model.mixer.rotate = 'qk' means nothing beside model.position.name = "),
    ("sinusoidal", dict(model__dim=15), "model.dim = 15 must be even"),
    ("learned", dict(model__position__length=0), "model.position.length = 0 must be at least 1"),
    ("t5", dict(model__position__buckets=9), "model.position.buckets = 9 must be even"),
    ("t5", dict(model__position__buckets=2), "model.position.buckets = 2 must be at least 4"),
    ("t5", dict(model__position__buckets=32), "model.position.distance = 14 leaves some of model.position"),
    ("t5", dict(model__position__buckets=32, model__position__distance=30), "choose a longer distance, or fewer"),
    ("shaw", dict(model__position__clip=0), "model.position.clip = 0 must be at least 1"),
    ("t5", dict(model__pattern=((), (("mixer.heads", 2),))), "that share a table of biases differ in heads"),
    ("t5", dict(model__pattern=((), (("position.buckets", 4),))), "options of model.position; choose the same"),
    ("fourier", dict(model__pattern=((), (("position.name", "sinusoidal"),))),
     "model.pattern has the codes ('fourier',), ('sinusoidal',) of model.position"),
    *((name, dict(model__mixer__name="forgetting"), f"'forgetting' = '{name}' is unknown; choose one of: rope2d")
      for name in ADDED),
    ("alibi", dict(model__mixer__name="delta", model__rule="causal"), "'delta' = 'alibi' is unknown; choose one of: "),
    ("shaw", dict(model__mixer__name="mla", model__mixer__latent=12), "'mla' = 'shaw' is unknown; choose one of: "),
    ("t5", dict(model__stream__name="v4m1"), "model.position.name under model.stream.name = 'v4m1' = 't5' is unknown"),
    ("shaw", dict(model__stream__name="v3m2"), "model.position.name under model.stream.name = 'v3m2' = 'shaw'"),
], ids=str)  # fmt: skip
def test_what_means_nothing_is_refused(name, overrides, says):
    with pytest.raises(UserError) as refused:
        lab_model.abstract(config(name, **overrides).model)
    assert says in str(refused.value) and "\n" not in str(refused.value)
