"""Methods for longer texts, against float64 matrices of relative positions; what they promise of lengths and caches."""

import functools
import math
import types

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from long_texts import TRAINED as L
from long_texts import of_map, spec

from lab import model as lab_model
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.evaluate import asks
from lab.kernels.rotary import rotate
from lab.model import extrapolation, position, stretched
from lab.model.attending import View, attend_over_mesh

R, T = 8, 70  # rotary dimensions, tokens of a row


# Each method as its paper has it: the distance at which query i and key j turn, and whether i sees j at all.


def hybrid(i, j, cf=1.5, to=lambda x: x):
    g = lambda p: p if p <= L else to(L + (p - L) / cf)  # noqa: E731
    return g(i) - g(j)


def self_extend(i, j, W=12, G=4):
    return i - j if i - j < W else i // G - j // G + W - W // G


def dca(i, j, c=12, size=11):
    if i // size == j // size:
        return i % size - j % size
    return (min(i % size + size, c) if i // size == j // size + 1 else min(2 * size - 1, c)) - j % size


def streaming(i, j, sinks=3, w=10):
    cached = [t for t in range(i + 1) if t < sinks or i - t < w]
    return cached.index(i) - cached.index(j) if j in cached else None


def lm_infinite(i, j, sinks=3, w=24):
    return min(i - j, L) if j < sinks or i - j < w else None


def leaky(i, j, w=9, k=2.5):
    return i - j if i - j < w else w + (i - j - w) / k


METHODS = {
    "plain": (of_map("none"), lambda i, j: i - j),
    "hybrid": (of_map("hybrid", cf=1.5), hybrid),
    "hybrid, floored": (
        of_map("hybrid", cf=1.8, rounding="floor"), functools.partial(hybrid, cf=1.8, to=math.floor)
    ),
    "hybrid, rounded": (
        of_map("hybrid", cf=3.0, rounding="round"), functools.partial(hybrid, cf=3, to=lambda x: math.floor(x + 0.5))
    ),
    "rerope": (of_map("rerope", window=9), lambda i, j: min(i - j, 9)),
    "leaky": (of_map("leaky", window=9, leak=2.5), leaky),
    "self-extend": (of_map("self-extend", window=12, group=4), self_extend),
    "dca": (of_map("dca"), dca),
    "lm-infinite, wide": (of_map("lm-infinite", sinks=3, window=24), lm_infinite),
    "lm-infinite, narrow": (of_map("lm-infinite", sinks=3, window=10), functools.partial(lm_infinite, w=10)),
    "streaming": (of_map("streaming", sinks=3, window=10), streaming),
}  # fmt: skip


def turned(x_THF, inverse_F, distance):
    return x_THF * np.exp(1j * inverse_F * distance[..., None, None])


def dense(relative, arrays, at: Coordinates, cotangents, inverse_F, factor, growth_T, softcap):
    """((o, lse), (dq, dk, dv)) of one row: every pair is turned by its distance, None where it is hidden."""
    q, k, v = (np.asarray(x, np.float64) for x in arrays)
    n, F, heads = q.shape[1], q.shape[3] // 2, q.shape[2] // k.shape[2]
    complex_of = lambda x: x[0, ..., :F] + 1j * x[0, ..., F:]  # noqa: E731
    q_THF, k_SHF = complex_of(q) * growth_T[:, None, None], np.repeat(complex_of(k), heads, axis=1)
    same = exact.same_segment(at, at)[0] & (at.index[0][None] <= at.index[0][:, None])
    found = [[relative(int(i), int(j)) if see else None for j, see in zip(at.time[0], row, strict=True)]
             for i, row in zip(at.time[0], same, strict=True)]  # fmt: skip
    seen_TS = np.array([[x is not None for x in row] for row in found])
    angle_TSF = np.array([[x or 0.0 for x in row] for row in found], np.float64)[..., None] * inverse_F
    scale = (2 * F) ** -0.5 * factor**2
    keys_TSHF = k_SHF[None] * np.exp(-1j * angle_TSF)[:, :, None]
    s_HTS = scale * np.einsum("thf,tshf->hts", q_THF, keys_TSHF.conj()).real
    outputs, (ds, _, dv) = exact.attend(s_HTS[None], v, seen_TS[None], *cotangents, softcap=softcap)
    ds = np.where(seen_TS, ds[0], 0)
    dq_THF = scale * np.einsum("hts,tshf->thf", ds, keys_TSHF) * growth_T[:, None, None]
    dk_SHF = scale * np.einsum("hts,thf,tsf->shf", ds, q_THF, np.exp(1j * angle_TSF))
    dk_SGF = dk_SHF.reshape(n, -1, heads, F).sum(2)
    parts = lambda x: np.concatenate([x.real, x.imag], -1)[None]  # noqa: E731
    return outputs, (parts(dq_THF), parts(dk_SGF), dv)


def attended(model, at: Coordinates, implementation: str, softcap: float):
    """q, k, v -> (o, lse), as a layer of this config computes it."""
    rotary, rule = stretched.rotary(model), stretched.rule(model)
    letters = "" if stretched.banded(model) else "qk"
    mixer = types.SimpleNamespace(rule=rule, scale=R**-0.5, softcap=softcap, rotate=letters, added=None)

    def attend(q, k, v):
        turning = rotary.turning(at, rule)
        tiles = [None] * len(turning.bands) if turning.bands else None
        view = View(turning.rotation, turning.frequencies, at, at, tiles, None, implementation,
                    growth=turning.growth, bands=turning.bands, plain=turning.plain)  # fmt: skip
        return attend_over_mesh(q, rotate(k, view.rotation) if letters else k, v, view, mixer)

    return attend


def row(seed: int) -> Coordinates:
    """Two texts, the first beyond any edge that the methods have, and padding."""
    lengths = [T - 12, 8]
    segment = np.concatenate([np.full(n, i) for i, n in enumerate(lengths)] + [np.full(4, -1)])
    time = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(4)])
    return Coordinates(*(np.asarray(x, np.int32)[None] for x in (segment, 0 * time + 1, time, time)))


def check_dense(model, relative, implementation: str, seed: int, softcap: float = 3.0, growth=lambda t: 1.0 + 0 * t):
    rng, at = np.random.default_rng(seed), row(seed)
    shapes = (1, T, 4, R), (1, T, 2, R), (1, T, 2, 5)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    cotangents = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, T, 4, 5), (1, T, 4))]
    got, pull = jax.vjp(attended(model, at, implementation, softcap), *arrays)
    inverse, factor = extrapolation.frequencies(R, model.position)
    expected = dense(relative, arrays, at, cotangents, inverse, factor, growth(at.time[0]), softcap)
    padding = ~np.isfinite(expected[0][1])
    gradients = pull((cotangents[0], jnp.where(padding, 0, cotangents[1])))
    for one, other in zip((*got, *gradients), (*expected[0], *expected[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=5e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_its_matrix_of_distances_forward_and_backward(name):
    check_dense(*METHODS[name], "reference", seed=len(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dca", "streaming"])
def test_by_tiles_a_method_is_the_same(name):
    check_dense(*METHODS[name], "tiled", seed=len(name))


@pytest.mark.parametrize("name", ["hybrid", "self-extend"])
def test_frequency_maps_position_maps_and_growths_compose(name):
    model, relative = METHODS[name]
    model = model.copy_and_resolve_references()
    model.position.update(log_n=True, length=T)
    model.position.scaling.update(name="yarn", beta_fast=4.0)
    assert stretched.amplitude(model) > 1
    check_dense(model, relative, "reference", 1, growth=lambda t: np.maximum(1, np.log(t + 1) / math.log(L)))


def test_the_temperature_grows_queries_of_layers_without_a_rotation():
    model = spec()
    model.position = tiny.config(model__position__name="none").model.position
    model.position.update(temperature=0.3, temperature_step=7)
    growth = stretched.rotary(model).turning(row(0), stretched.rule(model)).growth
    np.testing.assert_allclose(growth(row(0)), 1 + 0.3 * np.log1p((row(0).time + 1) // 7), rtol=1e-6)


# Formulas of frequency maps that `transformers` does not have; the others are in test_rope_parameters.py.


def test_ntk_divides_the_slowest_pair_by_the_factor_and_keeps_the_fastest():
    plain, _ = extrapolation.frequencies(R, spec().position)
    found, factor = extrapolation.frequencies(
        R, spec(position__scaling__name="ntk", position__scaling__factor=5.0).position
    )
    np.testing.assert_allclose(found[[0, -1]], plain[[0, -1]] / [1, 5], rtol=1e-12)
    np.testing.assert_allclose(found, (100.0 * 5 ** (R / (R - 2))) ** (-2 * np.arange(R // 2) / R))
    assert factor == 1


def test_ntk_by_parts_mixes_by_turns():
    model = spec(position__scaling__name="ntk-by-parts", position__scaling__factor=3.0, position__trained=2000)
    found, _ = extrapolation.frequencies(R, model.position)
    for pair, got in enumerate(found):
        inverse = 100.0 ** (-2 * pair / R)
        turns = 2000 * inverse / (2 * math.pi)
        kept = 0 if turns < 1 else 1 if turns > 32 else (turns - 1) / 31
        assert got == pytest.approx((1 - kept) * inverse / 3 + kept * inverse)


@pytest.mark.parametrize(("name", "options", "reach"), [
    ("none", {}, 64), ("hybrid", {"cf": 1.5}, 48), ("rerope", {}, 17), ("leaky", {"leak": 4.0}, 28),
    ("self-extend", {"group": 4}, 28), ("dca", {}, 13), ("lm-infinite", {}, 17), ("streaming", {"window": 20}, 24),
])  # fmt: skip
def test_a_factor_that_is_not_given_comes_from_the_mapped_length(name, options, reach):
    model = of_map(name, **options)
    model.position.update(length=64)
    model.position.scaling.name = "linear"
    assert extrapolation.stretch(model.position, extrapolation.POSITION_MAPS[name].reach(model.position, 64)) == max(
        1, reach / L
    )
    inverse, _ = extrapolation.frequencies(R, model.position)
    assert inverse[0] == 1 / max(1, reach / L)


# What depends on the length of a text.


def lengths_of(scaling: str, **options):
    fields = {f"position__scaling__{name}": value for name, value in options.items()}
    return spec(position__scaling__name=scaling, **fields)


LISTS = dict(factor=4.0, short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(2.0, 3.0, 4.0, 5.0))


@pytest.mark.parametrize("cf", [1.0, 2.0])
@pytest.mark.parametrize(("name", "options"), [("dynamic", {"factor": 2.0}), ("longrope", LISTS)])
def test_a_row_turns_by_its_own_length_whatever_is_beside_it(name, options, cf):
    """Rows of 10 and 40 tokens: each as a model would turn that is told its length."""
    model = lengths_of(name, **options)
    model.position.map.update(name="hybrid", cf=cf)
    time = np.stack([np.arange(40), np.where(np.arange(40) < 10, np.arange(40), 0)]).astype(np.int32)
    segment = np.where(np.arange(40) < np.array([[40], [10]]), 0, -1).astype(np.int32)
    at = Coordinates(segment, 0 * time + 1, time, time)
    got = stretched.rotary(model).turning(at, stretched.rule(model)).rotation
    for b, length in enumerate((40, 10)):
        told = model.copy_and_resolve_references()
        told.position.length = length
        expected = stretched.rotary(told).turning(at, stretched.rule(told)).rotation
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one[b, :length], other[b, :length], atol=2e-5)
    assert not np.allclose(got[0][0, 9], got[0][1, 9])


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_cache_is_refused_unless_the_length_is_told(name):
    made = tiny.config(model__position__trained=4)
    made.model.position.scaling.update(lengths_of(name, **(LISTS if name == "longrope" else {})).position.scaling)
    for length, refused in ((0, True), (12, False)):
        made.model.position.length = length
        model = lab_model.abstract(made.model)
        extend = lambda model=model: stretched.check_cached(model.rotary)  # noqa: E731
        if refused:
            with pytest.raises(UserError, match=f"'{name}' depends on the length .* choose model.position.length"):
                extend()
        else:
            extend()
    with pytest.raises(UserError, match="depends on the length"):
        made.model.position.length = 0
        model = lab_model.abstract(made.model)
        cache = jax.eval_shape(lambda: model.init_cache(1, 8))
        model.extend(np.zeros((1, 1), np.int32), Coordinates.single(1, 1), cache)


def test_within_the_trained_length_a_hybrid_is_plain_to_the_last_bit():
    at, beyond = Coordinates.single(1, L + 1), Coordinates.single(1, 1, start=L + 4)
    plain = position.Rotary(spec())
    for cf, rounding in ((1.25, "none"), (1.8, "none"), (3.0, "none"), (1.5, "floor"), (2.5, "round")):
        model = of_map("hybrid", cf=cf, rounding=rounding)
        turning = functools.partial(stretched.rotary(model).turning, rule=stretched.rule(model))
        for one, other in zip(turning(at).rotation, plain(at), strict=True):
            np.testing.assert_array_equal(one, other)
        assert not np.array_equal(turning(beyond).rotation[1], plain(beyond)[1])


def test_nothing_that_is_not_asked_for_changes_a_program():
    """The plain class, its one leaf, and none of another."""
    for model in (
        spec(),
        spec(position__length=99),
        spec(position__scaling__name="llama3", position__scaling__factor=8.0),
    ):
        assert type(stretched.rotary(model)) is position.Rotary
    leaves = jax.tree.leaves(stretched.rotary(spec()))
    assert [x.shape for x in leaves] == [(3, R // 2)]
    np.testing.assert_array_equal(leaves[0][2], (100.0 ** (-2.0 * np.arange(4) / 8)).astype(np.float32))


# Whole models.

LAYERS = {
    "rerope": (("position.map.name", "rerope"), ("position.map.window", 5), ("mixer.name", "differential")),
    "leaky, dynamic": (
        ("position.map.name", "leaky"), ("position.map.window", 5), ("position.map.leak", 1.5),
        ("position.scaling.name", "dynamic"), ("position.length", 24)
    ),
    "self-extend, log n": (
        ("position.map.name", "self-extend"), ("position.map.window", 4), ("position.map.group", 2),
        ("position.log_n", True)
    ),
    "dca": (("position.map.name", "dca"), ("position.trained", 16)),
    "lm-infinite": (("position.map.name", "lm-infinite"), ("position.map.window", 6)),
    "streaming, yarn": (
        ("position.map.name", "streaming"), ("position.map.window", 6), ("position.map.sinks", 2),
        ("position.scaling.name", "yarn"), ("position.scaling.factor", 4.0)
    ),
    "hybrid, yarn": (
        ("position.map.name", "hybrid"), ("position.scaling.name", "yarn"), ("position.scaling.factor", 2.0),
    ),
    "longrope": (
        ("position.scaling.name", "longrope"), ("position.length", 24), ("position.scaling.factor", 3.0),
        ("position.scaling.short_factor", LISTS["short_factor"]),
        ("position.scaling.long_factor", LISTS["long_factor"]),
    ),
    "none, temperature": (
        ("position.name", "none"), ("position.temperature", 0.5), ("position.temperature_step", 3)
    ),
}  # fmt: skip


def whole(pattern) -> object:
    made = tiny.config(
        model__pattern=tuple(pattern), model__layers=len(pattern), model__position__ratio=0.0,
        model__position__unselected="time", model__position__trained=6, model__mixer__qk_norm=True,
        model__mixer__softcap=4.0, model__rule="own_branch", run__implementation="reference",
    )  # fmt: skip
    return tiny.model(made)


@pytest.mark.slow
def test_decoding_with_a_cache_equals_the_full_pass_under_every_method():
    model, batch = whole(LAYERS.values()), tiny.batch(rows=2, length=24)
    full = jax.jit(lambda at: model(batch.tokens, at))(batch.coordinates)
    cache, parts = model.init_cache(2, 32), []
    extend = jax.jit(type(model).extend)
    for start in range(0, 24, 8):
        here = lambda x, start=start: x[:, start : start + 8]  # noqa: E731
        logits, cache = extend(model, here(batch.tokens), batch.coordinates.map(here), cache)
        parts.append(logits)
    real = batch.coordinates.segment >= 0
    np.testing.assert_allclose(np.concatenate(parts, 1)[real], full[real], atol=2e-4)


def test_dropping_the_rotation_is_an_override_on_the_same_weights():
    """DroPE: an ask of position.name = "none", in which what a rotation reads has its defaults again."""
    made, plain = tiny.config(), tiny.config(model__position__name="none").model.position
    fields = ("name", "theta", "ratio", "stride")
    dropped = asks.ask(model=tuple((f"position.{field}", plain[field]) for field in fields))
    rotating, still = (lab_model.abstract(model) for model in (made.model, asks.remodelled(made, dropped).model))
    shapes = [tiny.parameter.shapes(tiny.parameter.split(model)[1]) for model in (rotating, still)]
    assert shapes[0] == shapes[1] and still.rotary[0] is None and rotating.rotary[0] is not None
