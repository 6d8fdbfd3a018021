import math

import jax
import jax.numpy as jnp
import numpy as np
import packs
import pytest
import tiny
import variants
from hypothesis import given
from hypothesis import strategies as st

from lab import model as lab_model
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels.rotary import rotate
from lab.model import position

seeds = st.integers(0, 2**32 - 1)


def rotary(theta=1e6, ratio=1.0, stride=128, unselected="index", share=1.0):
    config = tiny.config().model.position
    config.update(theta=theta, ratio=ratio, stride=stride, unselected=unselected, share=share)
    return config


def angle_by_the_specification(p: int, d: int, at: Coordinates, *, theta, ratio, stride, unselected) -> float:
    """The angle of pair p of head width d for one token."""
    F = d // 2
    inv_p = theta ** (-2 * p / d)
    n = min(max(round(F * ratio), 0), F)
    if p < F - n:
        return {"index": at.index, "time": at.time}[unselected] * inv_p
    k = p - (F - n)
    return stride * at.branch * inv_p if k % 2 == 0 else at.time * inv_p


@given(
    half=st.integers(1, 64),
    ratio=st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    stride=st.sampled_from([1, 128, 1024]),
    unselected=st.sampled_from(["index", "time"]),
    theta=st.sampled_from([10.0, 1e4, 1e6]),
    seed=seeds,
)
def test_rope2d_against_the_specification(half, ratio, stride, unselected, theta, seed):
    options = dict(theta=theta, ratio=ratio, stride=stride, unselected=unselected)
    table = position.rope2d_frequencies(2 * half, rotary(**options))
    at = Coordinates(0, *(int(x) for x in np.random.default_rng(seed).integers(0, 70, 3)))
    got = at.index * table["index"] + at.branch * table["branch"] + at.time * table["time"]
    expected = [angle_by_the_specification(p, 2 * half, at, **options) for p in range(half)]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_ratio_zero_is_rope_over_the_index_and_ratio_one_never_reads_it():
    none, all_ = (position.rope2d_frequencies(8, rotary(ratio=ratio, theta=16.0)) for ratio in (0.0, 1.0))
    np.testing.assert_allclose(none["index"], [1, 0.5, 0.25, 0.125])
    assert not none["branch"].any() and not none["time"].any()
    np.testing.assert_allclose(all_["branch"], [128, 0, 32, 0])
    np.testing.assert_allclose(all_["time"], [0, 0.5, 0, 0.125])
    assert not all_["index"].any()


@pytest.mark.parametrize(("head_dim", "selected"), [(128, 64), (64, 32), (32, 16)])
def test_pair_counts_of_the_published_head_shapes(head_dim, selected):
    config = tiny.config(model__mixer__head_dim=head_dim, model__position__ratio=1.0).model
    assert position.pair_counts(config) == {"branch": selected // 2, "time": selected // 2, "index": 0}
    config.position.ratio = 0.25
    quarter = selected // 4
    counted = {"branch": quarter // 2, "time": quarter // 2}
    assert position.pair_counts(config) == {**counted, "index": selected - quarter}
    config.position.unselected = "time"
    assert position.pair_counts(config) == {"branch": quarter // 2, "time": selected - quarter // 2, "index": 0}


def test_a_share_of_the_pairs_rotates_the_fastest_first():
    whole, part = (position.rope2d_frequencies(16, rotary(ratio=0.5, share=share)) for share in (1.0, 0.8))
    for name in ("index", "branch", "time"):  # floor(8 * 0.8) = 6
        np.testing.assert_array_equal(part[name], np.where(np.arange(8) < 6, whole[name], 0))
    assert sum(np.count_nonzero(x) for x in whole.values()) == 8
    assert not any(x.any() for x in position.rope2d_frequencies(16, rotary(share=0.0)).values())


@given(st.integers(1, 64), st.floats(0, 1), st.sampled_from(["index", "time"]))
def test_every_pair_carries_one_thing(half, ratio, unselected):
    config = tiny.config(model__mixer__head_dim=2 * half, model__position__ratio=ratio).model
    config.position.unselected = unselected
    assert sum(position.pair_counts(config).values()) == half


@given(seed=seeds, half=st.sampled_from([1, 3, 8]), name=st.sampled_from(variants.ROTATING))
def test_rotation_is_multiplication_by_a_complex_number(seed, half, name):
    rng = np.random.default_rng(seed)
    config = tiny.config(model__mixer__head_dim=2 * half, model__position__name=name).model
    at = packs.interleaved(rng, 2, 10)
    x_BTHK = rng.normal(size=(2, 10, 3, 2 * half))
    table = position.POSITIONS[name].frequencies(2 * half, config.position)
    angle = sum(getattr(at, field)[..., None, None] * table[field] for field in ("index", "branch", "time"))
    turned = (x_BTHK[..., :half] + 1j * x_BTHK[..., half:]) * np.exp(1j * angle)
    got = rotate(jnp.asarray(x_BTHK, jnp.float32), position.Rotary(config)(at))
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=3e-5)


def test_rotation_keeps_the_type_of_what_it_turns():
    x_BTHK = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    assert rotate(x_BTHK, position.Rotary(tiny.config().model)(Coordinates.single(1, 4))).dtype == jnp.bfloat16


# The fields whose constant shift a model cannot see; the prompt is branch 0, so a rule that reads it is left out.
EVERY = "time", "branch", "index"
INVISIBLE_SHIFTS = {
    "rope2d": EVERY, "sequential": EVERY, "fourier": ("time", "index"), "learned-branch": ("time", "index"),
}  # fmt: skip


def shifts_of(name: str) -> dict[str, float]:
    """How far logits move when a constant is added to the time, branch and index of all tokens."""
    model = tiny.model(tiny.config(model__position__name=name))
    batch, forward = tiny.batch(), jax.jit(lambda at: model(batch.tokens, at))
    before = forward(batch.coordinates)
    real = batch.coordinates.segment >= 0
    return {
        field: float(jnp.abs(forward(tiny.moved(batch.coordinates, **{field: 5})) - before)[real].max())
        for field in ("time", "branch", "index")
    }


@pytest.mark.parametrize("name", INVISIBLE_SHIFTS)
def test_logits_depend_on_differences_of_coordinates(name):
    for field, shift in shifts_of(name).items():
        assert (shift < 2e-4) == (field in INVISIBLE_SHIFTS[name]), (field, shift)


def test_the_fourier_code_reads_the_branch_alone():
    config = tiny.config(model__position__name="fourier").model
    code = position.FourierCode(config)
    at = packs.interleaved(np.random.default_rng(0), 2, 12)
    other = Coordinates(at.segment + 1, at.branch, at.time + 3, at.index + 2)
    np.testing.assert_array_equal(code(at), code(other))
    for b, t in np.ndindex(2, 12):
        angles = [float(at.branch[b, t]) * 10_000 ** (-2 * i / config.dim) for i in range(config.dim // 2)]
        expected = math.sqrt(2 / config.dim) * np.array([*map(math.sin, angles), *map(math.cos, angles)])
        np.testing.assert_allclose(code(at)[b, t], expected, atol=1e-6)


def test_of_those_that_rotate_only_codes_of_the_branch_add_to_the_embedding():
    for name in (name for name in variants.ROTATING if name != "learned-branch"):
        model = tiny.model(tiny.config(model__position__name=name))
        batch = tiny.batch()
        added = model.embed(batch.tokens, batch.coordinates) - model.embedding[...][batch.tokens]
        code = position.FourierCode(tiny.config().model)(batch.coordinates)
        np.testing.assert_allclose(added, code if name == "fourier" else np.zeros_like(added), atol=1e-6)


@pytest.mark.parametrize(("field", "value", "says"), [
    ("model__position__ratio", 1.01, "model.position.ratio = 1.01 must be at most 1"),
    ("model__position__ratio", -0.5, "model.position.ratio = -0.5 must be at least 0"),
    ("model__position__ratio", math.nan, "model.position.ratio = nan must be a finite number"),
    ("model__mixer__head_dim", 7, "model.mixer.head_dim = 7 must be even"),
    ("model__mixer__head_dim", 0, "model.mixer.head_dim = 0 must be at least 1"),
    ("model__position__unselected", "branch", "'branch' is unknown; choose one of: index, time"),
    ("model__position__name", "rope", "did you mean 'rope2d'"),
    ("model__position__theta", 0.0, "model.position.theta = 0.0 must be above 0"),
    ("model__pattern", ((), (("position.ratio", 2.0),)), "model.position.ratio = 2.0 must be at most 1"),
])  # fmt: skip
def test_positions_that_mean_nothing_are_refused(field, value, says):
    with pytest.raises(UserError) as refused:
        lab_model.abstract(tiny.config(**{field: value}).model)
    assert says in str(refused.value)


def test_fourier_codes_need_an_even_width():
    with pytest.raises(UserError, match=r"model.dim = 15 must be even"):
        lab_model.abstract(tiny.config(model__position__name="fourier", model__dim=15).model)
