"""A method that does nothing is refused by name, and one that breaks its promise; those that keep it are scored."""

import functools

import numpy as np
import pytest
import test_long
import tiny

from lab.errors import UserError
from lab.evaluate import asks, conditions, reached
from lab.train.step import Scored

L = test_long.L
TRAINED = ("position.trained", L)


@functools.cache
def model():
    return tiny.model(test_long.config_of())


def scored(*overrides):
    config = test_long.config_of(model=(TRAINED, *overrides), lengths=(11,), stride=0, rows=2, documents=2)
    asks.check(config)
    return list(conditions.evaluate(config, "long", model(), test_long.texts(), tiny.mesh(), stop=lambda: False))


@pytest.mark.parametrize(
    "overrides",
    [
        (("position.map.name", "hybrid"), ("position.map.cf", 2.0)),
        (("position.scaling.name", "linear"), ("position.scaling.factor", 2.0)),
        (("position.map.name", "lm-infinite"),),
        (("position.log_n", True),),
    ],
    ids=lambda overrides: str(overrides[0][1]),
)
def test_methods_that_act_are_scored(overrides):
    (one,) = scored(*overrides)
    assert np.isfinite(one.loss)


def test_a_method_that_does_nothing_is_refused():
    with pytest.raises(UserError, match=r"evaluate.long.model sets .*factor = 1.0, and logits beyond .* = 6 move by 0"):
        scored(("position.scaling.name", "linear"), ("position.scaling.factor", 1.0))


def test_a_method_that_breaks_its_promise_is_refused(monkeypatch):
    monkeypatch.setitem(reached.EXACT, "rerope", lambda position: L)
    with pytest.raises(UserError, match=r"which is to leave the first 6 tokens as they are, and moves their logits by"):
        scored(("position.map.name", "rerope"), ("position.map.window", 2))


def test_a_method_is_not_asked_within_L():
    with pytest.raises(UserError, match=r"evaluate.long.lengths end at 6, within the 6 tokens"):
        asks.check(test_long.config_of(model=(TRAINED, ("position.log_n", True)), lengths=(6,), stride=0))


@pytest.mark.parametrize(
    ("overrides", "promised"),
    [
        ((("position.map.name", "hybrid"),), L),
        ((("position.map.name", "hybrid"), ("position.log_n", True)), L),
        ((("position.map.name", "rerope"), ("position.map.window", 3)), 3),
        ((("position.map.name", "hybrid"), ("position.scaling.name", "linear"), ("position.scaling.factor", 2.0)), 0),
        ((("position.theta", 7.0),), 0),
    ],
)
def test_what_is_promised(overrides, promised):
    config = test_long.config_of(model=(TRAINED, *overrides))
    changed = asks.remodelled(config, config.evaluate.long)
    assert reached.exact(changed.model, config.model) == promised


def test_layers_that_keep_their_positions_promise_all_and_a_changed_one_nothing():
    """Of a model whose every second layer has a window, stretched in the others alone."""
    config = test_long.config_of(model=(TRAINED, ("position.map.name", "hybrid")))
    window, kept = ("rule", "causal & window(4)"), ("position.map.name", "none")
    config.model.pattern = ((window,), ())
    for pattern, promised in ((((kept,), ()), L), (((("rule", "causal & window(5)"), kept), ()), 0)):
        config.evaluate.long.model = (TRAINED, ("position.map.name", "hybrid"), ("pattern", pattern))
        assert reached.exact(asks.remodelled(config, config.evaluate.long).model, config.model) == promised


def passed(seed=0, inside=0.0, beyond=0.0):
    rng = np.random.default_rng(seed)
    top, nats = rng.random((2, 12)) * 10, rng.random((2, 12))
    top[0, 3] += inside
    nats[1, 7] += beyond
    return Scored(nats, nats < 0, top)


@pytest.mark.parametrize(
    ("inside", "beyond", "compute", "told"),
    [
        (0, 1e-2, "float32", None), (1e-5, 1e-2, "float32", None), (1e-3, 1e-2, "float32", "moves their logits"),
        (0, 1e-5, "float32", "never reached"), (0, 0, "float32", "never reached"), (1e-3, 5, "bfloat16", None),
        (0, 1e-2, "bfloat16", "never reached"),
    ],
)  # fmt: skip
def test_tolerances(inside, beyond, compute, told):
    arguments = "x", passed(), passed(inside=inside, beyond=beyond), np.ones((2, 12), bool), L, L, compute
    if told is None:
        reached.judge(*arguments)
    else:
        with pytest.raises(UserError, match=told):
            reached.judge(*arguments)


def test_padding_and_what_is_not_promised_are_not_looked_at():
    real = np.ones((2, 12), bool)
    real[0, 3] = False
    reached.judge("x", passed(), passed(inside=1.0, beyond=1.0), real, L, L, "float32")
    reached.judge("x", passed(), passed(inside=1.0, beyond=1.0), np.ones((2, 12), bool), 0, L, "float32")
