import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lab import model as lab_model
from lab.errors import UserError
from lab.model import parameter
from lab.study.open import open as open_study
from lab.train import optimizer
from lab.train.optimizer import Numbers


def decayed(name: str, x: int, left: int, train) -> float:
    """The rate x steps after a warm-up, of `left` in all, in plain Python."""
    peak, final = train.learning_rate, train.final_learning_rate
    if name == "constant":
        return peak
    if name == "cosine":
        return final + (peak - final) * (1 + math.cos(math.pi * x / left)) / 2
    if name == "linear":
        return peak + (final - peak) * x / left
    if name == "wsd":
        cooling = max(round(train.cooldown * train.steps), 1)
        done = (x - max(left - cooling, 0)) / cooling
        done = min(max(done, 0), 1)
        return peak + (final - peak) * (done if train.cooldown_shape == "linear" else math.sqrt(done))
    if name == "exponential":
        return peak ** (1 - x / left) * final ** (x / left)
    raise KeyError(f"give the formula of the schedule {name} here")


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
@settings(max_examples=30)
@given(
    steps=st.sampled_from([1, 2, 7, 60]),
    warmup=st.floats(0, 1),
    rates=st.tuples(st.floats(1e-5, 1), st.floats(0, 1)),
    cooldown=st.floats(0, 1),
    shape=st.sampled_from(["linear", "sqrt"]),
)
def test_schedules_against_their_formulas(name, steps, warmup, rates, cooldown, shape):
    train = tiny.config().train
    train.update(schedule=name, steps=steps, warmup=round(warmup * steps), cooldown=cooldown)
    train.cooldown_shape = shape
    train.update(learning_rate=rates[0], final_learning_rate=rates[0] * rates[1])
    assume(name != "exponential" or rates[1] > 1e-9)  # to nothing is refused, below
    assume(name != "wsd" or train.warmup + round(cooldown * steps) <= steps)  # others are refused, below
    rising = [rates[0] * (step + 1) / train.warmup for step in range(train.warmup)]
    left = steps - train.warmup
    expected = rising + [decayed(name, x, left, train) for x in range(left)]
    made = optimizer.schedule(train)
    assert made.shape == (steps,) and made.dtype == np.float32
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6 * rates[0])


def test_the_published_schedule_begins_at_its_peak_and_ends_a_step_short_of_its_end():
    train = tiny.config().train
    train.update(learning_rate=5.5e-4, final_learning_rate=5e-5, warmup=0, steps=16_000)
    rates = optimizer.schedule(train)
    assert rates[0] == np.float32(5.5e-4) and rates[-1] == pytest.approx(5e-5, rel=1e-4)
    assert (np.diff(rates) <= 0).all()


OF_ADAMW = {"adamw.b1": 0.9, "adamw.b2": 0.95, "adamw.eps": 1e-3}
OWN_NUMBERS = {
    "adamw": OF_ADAMW,
    "muon": OF_ADAMW | {"muon.momentum": 0.95, "muon.adam_rate": 0.25, "muon.adam_decay": 0.01},
    "lion": {"lion.b1": 0.9, "lion.b2": 0.99},
    "adafactor": {"adafactor.decay_rate": 0.8, "adafactor.clipping": 1.0, "adafactor.eps": 1e-30},
    "ademamix": {"ademamix.b1": 0.9, "ademamix.b2": 0.95, "ademamix.b3": 0.9999, "ademamix.alpha": 5.0,
                 "ademamix.eps": 1e-8},
    "adopt": {"adopt.b1": 0.9, "adopt.b2": 0.9999, "adopt.eps": 1e-6},
    "schedule_free_adamw": {"schedule_free_adamw.b1": 0.9, "schedule_free_adamw.b2": 0.95,
                            "schedule_free_adamw.eps": 1e-8},
}  # fmt: skip


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_every_step_has_its_rate_and_the_other_numbers_of_the_config(name):
    train = tiny.config(train__weight_decay=0.03, train__z_loss=0.5, train__optimizer=name).train
    train.muon.adam_rate = 0.25
    numbers = [optimizer.numbers_by_step(train)(step) for step in range(train.steps)]
    np.testing.assert_array_equal([n["learning_rate"] for n in numbers], optimizer.schedule(train))
    assert all(type(x) is np.float32 for x in numbers[0].values())
    fixed = {field: x for field, x in numbers[3].items() if field != "learning_rate"}
    given = {"weight_decay": 0.03, "clip": 1.0, "z_loss": 0.5} | OWN_NUMBERS[name]
    assert fixed == {field: np.float32(x) for field, x in given.items()}
    assert optimizer.ones(name).keys() == numbers[0].keys()


def adamw(weights, gradients, decays, rates, n: Numbers) -> list[np.ndarray]:
    """Clipped AdamW as the papers write it (arXiv 1412.6980, algorithm 1; 1711.05101, algorithm 2), in float64."""
    weights, (b1, b2, eps) = [np.float64(w) for w in weights], (n[f"adamw.{name}"] for name in ("b1", "b2", "eps"))
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    for t, (rate, step) in enumerate(zip(rates, gradients, strict=True), 1):
        norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in step))
        for i, g in enumerate(step):
            g = np.float64(g) * min(1.0, n["clip"] / norm)
            first[i] = b1 * first[i] + (1 - b1) * g
            second[i] = b2 * second[i] + (1 - b2) * g**2
            move = first[i] / (1 - b1**t) / (np.sqrt(second[i] / (1 - b2**t)) + eps)
            weights[i] = weights[i] - rate * (move + n["weight_decay"] * decays[i] * weights[i])
    return weights


@pytest.mark.parametrize("decay", ["declared", "all"])
def test_adamw_against_numpy(decay):
    rng = np.random.default_rng(0)
    trainable = parameter.split(tiny.model(tiny.config(model__tied=False)))[1]
    leaves, structure = jax.tree.flatten(trainable)
    rates, steps = [0.1, 0.02, 0.3, 0.05], 4
    gradients = [[rng.normal(size=x.shape).astype(np.float32) * s for x in leaves] for s in (0.001, 1.0, 0.1, 10.0)]
    numbers = {"weight_decay": 0.2, "adamw.b1": 0.8, "adamw.b2": 0.9, "adamw.eps": 1e-3, "clip": 1.5, "z_loss": 0.0}

    @jax.jit
    def update(weights, state, gradient, rate):
        transformation = optimizer.transformation("adamw", decay, numbers | {"learning_rate": rate}, weights)
        updates, state = transformation.update(gradient, state, weights)
        return jax.tree.map(jnp.add, weights, updates), state

    state, weights = (
        optimizer.transformation("adamw", decay, numbers | {"learning_rate": 0.0}, trainable).init(trainable),
        trainable,
    )
    for rate, gradient in zip(rates, gradients, strict=True):
        weights, state = update(weights, state, jax.tree.unflatten(structure, gradient), rate)

    is_norm = ["norm" in jax.tree_util.keystr(path) for path, _ in jax.tree.flatten_with_path(trainable)[0]]
    assert 0 < sum(is_norm) < len(is_norm)
    decays = [decay == "all" or not norm for norm in is_norm]
    expected = adamw(leaves, gradients, decays, rates[:steps], numbers)
    for got, wanted in zip(jax.tree.leaves(weights), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6)


def test_matrices_decay_and_scales_do_not():
    trainable = parameter.split(lab_model.abstract(tiny.config(model__tied=False).model))[1]
    for path, decays in jax.tree.flatten_with_path(parameter.decay_mask(trainable))[0]:
        assert decays == ("norm" not in jax.tree_util.keystr(path)), path
    assert all(jax.tree.leaves(parameter.decay_mask(trainable, everything=True)))


@pytest.mark.parametrize(("field", "value", "says"), [
    ("optimizer", "adam", "did you mean 'adamw'"),
    ("schedule", "cosin", "did you mean 'cosine'"),
    ("decay", "none", "choose one of: declared, all"),
    ("steps", 0, "train.steps = 0 must be at least 1"),
    ("warmup", 7, "train.warmup = 7 must lie in 0..train.steps = 6"),
    ("warmup", -1, "train.warmup = -1 must be at least 0"),
    ("cooldown", 0.5,
     "train.cooldown = 0.5 means nothing beside train.schedule = 'cosine'; choose 0.2, or one of: "
     "train.schedule = 'wsd'"),
    ("cooldown_shape", "sqrt", "train.cooldown_shape = 'sqrt' means nothing beside train.schedule = 'cosine'"),
    ("clip", 0.0, "train.clip = 0.0 must be above 0"),
    ("learning_rate", -1e-3, "train.learning_rate = -0.001 must be at least 0"),
    ("final_learning_rate", 4e-3, "train.final_learning_rate = 0.004 is above train.learning_rate = 0.003: the rate "
     "would rise; choose at most that, or train.schedule = 'constant'"),
    ("learning_rate", 1e-4, "train.final_learning_rate = 0.0003 is above train.learning_rate = 0.0001"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(field, value, says):
    train = tiny.config().train
    train[field] = value
    with pytest.raises(UserError) as refused:
        optimizer.check(train)
    assert says in str(refused.value)


@pytest.mark.parametrize("final", [0.0, 1e-40])
def test_a_rate_that_falls_by_a_factor_does_not_fall_to_nothing(final):
    train = tiny.config(train__schedule="exponential", train__final_learning_rate=final).train
    with pytest.raises(UserError, match=f"train.final_learning_rate = {final}: no factor of a step leads there"):
        optimizer.check(train)


@pytest.mark.slow
@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1))
def test_what_cools_down_ends_a_step_short_of_its_last_rate_or_is_refused(steps, warmup, cooldown):
    train = tiny.config(train__schedule="wsd", train__cooldown=cooldown).train
    train.update(steps=steps, warmup=round(warmup * steps), final_learning_rate=0.0)
    cooling = round(cooldown * steps)
    if train.warmup + cooling > steps:
        with pytest.raises(UserError, match=r"begins within train\.warmup = .*: the rate would never reach its last"):
            optimizer.check(train)
        return
    optimizer.check(train)
    if cooling:
        assert optimizer.schedule(train)[-1] == pytest.approx(train.learning_rate / cooling, rel=1e-4)


def test_a_tuned_peak_below_the_last_rate_is_refused_before_anything_runs():
    made = tiny.config()
    made.study.update(name="tiny", tune=(("train.learning_rate", (1e-4, 1e-3)),))
    with pytest.raises(UserError, match=r"train.final_learning_rate = 0.0003 is above train.learning_rate = 0.0001"):
        open_study(made)
