"""Adapters against the closed form W + (alpha / rank) A B in float64, and what a partial model keeps of a whole one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import variants

from lab import model as lab_model
from lab.errors import UserError
from lab.model import lora, parameter
from lab.model.lora import A, B
from lab.train import partition, step
from lab.train.partition import Partition

RANK, ALPHA = 3, 5.0
KEY = jax.random.key(7)
# Heads before and behind, latents, two entries of a pattern, weights of a stream beside those of layers.
SHAPES = ("default", "low rank, everything rotates", "mixer mla", "local : global", "stream v4m1E")


def lora_of(*targets: str) -> Partition:
    return Partition(RANK, ALPHA, targets, ())


def weights(model) -> dict[str, np.ndarray]:
    return {".".join(path): np.asarray(v.get_raw_value()) for path, v in parameter.by_parts(model).items()}


def generic(model, seed: int = 0):
    """A partial model whose adapters are random numbers."""
    rng = np.random.default_rng(seed)
    structure, trainable, rest = parameter.split(model)
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), trainable)
    return parameter.nnx.merge(structure, drawn, rest)


def closed_form(a: np.ndarray, b: np.ndarray, layers: int, shape: tuple[int, ...]) -> np.ndarray:
    """(alpha / rank) A B of each layer, float64, in the shape of the weight."""
    a, b = (x.astype(np.float64).reshape(layers, *sides) for x, sides in ((a, (-1, RANK)), (b, (RANK, -1))))
    return ALPHA / RANK * np.stack([of @ by for of, by in zip(a, b, strict=True)]).reshape(shape)


@pytest.fixture(scope="module", params=variants.marked(SHAPES, fast=("default",)))
def model(request):
    return tiny.model(variants.config(request.param))


def test_at_the_start_it_is_the_same_model_to_the_bit(model):
    """The same weights in the same structure: so the same program on the same numbers."""
    made = partition.parted(model, lora_of(), KEY)
    assert partition.is_partial(made) and not partition.is_partial(model)
    again = partition.whole(made)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, again, model)
    assert all(np.any(w) for name, w in weights(made).items() if name.endswith(A))
    assert partition.whole(model) is model


def test_merged_is_the_closed_form_and_frozen_weights_stay(model):
    made = generic(partition.parted(model, lora_of(), KEY))
    before, beside, after = weights(model), weights(made), weights(lora.merged(made))
    adapted = [name.removesuffix(A) for name in beside if name.endswith(A)]
    matrices = [".".join(path) for path, v in parameter.by_parts(model).items() if lora.is_matrix(v)]
    assert sorted(adapted) == sorted(matrices) and len(adapted) > 5
    assert {*after} == {*before}
    axes = {".".join(path): v.get_metadata().get("axes") for path, v in parameter.by_parts(model).items()}
    for name, weight in before.items():
        np.testing.assert_array_equal(beside[name], weight)
        added = 0.0
        if name in adapted:
            layers = int(np.prod(weight.shape[: weight.ndim - len(axes[name])]))
            added = closed_form(beside[name + A], beside[name + B], layers, weight.shape)
            assert np.abs(added).max() > 0.1
        np.testing.assert_allclose(after[name], weight.astype(np.float64) + added, rtol=1e-5, atol=1e-5)


def test_only_adapters_are_trained_and_what_they_lie_beside_is_theirs():
    model = tiny.model(tiny.config())
    made = partition.parted(model, lora_of("q", "feedforward"), KEY)
    trained = {name for path, name in zip(parameter.by_parts(made), weights(made), strict=True) if path[0] == "blocks"}
    trained = {name for name in trained if name.endswith((A, B))}
    assert trained == {
        f"blocks.0.{name}{side}" for name in ("mixer.q", "feedforward.gate", "feedforward.up", "feedforward.down")
        for side in (A, B)
    }  # fmt: skip
    shapes = {name: weights(made)[f"blocks.0.{name}"].shape for name in ("mixer.q" + A, "mixer.q" + B)}
    assert shapes == {"mixer.q" + A: (2, 16, RANK), "mixer.q" + B: (2, RANK, 4, 8)}
    assert parameter.count(made) == sum(weights(made)[name].size for name in trained)
    alone = partition.parted(model, lora_of("q"), KEY)  # A is drawn the same, whatever else is adapted
    np.testing.assert_array_equal(weights(alone)["blocks.0.mixer.q" + A], weights(made)["blocks.0.mixer.q" + A])


def test_an_adapter_of_a_matrix_is_laid_out_stacked_and_decays_as_it_is():
    made = partition.parted(tiny.model(tiny.config()), lora_of(), KEY)
    of = {".".join(path): v for path, v in parameter.by_parts(made).items()}
    sizes = dict(data=1, fsdp=2, tensor=2, context=1)
    for name, spec_a, spec_b in (
        ("mixer.q", (None, "fsdp", None), (None, None, "tensor", None)),
        ("mixer.o", (None, "tensor", None, None), (None, None, "fsdp")),
    ):
        a, b = of[f"blocks.0.{name}{A}"], of[f"blocks.0.{name}{B}"]
        assert tuple(parameter.partition_spec(a, sizes)) == spec_a
        assert tuple(parameter.partition_spec(b, sizes)) == spec_b
        assert a.get_metadata()["decay"] and b.get_metadata()["decay"]


def test_the_gradient_of_adapters_is_that_of_the_closed_form():
    """Through the loss of a training step: dA = s dW B^T and dB = s A^T dW, dW of the merged, whole model."""
    config = tiny.config(model__layers=1)
    made, batch = generic(partition.parted(tiny.model(config), lora_of("mixer", "down"), KEY)), tiny.batch()
    gradient = jax.jit(lambda model: step.accumulated_gradient(model, batch, 0.0, 1))
    loss, grads = gradient(made)
    whole_loss, whole_grads = gradient(partition.whole(made))
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-5)
    named = {".".join(parameter.parts(path)).removesuffix(".value"): np.asarray(g, np.float64)
             for tree in (grads, whole_grads) for path, g in jax.tree_util.tree_leaves_with_path(tree)}  # fmt: skip
    beside = weights(made)
    adapted = [name.removesuffix(A) for name in beside if name.endswith(A)]
    assert len(adapted) == 5 and len(jax.tree.leaves(grads)) == 10
    for name in adapted:
        a, b = (beside[name + side].astype(np.float64) for side in (A, B))
        dw = named[name].reshape(a[0].size // RANK, -1)
        da, db = dw @ b[0].reshape(RANK, -1).T, a[0].reshape(-1, RANK).T @ dw
        for side, expected in ((A, da), (B, db)):
            expected = ALPHA / RANK * expected.reshape(beside[name + side].shape)
            np.testing.assert_allclose(named[name + side], expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


def test_frozen_parts_are_named_on_their_paths_and_thaw_again():
    model = tiny.model(tiny.config())
    made = partition.parted(model, Partition(0, 1.0, (), ("embedding", "feedforward", "q")), KEY)
    frozen = {".".join(p) for p, v in parameter.by_parts(made).items() if isinstance(v, parameter.Frozen)}
    assert frozen == {"embedding"} | {
        f"blocks.0.{name}" for name in ("mixer.q", "feedforward.gate", "feedforward.up", "feedforward.down")
    }
    assert parameter.count(made) == parameter.count(model) - sum(weights(model)[name].size for name in frozen)
    again = partition.whole(made)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, again, model)


ONCE = dict(checkpoint="somewhere")


@pytest.mark.parametrize(("fields", "told"), [
    (dict(model__lora__alpha=3.0), "model.lora.alpha = 3.0 means nothing beside model.lora.rank = 0; choose 16.0"),
    (dict(model__lora__rank=2, model__lora__targets=("query",), **ONCE),
     "a name in model.lora.targets = 'query' is unknown; choose one of: .*mixer.* q, "),
    (dict(train__freeze=("embeding",), **ONCE), "a name in train.freeze = 'embeding' is unknown .did you mean 'embed"),
    (dict(model__lora__rank=2, train__freeze=("embedding",), **ONCE), "means nothing beside model.lora.rank = 2"),
    (dict(train__freeze=("blocks", "embedding", "norm"), **ONCE), "leaves nothing to train; name fewer"),
    (dict(model__lora__rank=2, train__steps=0, **ONCE), "means nothing beside train.steps = 0"),
    (dict(model__lora__rank=2, model__parametrization__name="mup", **ONCE), "has no rates under model.parametrization"),
    (dict(model__lora__rank=-1), "model.lora.rank = -1 must be at least 0"),
    (dict(model__pattern=((("lora.rank", 3),),)), "a field of model.pattern = 'lora.rank' is unknown"),
])  # fmt: skip
def test_parts_that_cannot_be_are_refused_in_one_line(fields, told):
    with pytest.raises(UserError, match=told) as error:
        config = tiny.config(**fields)
        lab_model.spec.check(config.model)
        partition.check(config)
    assert "\n" not in str(error.value)


def test_what_is_planned_counts_what_is_trained():
    """FLOPs: 6 for each number of a matrix that is trained, 4 for one through which gradients pass alone."""
    config = tiny.config(**ONCE)
    model = lab_model.abstract(config.model)
    matrices = {".".join(path): v.get_raw_value().size for path, v in parameter.by_parts(model).items()
                if lora.is_matrix(v)}  # fmt: skip
    head = tiny.VOCABULARY * config.model.dim
    config.model.lora.rank, config.model.lora.targets = RANK, ("q",)
    every = sum(matrices.values()) + head
    assert partition.without_gradient(partition.abstract(config)) == every - matrices["blocks.0.mixer.q"]
    config.model.lora.rank, config.model.lora.targets, config.train.freeze = 0, (), ("feedforward",)
    frozen = sum(size for name, size in matrices.items() if "feedforward" in name)
    assert partition.without_gradient(partition.abstract(config)) == frozen
