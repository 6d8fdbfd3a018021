"""Bands against matrices of float64 in which every pair is rotated by the band that it lies in."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import exact
import jax
import jax.numpy as jnp
import numpy as np
import packs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attend import HERE, Case, check_close, draw, seeds, small_tiles  # noqa: F401  (a fixture)

from lab import kernels
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels import Bias, bands, rules
from lab.kernels.bands import Band, Growth
from lab.kernels.rotary import rotate, rotation
from lab.kernels.rules import k, minimum, q

W, GROUP, CHUNK = 9, 4, 16
CASE = Case(rule=rules.causal, K=8, softcap=2.0)  # its last six dimensions rotate
NEAR, DISTANCE = q.time - k.time < W, q.time - k.time
FAR = W <= DISTANCE
CHUNKS = q.time // CHUNK - k.time // CHUNK


class Said(NamedTuple):
    """Of a band: which pairs of a causal text lie in it, and where they rotate, of plain numbers."""

    inside: Callable
    q_time: Callable | None  # None: nothing rotates
    k_time: Callable | None
    amplitude: float | None = None
    grows: bool = False


def same(time):
    return time


def chunk(time):
    return time // CHUNK


def within(time):
    return time % CHUNK


def made(frequencies, amplitude, start, rate) -> dict[str, tuple[list[Band], list[Said]]]:
    f, grown = frequencies, Growth(q.index // 3 + 1, start, rate)
    near, far = (lambda q, k: q.time - k.time < W), (lambda q, k: q.time - k.time >= W)
    apart = W - W // GROUP
    return {
        "self-extend": (
            [
                Band(rules.causal & NEAR, f),
                Band(rules.causal & FAR, f, q.time // GROUP + apart, k.time // GROUP),
            ],
            [Said(near, same, same), Said(far, lambda t: t // GROUP + apart, lambda t: t // GROUP)],
        ),
        "three, as chunks have": (
            [
                Band(rules.causal & (CHUNKS == 0), f, q.time % CHUNK, k.time % CHUNK, amplitude, grown),
                Band(rules.causal & (CHUNKS == 1), f, minimum(q.time % CHUNK + CHUNK, 20), k.time % CHUNK, amplitude),
                Band(rules.causal & ((CHUNKS < 0) | (CHUNKS > 1)), f, 2 * CHUNK - 1, k.time % CHUNK),
            ],
            [
                Said(lambda q, k: chunk(q.time) == chunk(k.time), within, within, amplitude, grows=True),
                Said(
                    lambda q, k: chunk(q.time) == chunk(k.time) + 1,
                    lambda t: np.minimum(within(t) + CHUNK, 20),
                    within,
                    amplitude,
                ),
                Said(
                    lambda q, k: (chunk(q.time) < chunk(k.time)) | (chunk(q.time) > chunk(k.time) + 1),
                    lambda t: 0 * t + 2 * CHUNK - 1,
                    within,
                ),
            ],
        ),
        "nothing rotates but one": (
            [Band(rules.causal & NEAR, f), Band(rules.causal & FAR, None)],
            [Said(near, same, same), Said(far, None, None)],
        ),
    }


def turn(x_BTHK, at: Coordinates, time, frequencies, amplitude, sign: float = 1.0):
    """Pairs (p, p + 3) of the last six dimensions as complex numbers, turned by their angles and made longer."""
    if time is None:
        return x_BTHK
    w_index, w_branch, w_time = np.asarray(frequencies, np.float64)
    angle = at.index[..., None] * w_index + at.branch[..., None] * w_branch + time(at.time)[..., None] * w_time
    pairs = (x_BTHK[..., 2:5] + 1j * x_BTHK[..., 5:]) * np.exp(1j * sign * angle)[:, :, None] * (amplitude or 1)
    return np.concatenate([x_BTHK[..., :2], pairs.real, pairs.imag], axis=-1)


def expected(said, numbers, arrays, coordinates, cotangents, bias_BHTS=0.0):
    """((o, lse), (dq, dk, dv)), by matrices; said: of each band what `made` says."""
    frequencies, _, start, rate = numbers
    (q_BTHK, k_BSGK, v_BSGV), (queries, keys) = (np.asarray(x, np.float64) for x in arrays), coordinates
    pairs = queries.map(lambda x: x[:, :, None]), keys.map(lambda x: x[:, None, :])
    seen = exact.same_segment(queries, keys) & (pairs[1].index <= pairs[0].index)
    grown = np.maximum(1, start + rate * np.log(queries.index // 3 + 1))[..., None, None]
    scale, total, sides = CASE.K**-0.5, 0.0, []
    for band in said:
        of_q = functools.partial(turn, at=queries, time=band.q_time, frequencies=frequencies, amplitude=band.amplitude)
        of_k = functools.partial(turn, at=keys, time=band.k_time, frequencies=frequencies, amplitude=band.amplitude)
        inside, growth = band.inside(*pairs)[:, None], grown if band.grows else 1.0
        q_turned, k_turned = of_q(q_BTHK) * growth, of_k(k_BSGK)
        total = total + np.where(inside, exact.scores(q_turned, k_turned, scale), 0)
        sides.append((inside, q_turned, k_turned, growth, of_q, of_k))
    outputs, (ds, _, dv) = exact.attend(total, v_BSGV, seen, *cotangents, bias_BHTS, CASE.softcap)
    dq, dk = 0.0, 0.0
    for inside, q_turned, k_turned, growth, of_q, of_k in sides:
        dq_turned, dk_turned = exact.of_scores(np.where(inside, ds, 0), q_turned, k_turned, scale)
        dq, dk = dq + of_q(dq_turned * growth, sign=-1.0), dk + of_k(dk_turned, sign=-1.0)
    return outputs, (dq, dk, dv)


@functools.cache
def compiled(name: str, implementation: str):
    """(numbers, arrays, coordinates, cotangents) -> (o, lse), (dq, dk, dv)"""

    def run(numbers, arrays, coordinates, cotangents):
        def attend(*arrays):
            of = made(*numbers)[name][0]
            options = dict(implementation=implementation, softcap=CASE.softcap, return_lse=True)
            return bands.attend_bands(*arrays, *coordinates, of, **options)

        outputs, pull = jax.vjp(attend, *arrays)
        return outputs, pull(cotangents)

    return jax.jit(run)


def drawn_numbers(seed: int):
    frequencies = np.random.default_rng(seed).normal(size=(3, 3)) / 10
    return jnp.asarray(frequencies, jnp.float32), 1.25, 0.2, 0.5


@pytest.mark.matrix("name")
@pytest.mark.parametrize("implementation", ["reference", pytest.param("tiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", made(None, 1, 0, 1))
@settings(max_examples=3)
@given(seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_bands_against_matrices(name, implementation, seed, pack):
    arrays, coordinates, cotangents = draw(CASE, seed, pack)
    numbers = drawn_numbers(seed)
    of, said = made(*numbers)[name]
    bands.check_bands(of, *coordinates, rules.causal)
    got = compiled(name, implementation)(numbers, arrays, coordinates, cotangents)
    check_close(got, expected(said, numbers, arrays, coordinates, cotangents), 2e-5)


def test_gradients_of_the_numbers_of_bands():
    """Along a random direction, against differences of matrices."""
    arrays, coordinates, cotangents = draw(CASE, 3, "interleaved")
    name, at = "three, as chunks have", drawn_numbers(3)
    along = jnp.asarray(np.random.default_rng(4).normal(size=(3, 3)), jnp.float32), 0.3, -0.2, 0.4

    def loss(numbers):
        of = made(*numbers)[name][0]
        o = bands.attend_bands(*arrays, *coordinates, of, softcap=CASE.softcap, implementation="reference")
        return jnp.vdot(o, cotangents[0])

    def by_matrices(step: float) -> float:
        moved = [np.asarray(x, np.float64) + step * np.asarray(d) for x, d in zip(at, along, strict=True)]
        outputs, _ = expected(made(*moved)[name][1], moved, arrays, coordinates, cotangents)
        return float(np.vdot(outputs[0], cotangents[0]))

    _, slope = jax.jit(lambda at, along: jax.jvp(loss, (at,), (along,)))(at, along)
    h = 1e-5
    np.testing.assert_allclose(slope, (by_matrices(h) - by_matrices(-h)) / (2 * h), rtol=1e-3)


@pytest.mark.slow
def test_a_bias_is_added_in_every_band():
    arrays, coordinates, cotangents = draw(CASE, 5, "interleaved")
    numbers, slopes = drawn_numbers(5), np.array([0.1, -0.2, 0.3, 0.05])
    of, said = made(*numbers)["self-extend"]
    bias = Bias(DISTANCE, slope_H=jnp.asarray(slopes, jnp.float32))
    options = dict(implementation="reference", softcap=CASE.softcap, return_lse=True, bias=bias)
    got = bands.attend_bands(*arrays, *coordinates, of, **options)
    distance = coordinates[0].time[:, None, :, None] - coordinates[1].time[:, None, None, :]
    bias_BHTS = slopes[:, None, None] * distance
    check_close(got, expected(said, numbers, arrays, coordinates, cotangents, bias_BHTS)[0])


@pytest.mark.parametrize("implementation", HERE)
def test_one_plain_band_is_the_program_of_ordinary_rope(implementation):
    arrays, (queries, keys), _ = draw(CASE, 6, "interleaved")
    frequencies, which = drawn_numbers(6)[0], dict(implementation=implementation)

    def by_band(*arrays):
        return bands.attend_bands(*arrays, queries, keys, [Band(CASE.rule, frequencies)], **which)

    def by_hand(q, k, v):
        k = rotate(k, rotation(keys, frequencies))
        return kernels.attend(q, k, v, queries, keys, CASE.rule, frequencies_3F=frequencies, **which)

    by_band, by_hand = (re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(f)(*arrays))) for f in (by_band, by_hand))
    assert by_band == by_hand


@pytest.mark.slow
def test_tiles_made_before_change_nothing():
    arrays, coordinates, _ = draw(CASE, 7, "interleaved")
    of = made(*drawn_numbers(7))["self-extend"][0]
    tiles = [kernels.plan_tiles(*coordinates, band.rule, "tiled") for band in of]
    attend = jax.jit(lambda tiles: bands.attend_bands(*arrays, *coordinates, of, tiles=tiles, implementation="tiled"))
    np.testing.assert_array_equal(attend(tiles), attend(None))


def test_check_bands_names_a_pair():
    at = Coordinates.single(1, 20)
    near, far = rules.causal & NEAR, rules.causal & FAR
    of = lambda *some: [Band(rule, None) for rule in some]  # noqa: E731
    bands.check_bands(of(near, far), at, at, rules.causal)
    pair = r"query \(branch 1, time {0}, index {0}\) and key \(branch 1, time {1}, index {1}\) of row 0 are a pair of "
    for some, rule, says in (
        (of(near), rules.causal, pair.format(W, 0) + "no band; choose rules"),
        (of(near, rules.causal), rules.causal, pair.format(0, 0) + "bands 0 and 1; choose rules"),
        (of(near, far), rules.causal & NEAR, pair.format(W, 0) + "band 1, and the rule hides it; choose rules"),
    ):
        with pytest.raises(UserError, match=says):
            bands.check_bands(some, at, at, rule)


def test_maps_read_their_own_side():
    for ask in (
        lambda: Band(rules.causal, None, q_time=k.time),
        lambda: Band(rules.causal, None, k_time=k.time - q.time),
        lambda: Growth(k.time, 0.0, 1.0),
    ):
        with pytest.raises(ValueError, match="choose those of"):
            ask()


def test_growth_is_that_of_log_n_scaling_and_of_llama_4():
    time = np.arange(3 * 64, dtype=np.int32).reshape(3, 64) * 100
    at = Coordinates(0 * time, 0 * time, time, 0 * time)
    log_n = Growth(q.time + 1, 0.0, 1 / np.log(4096))
    np.testing.assert_allclose(log_n(at), np.maximum(1, np.log(time + 1) / np.log(4096)), rtol=1e-6)
    llama = Growth((q.time + 1) // 8192 + 1, 1.0, 0.1)
    np.testing.assert_allclose(llama(at), 1 + 0.1 * np.log(1 + (time + 1) // 8192), rtol=1e-6)


def test_a_band_is_an_argument_of_compiled_functions():
    traced = []
    turned = jax.jit(lambda band: traced.append(band) or jax.tree.leaves(band))
    for width in (3.0, 4.0, 5):
        turned(
            Band(
                rules.causal & NEAR,
                jnp.ones((3, 3)),
                q.time // 4,
                amplitude=width / 2,
                growth=Growth(q.time, 0.0, width / 3),
            )
        )
    turned(Band(rules.causal & NEAR, jnp.ones((3, 3)), q.time // 5, amplitude=1.5, growth=Growth(q.time, 0.0, 1.0)))
    assert len(traced) == 2
