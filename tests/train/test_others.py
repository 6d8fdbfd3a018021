"""Optimizers of optax's parts, in float64: against optax's own where a row hands numbers on, else against numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from optax import contrib
from test_loop import check_equal, run, run_until

from lab.errors import UserError
from lab.model import mesh as lab_mesh
from lab.model import parameter
from lab.train import checkpoint, compiled, optimizer, others, step
from lab.train.step import Program
from lab.train.workload import Member, Workload

NUMBERS = {"learning_rate": 0.1, "weight_decay": 0.2, "clip": math.inf, "z_loss": 0.0}
# Other than the defaults, so that each is seen to arrive.
OWN = {
    "lion": {"b1": 0.7, "b2": 0.8},
    "adafactor": {"decay_rate": 0.6, "clipping": 1.1, "eps": 1e-5},
    "ademamix": {"b1": 0.8, "b2": 0.9, "b3": 0.97, "alpha": 3.0, "eps": 1e-3},
    "adopt": {"b1": 0.8, "b2": 0.9, "eps": 0.3},
    "schedule_free_adamw": {"b1": 0.8, "b2": 0.9, "eps": 1e-3},
}
STATIC = {"adafactor": {"scaled": True, "factored_from": 4}, "ademamix": {"rising": 0}}
DECAYS = {"matrix": True, "scale": False}


def of_optax(name: str, n: dict) -> optax.GradientTransformation:
    """optax's own, given Python's floats."""
    rate, decay = NUMBERS["learning_rate"], NUMBERS["weight_decay"]
    if name == "lion":
        return optax.lion(rate, n["b1"], n["b2"], weight_decay=decay, mask=DECAYS)
    if name == "ademamix":
        return contrib.ademamix(**n, learning_rate=rate, weight_decay=decay, mask=DECAYS)
    return optax.adafactor(
        rate, 4, n["decay_rate"], clipping_threshold=n["clipping"], eps=n["eps"], weight_decay_rate=rate * decay,
        weight_decay_mask=DECAYS,
    )  # fmt: skip


def drawn(rng) -> dict[str, np.ndarray]:
    return {"matrix": rng.normal(size=(4, 5)), "scale": rng.normal(size=3)}


def declared(arrays: dict):
    """The same as parameters: a matrix that decays and a scale that does not."""
    made = {"matrix": parameter.matrix(jax.random.key(0), (4, 5), ("embed", "ffn")), "scale": parameter.scale(3)}
    return {name: made[name].replace(jnp.asarray(x)) for name, x in arrays.items()}


def numbers_of(name: str) -> dict:
    return NUMBERS | {f"{name}.{field}": value for field, value in OWN[name].items()}


def transformation(name: str, numbers, trainable, **static) -> optax.GradientTransformation:
    compiled_in = tuple((f"{name}.{field}", value) for field, value in (STATIC.get(name, {}) | static).items())
    return optimizer.transformation(name, "declared", numbers, trainable, compiled_in)


def moved(name: str, weights: dict, gradients: list[dict], **static):
    """(the weights after each step, the state after the last), every number traced."""
    trainable, numbers = declared(weights), numbers_of(name)

    @jax.jit
    def update(trainable, state, gradient, numbers):
        updates, state = transformation(name, numbers, trainable, **static).update(gradient, state, trainable)
        return jax.tree.map(jnp.add, trainable, updates), state

    state, seen = transformation(name, optimizer.ones(name), trainable, **static).init(trainable), []
    for gradient in gradients:
        trainable, state = update(trainable, state, declared(gradient), numbers)
        seen.append({key: np.asarray(v[...]) for key, v in trainable.items()})
    return seen, (state, trainable)


@pytest.fixture
def case():
    """(weights, gradients of three steps, of different sizes), with float64 on."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        yield drawn(rng), [jax.tree.map(lambda x, s=s: s * x, drawn(rng)) for s in (0.1, 1.0, 0.01)]


@pytest.mark.parametrize("name", ["lion", "adafactor", "ademamix"])
def test_a_row_hands_on_its_numbers_and_what_decays(name, case):
    weights, gradients = case
    theirs, state = of_optax(name, OWN[name]), None
    for got, gradient in zip(moved(name, weights, gradients)[0], gradients, strict=True):
        state = theirs.init(weights) if state is None else state
        updates, state = theirs.update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        for key in DECAYS:
            np.testing.assert_allclose(got[key], weights[key], rtol=1e-6, err_msg=key)


def test_adafactor_keeps_rows_and_columns_of_what_is_large_enough(case):
    weights, gradients = case
    for least, whole in ((4, 0), (5, 1)):
        _, (state, _) = moved("adafactor", weights, gradients[:1], factored_from=least)
        assert sum(x.shape == (4, 5) for x in jax.tree.leaves(state)) == whole


def test_unscaled_adafactor_moves_by_the_rate(case):
    """One step, whose mean square is that of its gradient: an update of one, in units of the weight if scaled."""
    weights, gradients = case
    scaled, unscaled = (moved("adafactor", weights, gradients[:1], scaled=x)[0][0]["scale"] for x in (True, False))
    size = np.sqrt(np.mean(weights["scale"] ** 2))
    np.testing.assert_allclose(np.abs(unscaled - weights["scale"]), 0.1, rtol=1e-2)
    np.testing.assert_allclose(scaled - weights["scale"], size * (unscaled - weights["scale"]), rtol=1e-6)


def adopt(w, gradients, n, decay: float):
    """Clipped ADOPT with decoupled decay, in numpy; the first step only fills the mean square."""
    first, second, seen = np.zeros_like(w), gradients[0] ** 2, []
    for t, g in enumerate(gradients):
        if t:
            first = n["b1"] * first + (1 - n["b1"]) * np.clip(
                g / np.maximum(np.sqrt(second), n["eps"]), -(t**0.25), t**0.25
            )
            second = n["b2"] * second + (1 - n["b2"]) * g**2
        w = w - NUMBERS["learning_rate"] * (first + decay * w)
        seen.append(w)
    return seen


def schedule_free(w, gradients, n, decay: float):
    """(where gradients are taken after each step, the mean of weights after the last), at a constant rate."""
    rate, mean, moving, second, taken = NUMBERS["learning_rate"], w, w, np.zeros_like(w), []
    for t, g in enumerate(gradients, 1):
        at = (1 - n["b1"]) * moving + n["b1"] * mean
        second = n["b2"] * second + (1 - n["b2"]) * g**2
        moving = moving - rate * (g / (np.sqrt(second / (1 - n["b2"] ** t)) + n["eps"]) + decay * at)
        mean = (1 - 1 / t) * mean + moving / t
        taken.append((1 - n["b1"]) * moving + n["b1"] * mean)
    return taken, mean


def test_adopt_against_numpy(case):
    weights, gradients = case
    seen, _ = moved("adopt", weights, gradients)
    for key, decays in DECAYS.items():
        wanted = adopt(weights[key], [g[key] for g in gradients], OWN["adopt"], decays * NUMBERS["weight_decay"])
        np.testing.assert_allclose([one[key] for one in seen], wanted, rtol=1e-6, err_msg=key)


def test_schedule_free_adamw_against_numpy_and_what_it_is_evaluated_at(case):
    weights, gradients = case
    name = "schedule_free_adamw"
    seen, (state, trainable) = moved(name, weights, gradients)
    evaluated = optimizer.evaluated(name, numbers_of(name), state, trainable)
    for key, decays in DECAYS.items():
        of_key = [g[key] for g in gradients]
        taken, mean = schedule_free(weights[key], of_key, OWN[name], decays * NUMBERS["weight_decay"])
        np.testing.assert_allclose([one[key] for one in seen], taken, rtol=1e-6, err_msg=key)
        np.testing.assert_allclose(evaluated[key][...], mean, rtol=1e-6, err_msg=key)
        assert not np.allclose(mean, taken[-1], rtol=1e-3)


def test_the_slow_mean_of_ademamix_rises(case):
    """alpha from nothing: the first step is AdamW's. The half-life of b3 grows by as much each step, from b1's."""
    weights, gradients = case
    numbers = numbers_of("ademamix") | {f"adamw.{field}": OWN["ademamix"][field] for field in ("b1", "b2", "eps")}
    trainable = declared(weights)
    adamw = optimizer.transformation("adamw", "declared", numbers, trainable)
    updates, _ = adamw.update(declared(gradients[0]), adamw.init(trainable), trainable)
    seen, _ = moved("ademamix", weights, gradients[:1], rising=4)
    for key in DECAYS:
        np.testing.assert_allclose(seen[0][key], weights[key] + updates[key][...], rtol=1e-6)
    decay = others.slow_decay(0.9, 0.9999, 10)
    half_lives = [math.log(0.5) / math.log(float(decay(t))) for t in range(13)]
    ends = [math.log(0.5) / math.log(b) for b in (0.9, 0.9999)]
    np.testing.assert_allclose(half_lives, np.interp(range(13), (0, 10), ends), rtol=1e-6)


def described(tree) -> list:
    return [jax.tree.structure(tree), *((x.shape, x.dtype) for x in jax.tree.leaves(tree))]


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_a_state_keeps_its_form_alone_stacked_over_a_mesh_and_in_a_checkpoint(name):
    """Of a matrix of stacked layers that is large enough to be factored, and of a scale."""
    make = lambda key: parameter.matrix(key, (8, 16), ("embed", "ffn"))  # noqa: E731
    trainable = {"matrix": jax.vmap(make)(jax.random.split(jax.random.key(0), 3)), "scale": parameter.scale(8)}
    config = tiny.config(train__optimizer=name)
    if name == "adafactor":
        config.train.adafactor.factored_from = 8
    static, numbers = optimizer.static_options(config.train), optimizer.numbers_by_step(config.train)(0)
    make = lambda numbers: optimizer.transformation(name, "declared", numbers, trainable, static)  # noqa: E731
    update = lambda numbers, state: make(numbers).update(trainable, state, trainable)[1]  # noqa: E731
    state = make(optimizer.ones(name)).init(trainable)
    members, of_each = jax.tree.map(lambda x: jnp.stack([x, x]), state), jax.tree.map(lambda x: jnp.ones(2), numbers)
    assert described(jax.eval_shape(update, numbers, state)) == described(state)
    assert described(jax.eval_shape(jax.vmap(update), of_each, members)) == described(members)
    for one in (state, members):
        laid = parameter.shardings(one, tiny.mesh(data=2, fsdp=2, tensor=2))
        for x, sharding in zip(jax.tree.leaves(one), jax.tree.leaves(laid), strict=True):
            sharding.shard_shape(x.shape)  # raises where it does not fit
    named = checkpoint._named(state)
    assert described(checkpoint._unnamed(named, state)) == described(state)


def newest(directory, like):
    checkpoints = checkpoint.Checkpoints(directory, keep=9)
    _, state = checkpoints.restore(like)
    checkpoints.close()
    return state


@pytest.mark.slow
def test_a_schedule_free_run_ends_at_its_mean_and_goes_on_as_if_undisturbed(tmp_path):
    config = tiny.config(train__optimizer="schedule_free_adamw", train__schedule="constant", model__layers=1)
    config.run.checkpoint.every = 4
    whole = run(tmp_path / "whole", config).trained
    run_until(tmp_path / "stopped", 4, config=config)
    state = newest(tmp_path / "stopped", whole.state)
    check_equal(run(tmp_path / "stopped", config).trained.state, whole.state)
    check_equal(newest(tmp_path / "whole", whole.state), whole.state)
    workload, mesh = Workload([Member(config, tiny.texts())]), tiny.mesh()
    for n, (batch, _) in enumerate(workload.batches(4), 4):  # the last two steps by hand
        state, _ = whole.executable(state, workload.numbers(n), lab_mesh.place(batch, mesh))
    at, moving = state.model.embedding[...], state.optimizer[1].z["embedding"][...]
    check_equal(state.optimizer, whole.state.optimizer)
    np.testing.assert_allclose(whole.state.model.embedding[...], (at - 0.1 * moving) / 0.9, rtol=1e-4, atol=1e-6)
    assert not np.allclose(whole.state.model.embedding[...], at, atol=1e-5)


def test_members_of_a_stack_have_means_of_their_own():
    numbers, weights, drawing = [], [], np.random.default_rng(0)
    for b1 in (0.9, 0.5):
        train = tiny.config(train__optimizer="schedule_free_adamw", train__schedule_free_adamw__b1=b1).train
        numbers.append(optimizer.numbers_by_step(train)(0))
        weights.append([drawing.normal(size=(4, 5)) for _ in range(2)])  # trained at, moving
    program = Program("schedule_free_adamw", "declared")
    stack = lambda *x: jnp.stack([jnp.float32(y) for y in x])  # noqa: E731
    at, moving = (parameter.bias(5).replace(stack(*pair)) for pair in zip(*weights, strict=True))
    model, z = nnx.Dict(weight=at), parameter.split(nnx.Dict(weight=moving))[1]
    state = step.State(model, (None, contrib.ScheduleFreeState(*[stack(0, 0)] * 5, z)))
    found = compiled.evaluated(state, jax.tree.map(stack, *numbers), program, tiny.mesh(), members=True)
    for got, (at, moving), b1 in zip(found.model.weight[...], weights, (0.9, 0.5), strict=True):
        np.testing.assert_allclose(got, (at - (1 - b1) * moving) / b1, rtol=1e-4, atol=1e-5)


def test_most_optimizers_are_evaluated_where_they_train():
    state = object()
    assert compiled.evaluated(state, {}, Program("adamw", "declared"), None, members=False) is state


@pytest.mark.parametrize(("field", "value", "says"), [
    ("ademamix.b3", 1.0, "train.ademamix.b3 = 1.0 must be below 1"),
    ("schedule_free_adamw.b1", 0.0, "train.schedule_free_adamw.b1 = 0.0 must be above 0"),
    ("adafactor.clipping", 0.0, "train.adafactor.clipping = 0.0 must be above 0"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(field, value, says):
    name, _, option = field.partition(".")
    train = tiny.config(train__optimizer=name).train
    train[name][option] = value
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        optimizer.check(train)
