"""Loss and accuracy are means over all labelled tokens, whatever the batches they come in."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lab.config
from lab import model
from lab.coordinates import Coordinates
from lab.data import Batch
from lab.evaluate import asks, conditions
from lab.model import mesh
from lab.train import step
from lab.train.loop import Stopped


@given(seed=st.integers(0, 2**32), labelled=st.floats(0, 1))
def test_one_call_against_numpy(seed, labelled):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 7, 5)).astype(np.float32)
    labels = np.where(rng.random((2, 7)) < labelled, rng.integers(5, size=(2, 7)), -1)
    batch = Batch(np.zeros((2, 7), np.int32), labels, Coordinates.single(2, 7))
    nats, right, tokens = step.evaluation_step(lambda tokens, coordinates: logits, batch)
    asked = [(row, label) for row, label in zip(logits.reshape(-1, 5), labels.ravel(), strict=True) if label >= 0]
    wanted = [np.log(np.exp(row.astype(np.float64)).sum()) - row[label] for row, label in asked]
    np.testing.assert_allclose(nats, sum(wanted), rtol=1e-5)
    assert right == sum(max(range(5), key=row.__getitem__) == label for row, label in asked)
    assert tokens == len(asked)


@pytest.fixture
def config():
    config = lab.config.base()
    config.model.update(dict(dim=8, layers=1, vocabulary=40))
    config.model.mixer.update(dict(heads=2, kv_heads=1, head_dim=4))
    config.model.feedforward.width = 8
    config.run.implementation = "reference"
    config.data.update(dict(corpus="copy", text_length=20, texts_per_row=1, rows=8))
    config.evaluate.loss = asks.ask("difficulty", texts=24, rows=8, difficulties=(2, 7))
    return config


@pytest.mark.slow
def test_conditions_are_weighted_by_tokens_over_all_batches(config):
    net = model.build(config.model, jax.random.key(0), config.run)
    sizes = np.random.default_rng(0).integers(0, 9, 40)  # bytes that each id stands for
    options = dict(stop=lambda: False, bytes_of_ids=sizes)
    found = list(conditions.evaluate(config, "loss", net, None, mesh.make(config.run.mesh), **options))
    assert [condition.value for condition in found] == [2, 7]
    for condition in found:
        batches = list(asks.ASKS["difficulty"].batches(config, config.evaluate.loss, None, condition.value))
        tokens, labels = (np.concatenate([getattr(b, name) for b in batches]) for name in ("tokens", "labels"))
        answers = np.argmax(net(tokens, Coordinates.single(*tokens.shape)), axis=-1)
        assert condition.accuracy == pytest.approx(np.mean(answers[labels >= 0] == labels[labels >= 0]))
        assert condition.tokens == 24 * condition.value
        assert condition.loss > 0 and condition.bytes == sizes[labels[labels >= 0]].sum()


def test_one_executable_serves_every_condition(config, monkeypatch):
    shapes = []
    compiled = conditions.compiled.evaluation_step

    def counted(model, batch, mesh):
        shapes.append(batch.tokens.shape)
        return compiled(model, batch, mesh)

    monkeypatch.setattr(conditions.compiled, "evaluation_step", counted)
    net = model.build(config.model, jax.random.key(0), config.run)
    assert (
        len(list(conditions.evaluate(config, "loss", net, None, mesh.make(config.run.mesh), stop=lambda: False))) == 2
    )
    assert shapes == [(8, 20)]


def test_a_stop_is_answered(config):
    net = model.build(config.model, jax.random.key(0), config.run)
    with pytest.raises(Stopped):
        next(conditions.evaluate(config, "loss", net, None, mesh.make(config.run.mesh), stop=lambda: True))
