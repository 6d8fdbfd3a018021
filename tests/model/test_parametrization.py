"""Rates, decays, scales and initial values under each parametrization, by formulas, and the coordinate check."""

import functools
import importlib.util

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lab import model as lab_model
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.model import parameter, parametrization
from lab.train import canonical, optimizer

M, DEEPER, WIDER_HEAD = 4.0, 2.0, 2.0  # tiny models in units of their base
BASE = dict(base_dim=4, base_layers=1, base_head_dim=4)
MATRICES = {"q", "k", "v", "o", "gate", "up", "down"}


def config(name: str, **overrides):
    fields = {f: size for f, size in BASE.items() if f in parametrization.PARAMETRIZATIONS[name].options}
    fields = {f"model__parametrization__{field}": size for field, size in fields.items()}
    return tiny.config(model__parametrization__name=name, model__tied=False, **fields | overrides)


def by_path(trainable) -> dict[str, object]:
    is_variable = lambda x: hasattr(x, "get_metadata")  # noqa: E731
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): v
        for path, v in jax.tree_util.tree_leaves_with_path(trainable, is_leaf=is_variable)
    }


@pytest.mark.parametrize(("name", "depth"), [("mup", 1.0), ("completep", 1.0), ("depth-mup", DEEPER**-0.5)])
def test_every_parameter_has_its_factors(name, depth):
    """Matrices learn at 1 / m and decay m times as much; everything in layers learns `depth` times as fast besides."""
    found = by_path(parameter.split(lab_model.abstract(config(name).model))[1])
    assert {path.rpartition(".")[2] for path in found} == MATRICES | {"embedding", "head", "weight"}
    for path, variable in found.items():
        inside = depth if path.startswith("blocks") else 1.0
        matrix = path.rpartition(".")[2] in MATRICES
        wanted = (inside / M, M) if matrix else (inside, 1.0)
        assert variable.get_metadata()["factors"] == pytest.approx(wanted), path


@pytest.mark.slow
@pytest.mark.parametrize("name", [one for one, row in optimizer.OPTIMIZERS.items() if row.elementwise])
def test_an_update_is_that_of_its_own_rate_and_decay(name):
    """Of a matrix, a scale and an embedding, two steps: as an optimizer with that rate and decay moves it alone."""
    rng = np.random.default_rng(0)
    made = {"matrix": parameter.matrix(jax.random.key(0), (4, 6), ("embed", "ffn")), "scale": parameter.scale(4)}
    plain = made | {"embedding": parameter.embedding(jax.random.key(1), (5, 4))}
    gradients = [{k: jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in plain.items()} for _ in range(2)]
    train = tiny.config(train__optimizer=name, train__weight_decay=0.3, train__clip=100.0).train
    numbers, static = optimizer.numbers_by_step(train)(1), optimizer.static_options(train)

    def moved(trainable, numbers):
        one, state = optimizer.transformation(name, "declared", numbers, trainable, static), None
        for gradient in gradients:
            state = one.init(trainable) if state is None else state
            given = {key: v.replace(gradient[key]) for key, v in trainable.items()}
            updates, state = one.update(given, state, trainable)
            trainable = jax.tree.map(jnp.add, trainable, updates)
        return {key: v[...] for key, v in trainable.items()}

    alone = {
        "matrix": moved(plain, numbers | {"learning_rate": numbers["learning_rate"] / 4, "weight_decay": 4 * 0.3}),
        "scale": moved(plain, numbers | {"learning_rate": numbers["learning_rate"] / 2}),
        "embedding": moved(plain, numbers),
    }
    declared = {key: v.replace(v[...]) for key, v in plain.items()}
    for key, factors in (("matrix", (1 / 4, 4.0)), ("scale", (1 / 2, 1.0))):
        declared[key].set_metadata(factors=factors)
    together = moved(declared, numbers)
    for key, wanted in alone.items():
        np.testing.assert_allclose(together[key], wanted[key], rtol=1e-6, atol=1e-7, err_msg=key)
        others = [one[key] for of, one in alone.items() if of != key]
        assert not any(np.allclose(together[key], other, rtol=1e-5, atol=1e-6) for other in others), key


def test_at_its_base_a_model_is_the_same_program():
    """depth-mup has every option that another has."""
    standard, at_its_base = (tiny.config(model__parametrization__name=name) for name in ("standard", "depth-mup"))
    for digest in (canonical.train_step, canonical.initial_state):
        assert digest(standard) == digest(at_its_base)


def both(name: str):
    """A model under the standard parametrization and under another, of the same weights; and the other's config."""
    other = config(name)
    return tiny.model(config("standard")), tiny.model(other), other


@pytest.mark.slow
@pytest.mark.parametrize(("name", "branch"), [("completep", 1 / DEEPER), ("depth-mup", DEEPER**-0.5)])
def test_outputs_of_sublayers_scores_and_logits_are_scaled(name, branch):
    standard, other, made = both(name)
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, made.model.dim)), jnp.float32)
    blocks = [jax.tree.map(lambda w: w[0], model.blocks[0]) for model in (standard, other)]
    np.testing.assert_allclose(blocks[1].feed(x_BTD), branch * blocks[0].feed(x_BTD), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other.logits(x_BTD), standard.logits(x_BTD) / M, rtol=1e-5, atol=1e-6)
    assert blocks[1].mixer.scale == pytest.approx(4**0.5 / 8) and blocks[0].mixer.scale == 8**-0.5
    blocks[1].mixer.scale = blocks[0].mixer.scale
    view = standard.views(*[tiny.batch(length=5).coordinates] * 2)[0]
    mixed = [block.mix(x_BTD, view)[0] for block in blocks]
    np.testing.assert_allclose(mixed[1], branch * mixed[0], rtol=1e-5, atol=1e-6)


def test_a_scale_of_scores_that_is_set_stands():
    made = config("mup", model__mixer__softmax_scale=0.7)
    assert lab_model.abstract(made.model).blocks[0].mixer.scale == 0.7


@pytest.mark.slow
def test_weights_are_drawn_as_at_the_base():
    """Embeddings and the head with its width, output projections with its layers; the others by their own inputs."""
    sizes = dict(model__dim=64, model__feedforward__width=96, model__mixer__heads=8, model__mixer__kv_heads=8)
    drawn = by_path(parameter.split(lab_model.build(config("completep", **sizes).model, jax.random.key(0)))[1])
    variances = dict(embedding=1 / 4, head=1 / 4, q=1 / 64, v=1 / 64, up=1 / 64, o=1 / 64 / 2, down=1 / 96 / 2)
    for path, variable in drawn.items():
        if variance := variances.get(path.rpartition(".")[2]):
            assert np.std(variable[...]) == pytest.approx(variance**0.5, rel=0.05), path


def test_a_table_of_biases_learns_alike_whether_layers_share_it():
    for shared in (True, False):
        made = config("depth-mup", model__position__name="t5", model__position__shared=shared)
        found = by_path(parameter.split(lab_model.abstract(made.model))[1])
        (table,) = (v for path, v in found.items() if path.endswith("added.table"))
        assert table.get_metadata()["factors"] == pytest.approx((DEEPER**-0.5, 1))


@pytest.mark.slow
def test_codes_of_positions_are_as_large_as_token_embeddings():
    """At the base and beyond it: a fixed code by its mean square, a learned one by its draw."""
    sizes = dict(model__dim=64, model__vocabulary=500, model__position__length=500)
    for name, overrides in (("standard", {}), ("mup", {"model__parametrization__base_dim": 4})):
        made = config(name, model__position__name="learned", **sizes | overrides)
        model = lab_model.build(made.model, jax.random.key(0))
        tokens, times = (float(jnp.std(x[...])) for x in (model.embedding, model.code.table))
        assert times == pytest.approx(tokens, rel=0.05)
        made = config(name, model__dim=64, model__position__name="sinusoidal", model__embedding_scale=3.0, **overrides)
        fixed = lab_model.build(made.model, jax.random.key(0)).code(Coordinates.single(1, 9).map(jnp.asarray))
        np.testing.assert_allclose(jnp.mean(fixed**2, axis=-1), (3.0 * tokens) ** 2, rtol=0.1)


@pytest.mark.parametrize(("overrides", "says"), [
    (dict(train__optimizer="muon"), "train.optimizer = 'muon' has no rates under model.parametrization.name = 'mup'; "
     "choose one of: adamw, lion, ademamix, adopt, or model.parametrization.name = 'standard'"),
    (dict(model__parametrization__base_layers=2), "model.parametrization.base_layers = 2 means nothing beside "
     "model.parametrization.name = 'mup'"),
    (dict(model__parametrization__name="completep", model__stream__name="v1m1"),
     "model.parametrization.name = 'completep' says nothing of the weights of model.stream.name = 'v1m1'; choose "
     "'standard', or one of the streams: plain, parallel, parallel-two"),
    (dict(model__parametrization__name="completep", model__placement__name="deepnorm"),
     "model.placement.name = 'deepnorm' depends on model.layers by itself, and model.parametrization.name = "
     "'completep' would do so again; choose 'mup' or 'standard'"),
    (dict(model__mixer__qk_norm_over="heads"), "model.mixer.qk_norm_over = 'heads' means nothing beside "
     "model.mixer.qk_norm = False; choose 'head', or model.mixer.qk_norm = True"),
])  # fmt: skip
def test_what_has_no_rule_is_refused(overrides, says):
    made = tiny.config(**dict(model__parametrization__name="mup") | overrides)
    with pytest.raises(UserError) as refused:
        lab_model.abstract(made.model)
        optimizer.check_parameters(made.train, made.model)
    assert says in str(refused.value)


@pytest.mark.slow
def test_what_steps_change_grows_with_the_width_unless_maximal_update_scales_it():
    place = commands.REPOSITORY / "benchmarks" / "coordinate_check.py"
    spec = importlib.util.spec_from_file_location("coordinate_check", place)
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    widths, grows = (32, 128), {}
    made = functools.partial(check.config_of, base=32, rate=0.01, layers=1)
    of_base = check.change(made("standard", 32), steps=3)  # and of every other parametrization, which is at its base
    for name in check.PARAMETRIZATIONS:
        wide = check.change(made(name, 128), steps=3)
        grows[name] = {of: check.exponent(widths, (of_base[of], wide[of])) for of in check.INSIDE}
    assert grows["standard"]["stream"] > 0.35 and abs(grows["mup"]["stream"]) < 0.15, grows
    assert grows["standard"]["logits"] > grows["mup"]["logits"] + 0.4 and grows["mup"]["logits"] < 0.1, grows
