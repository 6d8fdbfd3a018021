"""Muon against its definition in numpy, float64, matrix by matrix and head by head."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import variants
from optax.contrib import MuonDimensionNumbers

from lab.errors import UserError
from lab.model import mesh as lab_mesh
from lab.model import parameter
from lab.train import checkpoint, compiled, muon, optimizer, step
from lab.train.optimizer import Numbers
from lab.train.step import Program

JORDAN, FINE = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
COEFFICIENTS = {"5": [JORDAN] * 5, "8+2": [JORDAN] * 8 + [FINE] * 2}
FACTORS = {
    "moonlight": lambda d_in, d_out: 0.2 * max(d_in, d_out) ** 0.5,
    "keller-jordan": lambda d_in, d_out: max(1.0, d_out / d_in) ** 0.5,
    "mup": lambda d_in, d_out: (d_out / d_in) ** 0.5,
}
NUMBERS = {
    "learning_rate": 0.1, "weight_decay": 0.2, "clip": 1.5, "z_loss": 0.0,
    "adamw.b1": 0.8, "adamw.b2": 0.9, "adamw.eps": 1e-3,
    "muon.momentum": 0.9, "muon.adam_rate": 0.3, "muon.adam_decay": 0.4,
}  # fmt: skip
COMPILED_IN = ("muon.scaling", "muon.steps", "muon.per_head", "muon.on")

# Weights of every shape: (shape, logical axes, the roles of these: inputs and outputs, h for heads).
PROJECTIONS = {
    "q": ((12, 3, 4), ("embed", "heads", "head_dim"), "i ho"),
    "kv": ((12, 2, 4), ("embed", "kv_heads", "head_dim"), "i ho"),
    "one_head": ((12, 1, 4), ("embed", "kv_heads", "head_dim"), "i ho"),
    "o": ((3, 4, 12), ("heads", "head_dim", "embed"), "hi o"),
    "to_latent": ((12, 5), ("embed", "latent"), "i o"),
    "from_latent": ((5, 3, 4), ("latent", "heads", "head_dim"), "i ho"),
    "of_each_head": ((12, 3), ("embed", "heads"), "i o"),  # one number a head: no matrix to split off
    "up": ((12, 20), ("embed", "ffn"), "i o"),
    "down": ((20, 12), ("ffn", "embed"), "i o"),
}
REST = ("embedding", "norm", "offset")
MODEL_ROLES = {"q": "i ho", "k": "i ho", "v": "i ho", "o": "hi o", "gate": "i o", "up": "i o", "down": "i o"}


def splits(per_head: str, roles: str) -> bool:
    """Whether the heads of a weight are taken apart."""
    inputs, _ = roles.split()
    return "h" in roles and (per_head == "all" or (per_head == "qkv" and "h" not in inputs))


def matrices(weight, roles: str, split: bool) -> np.ndarray:
    """float64 [N, d_in, d_out]: one for each stacked layer, or for each head of each."""
    inputs, outputs = roles.split()
    weight = np.asarray(weight, np.float64)
    layers = weight.reshape(-1, *weight.shape[weight.ndim - len(inputs + outputs) :])
    if split:
        heads = np.moveaxis(layers, 1 + (inputs + outputs).index("h"), 1)
        return heads.reshape(-1, *heads.shape[2:])
    return layers.reshape(len(layers), math.prod(layers.shape[1 : 1 + len(inputs)]), -1)


def newton_schulz(matrix: np.ndarray, coefficients) -> np.ndarray:
    """Towards U V' of the singular value decomposition U S V'."""
    x = matrix / (np.linalg.norm(matrix) + 1e-8)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def reference(weights, gradients, n: Numbers, coefficients, factor):
    """Muon with Nesterov momentum, its bias corrected; weights and gradients [steps] of matrices [N, d_in, d_out]."""
    first, momentum = np.zeros_like(weights), n["muon.momentum"]
    for t, g in enumerate(gradients, 1):
        first = momentum * first + (1 - momentum) * g
        ahead = momentum * first / (1 - momentum ** (t + 1)) + (1 - momentum) * g / (1 - momentum**t)
        moves = np.stack([newton_schulz(matrix, coefficients) for matrix in ahead])
        weights = weights - n["learning_rate"] * (factor(*weights.shape[1:]) * moves + n["weight_decay"] * weights)
    return weights


def clipped(gradients: list[dict], most: float) -> list[dict]:
    """Each step's gradients, scaled to a global norm of `most` at most."""
    norms = [math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in g.values())) for g in gradients]
    return [
        {k: np.float64(x) * min(1.0, most / n) for k, x in g.items()} for g, n in zip(gradients, norms, strict=True)
    ]


@functools.cache
def parameters(layers: int):
    """Every projection beside an embedding, a scale and a bias, float32; stacked unless `layers` is 0."""

    def made(key):
        projections = {
            name: parameter.matrix(key, shape, axes, inputs=len(roles.split()[0]))
            for name, (shape, axes, roles) in PROJECTIONS.items()
        }
        rest = parameter.embedding(key, (7, 12)), parameter.scale(12), parameter.bias(3, axis="heads", value=0.5)
        return projections | dict(zip(REST, rest, strict=True))

    with jax.enable_x64(False):
        keys = jax.random.split(jax.random.key(0), max(layers, 1))
        return jax.vmap(made)(keys) if layers else made(keys[0])


def drawn(trainable, steps: int, seed: int = 0) -> list:
    """Gradients of very different sizes, so that some are clipped."""
    rng = np.random.default_rng(seed)
    draw = lambda size: jax.tree.map(lambda x: jnp.asarray(size * rng.normal(size=x.shape), x.dtype), trainable)  # noqa: E731
    return [draw(size) for size in (0.01, 1.0, 0.1)[:steps]]


def updated(trainable, gradients, options=(), numbers: Numbers = NUMBERS, name: str = "muon"):
    """The parameters after a step with each of the gradients, and the state. options: of COMPILED_IN, in order."""

    @jax.jit
    def update(weights, state, gradient):
        updates, state = make().update(gradient, state, weights)
        return jax.tree.map(jnp.add, weights, updates), state

    static = tuple(zip(COMPILED_IN, options, strict=False))
    make = functools.partial(optimizer.transformation, name, "declared", numbers, trainable, static)
    state, weights = make().init(trainable), trainable
    for gradient in gradients:
        weights, state = update(weights, state, gradient)
    return weights, state


def in_float64(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@pytest.mark.slow
@pytest.mark.matrix("per_head")
@pytest.mark.parametrize("layers", [pytest.param(0, marks=pytest.mark.slow), 2], ids=["one layer", "stacked"])
@pytest.mark.parametrize("per_head", parameter.PER_HEAD)
@pytest.mark.parametrize(("scaling", "steps"), [("moonlight", "8+2"), ("keller-jordan", "5"), ("mup", "8+2")])
def test_every_projection_moves_as_in_numpy(scaling, steps, per_head, layers):
    """Three steps in float64. moonlight with five steps: see the compiled step below."""
    with jax.enable_x64(True):
        trainable = in_float64(parameters(layers))
        gradients = drawn(trainable, steps=3)
        got, _ = updated(trainable, gradients, (scaling, steps, per_head, ()))
    used = clipped([{k: np.asarray(v[...]) for k, v in g.items()} for g in gradients], NUMBERS["clip"])
    for name, (_, _, roles) in PROJECTIONS.items():
        cut = functools.partial(matrices, roles=roles, split=splits(per_head, roles))
        weights = cut(trainable[name][...])
        wanted = reference(weights, [cut(g[name]) for g in used], NUMBERS, COEFFICIENTS[steps], FACTORS[scaling])
        np.testing.assert_allclose(cut(got[name][...]), wanted, rtol=1e-9, atol=1e-9, err_msg=name)


def test_the_tables_are_those_of_the_reference():
    assert muon.STEPS.keys() == COEFFICIENTS.keys() and muon.SCALINGS.keys() == FACTORS.keys()
    assert {*parameter.PER_HEAD} == {"none", "qkv", "all"}


@pytest.mark.slow
@pytest.mark.parametrize("per_head", ["none", "all"])
def test_singular_values_come_near_one(per_head):
    """About 0.7 to 1.2 after five steps, less where they were next to nothing; at one after the 8 + 2."""
    momentum_only = NUMBERS | {"learning_rate": 1.0, "weight_decay": 0.0}
    trainable = jax.tree.map(jnp.zeros_like, parameters(2))
    for steps, (low, high) in {"5": (0.4, 1.3), "8+2": (0.99, 1.01)}.items():
        got, _ = updated(trainable, drawn(trainable, 1), ("keller-jordan", steps, per_head, ()), momentum_only)
        for name, (_, _, roles) in PROJECTIONS.items():
            moved = matrices(got[name][...], roles, splits(per_head, roles))
            values = np.linalg.svd(moved / FACTORS["keller-jordan"](*moved.shape[1:]), compute_uv=False)
            assert (values > low).all() and (values < high).all(), (name, steps, values.min(), values.max())


@pytest.mark.slow
@pytest.mark.parametrize("on", [(), ("q", "down")], ids=["every matrix", "q and down"])
def test_the_rest_follows_adamw_with_its_own_rate_and_decay(on):
    trainable = parameters(2)
    gradients = drawn(trainable, steps=3)
    got, _ = updated(trainable, gradients, ("moonlight", "5", "none", on))
    rate, decay = NUMBERS["learning_rate"] * NUMBERS["muon.adam_rate"], NUMBERS["muon.adam_decay"]
    of_adamw = NUMBERS | {"learning_rate": rate, "weight_decay": decay}
    expected, _ = updated(trainable, gradients, numbers=of_adamw, name="adamw")
    rest = [name for name in trainable if name in REST or (on and name not in on)]
    for name in trainable:
        close = np.allclose(got[name][...], expected[name][...], rtol=1e-5, atol=1e-6)
        assert close == (name in rest), name


@pytest.mark.slow
def test_heads_apart_are_not_the_whole():
    trainable = parameters(2)
    gradients = drawn(trainable, steps=1)
    moved = {p: updated(trainable, gradients, ("moonlight", "5", p, ()))[0] for p in parameter.PER_HEAD}
    differs = lambda a, b: {k for k in trainable if not np.allclose(moved[a][k][...], moved[b][k][...], atol=1e-3)}  # noqa: E731
    assert differs("none", "qkv") == {"q", "kv", "from_latent"}
    assert differs("none", "all") == {"q", "kv", "from_latent", "o"}
    assert differs("qkv", "all") == {"o"}


def test_dimensions_of_a_model_come_from_its_declarations():
    trainable = parameter.split(tiny.model(variants.config("local : global", model__tied=False)))[1]
    is_dimensions = lambda x: x is None or isinstance(x, MuonDimensionNumbers)  # noqa: E731
    found = {p: {} for p in parameter.PER_HEAD}
    for per_head, sides in found.items():
        dimensions = parameter.muon_dimensions(trainable, per_head)
        for path, x in jax.tree_util.tree_leaves_with_path(dimensions, is_leaf=is_dimensions):
            sides.setdefault(path[-2].key, set()).add(x)
    plain = {name: {((-2,), (-1,))} for name in ("gate", "up", "down")}
    plain |= {name: {None} for name in ("embedding", "head", "weight")}
    whole, apart = {((-3,), (-2, -1))}, {((-3,), (-1,))}
    assert found["none"] == plain | {"q": whole, "k": whole, "v": whole, "o": {((-3, -2), (-1,))}}
    assert found["qkv"] == plain | {"q": apart, "k": apart, "v": apart, "o": {((-3, -2), (-1,))}}
    assert found["all"] == plain | {"q": apart, "k": apart, "v": apart, "o": {((-2,), (-1,))}}


def by_name(tree) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.slow
@pytest.mark.parametrize("per_head", ["qkv", *(pytest.param(one, marks=pytest.mark.slow) for one in ("none", "all"))])
def test_a_training_step_moves_every_matrix_of_a_model_as_in_numpy(per_head):
    """The compiled step, in float32, on layers stacked two and one deep."""
    config = variants.config("local : global", train__clip=0.5, train__weight_decay=0.1)
    config.train.update(dict(optimizer="muon", learning_rate=0.05, warmup=0, muon=dict(per_head=per_head)))
    program, batch = Program.of(config), tiny.batch()
    state = step.initial_state(tiny.model(config), program)
    before = by_name(parameter.split(state.model)[1])
    _, gradient = jax.jit(functools.partial(step.accumulated_gradient, z_loss=0.0, microbatches=1))(state.model, batch)
    numbers = optimizer.numbers_by_step(config.train)(0)
    state, _ = jax.jit(step.train_step, static_argnames="program")(state, numbers, batch, program)
    after, used = by_name(parameter.split(state.model)[1]), clipped([by_name(gradient)], 0.5)[0]

    names = [name for name in before if name.rpartition(".")[2] in MODEL_ROLES]
    assert len(names) == 2 * len(MODEL_ROLES)
    for name in names:
        roles = MODEL_ROLES[name.rpartition(".")[2]]
        cut = functools.partial(matrices, roles=roles, split=splits(per_head, roles))
        wanted = reference(cut(before[name]), [cut(used[name])], numbers, COEFFICIENTS["5"], FACTORS["moonlight"])
        np.testing.assert_allclose(cut(after[name]), wanted, rtol=1e-4, atol=1e-5, err_msg=name)


def muon_config(**overrides):
    return tiny.config(train__optimizer="muon", **overrides)


def placed_state(config, mesh):
    state = step.initial_state(tiny.model(config), Program.of(config))
    return jax.device_put(state, parameter.shardings(state, mesh))


def after_a_step(config, mesh):
    """(model's weights by name, optimizer's state by name)"""
    state, numbers = placed_state(config, mesh), optimizer.numbers_by_step(config.train)(3)
    batch = lab_mesh.place(tiny.batch(rows=8, length=32), mesh)
    state, _ = compiled.train_step(state, numbers, batch, Program.of(config), mesh)(state, numbers, batch)
    return by_name(parameter.split(state.model)[1]), by_name(state.optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("per_head", ["all", pytest.param("none", marks=pytest.mark.slow)])
def test_a_step_is_the_same_on_a_mesh(per_head):
    config = muon_config(train__muon__per_head=per_head)
    one, many = (after_a_step(config, tiny.mesh(**mesh)) for mesh in ({}, dict(data=2, fsdp=2, tensor=2)))
    for got, wanted in zip(many, one, strict=True):
        assert got.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-3, atol=5e-5, err_msg=name)


@pytest.mark.slow
def test_momentum_lies_over_the_mesh_as_its_weight():
    config = muon_config()
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    state = compiled.initial_state(config, Program.of(config), mesh)
    q, embedding = state.model.blocks[0].mixer.q, state.model.embedding
    assert q.addressable_shards[0].data.shape == (2, 8, 2, 8)
    for weight, moments in ((q, 1), (embedding, 2)):
        found = [x for x in jax.tree.leaves(state.optimizer) if x.shape == weight.shape]
        assert len(found) == moments and all(m.sharding == weight.sharding for m in found)


@pytest.mark.slow
def test_a_checkpoint_brings_back_the_state_on_another_mesh(tmp_path):
    config = muon_config(train__muon__steps="8+2")
    saved, like = (placed_state(config, tiny.mesh(**mesh)) for mesh in (dict(fsdp=2, tensor=2), {}))
    rng = np.random.default_rng(0)
    saved = saved._replace(
        optimizer=jax.tree.map(lambda x: jnp.asarray(rng.integers(1, 9, x.shape), x.dtype), saved.optimizer)
    )
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(checkpoint.Position(1, 10), saved)
    checkpoints.wait()
    _, found = checkpoints.restore(like)
    checkpoints.close()
    assert jax.tree.structure(found.optimizer) == jax.tree.structure(saved.optimizer)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.optimizer), jax.device_get(saved.optimizer))


@pytest.mark.slow
def test_members_of_a_stack_have_their_own_numbers():
    configs = [muon_config(), muon_config(train__muon__momentum=0.5, train__muon__adam_rate=2.0)]
    program, mesh, batch = Program.of(configs[0]), tiny.mesh(), tiny.batch()
    numbers = [optimizer.numbers_by_step(config.train)(0) for config in configs]
    members = [step.initial_state(tiny.model(configs[0]), program) for _ in configs]
    solo = [jax.jit(step.train_step, static_argnames="program")(s, n, batch, program)[0] for s, n in zip(
        members, numbers, strict=True)]  # fmt: skip
    stack = lambda *x: jnp.stack(x)  # noqa: E731
    args = compiled.stacked(members, mesh), jax.tree.map(stack, *numbers), jax.tree.map(stack, batch, batch)
    together, _ = jax.jit(step.train_steps, static_argnames="program")(*args, program)
    for i, alone in enumerate(solo):
        got, wanted = by_name(compiled.unstacked(together, i)), by_name(alone)
        for name in wanted:
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_what_is_compiled_in_and_what_is_not():
    programs = lambda **overrides: Program.of(tiny.config(**overrides))  # noqa: E731
    adamw = Program("adamw", "declared", 1)
    assert programs(train__muon__per_head="all", train__muon__on=("q",), train__muon__momentum=0.5) == adamw
    plain = programs(train__optimizer="muon")
    numbers = dict(train__muon__momentum=0.5, train__muon__adam_rate=0.1, train__muon__adam_decay=0.0)
    assert programs(train__optimizer="muon", **numbers) == plain
    for field, value in dict(scaling="mup", steps="8+2", per_head="qkv", on=("q",)).items():
        assert programs(train__optimizer="muon", **{f"train__muon__{field}": value}) != plain


@pytest.mark.parametrize(("field", "value", "says"), [
    ("scaling", "moonligt", "train.muon.scaling = 'moonligt' is unknown (did you mean 'moonlight'?); choose one of: "
     "moonlight, keller-jordan, mup"),
    ("steps", "10", "train.muon.steps = '10' is unknown; choose one of: 5, 8+2"),
    ("per_head", "q", "train.muon.per_head = 'q' is unknown; choose one of: none, qkv, all"),
    ("momentum", 1.0, "train.muon.momentum = 1.0 must be below 1: of the gradients of matrices"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(field, value, says):
    train = muon_config().train
    train.muon[field] = value
    with pytest.raises(UserError) as refused:
        optimizer.check(train)
    assert str(refused.value) == says


@pytest.mark.parametrize(("name", "says"), [
    ("embedding", "train.muon.on = 'embedding' has no matrix; choose one of: down, gate, k, o, q, up, v"),
    ("weight", "train.muon.on = 'weight' has no matrix; choose one of: down, gate, k, o, q, up, v"),
    ("w_q", "train.muon.on = 'w_q' is unknown; choose one of: down, gate, k, o, q, up, v"),
])  # fmt: skip
def test_a_name_without_a_matrix_is_refused(name, says):
    config = muon_config(train__muon__on=("q", name))
    with pytest.raises(UserError) as refused:
        optimizer.check_parameters(config.train, config.model)
    assert str(refused.value) == says
    config.train.muon.on = ("q", "down")
    optimizer.check_parameters(config.train, config.model)
