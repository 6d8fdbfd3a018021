import jax
import numpy as np
import pytest
import tiny

from lab.coordinates import Coordinates
from lab.evaluate import conditions as lab_conditions
from lab.train.loop import Stopped

TEXTS = tiny.texts(16, seed=5)


def evaluated(config, model, texts, mesh=None, stop=lambda: False):
    return list(lab_conditions.evaluate(config, "loss", model, texts, mesh or tiny.mesh(), stop=stop))


def one_by_one(model, texts) -> list[np.ndarray]:
    """Nats of each label of each text, a text at a time: one branch, alone in its row."""
    forward = jax.jit(lambda tokens, coordinates: jax.nn.log_softmax(model(tokens, coordinates)))
    found = []
    for text in texts:
        padded = np.zeros((1, 8), np.int32)
        padded[0, : len(text)] = text
        at = Coordinates.single(1, 8)
        segment = np.where(np.arange(8) < len(text), 0, -1)[None].astype(np.int32)
        log_p = forward(padded, Coordinates(segment, at.branch, at.time, at.index))[0]
        found.append(np.array([-log_p[i, text[i + 1]] for i in range(len(text) - 1)], np.float64))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["all_branches", "own_branch"])
def test_the_loss_at_one_branch_is_that_of_each_text_alone_weighted_by_tokens(rule):
    config = tiny.config(model__rule=rule, evaluate__loss__branches=(1,))
    model = tiny.model(config)
    nats = one_by_one(model, TEXTS)
    expected = np.concatenate(nats).mean()
    assert abs(expected - np.mean([n.mean() for n in nats])) > 1e-3  # a mean of means would be seen
    (condition,) = evaluated(config, model, TEXTS)
    assert condition.value == 1 and condition.tokens == sum(len(text) - 1 for text in TEXTS)
    assert condition.loss == pytest.approx(expected, rel=1e-5)


def test_branches_that_see_nothing_of_each_other_lose_nothing():
    """own_branch, and angles that depend on differences within a branch: every count must give the loss of one."""
    counts = (1, 2, 4, 8, 16)
    config = tiny.config(model__rule="own_branch", model__position__ratio=1.0, evaluate__loss__branches=counts)
    config.evaluate.loss.update(texts_per_row=16, rows=1)
    conditions = evaluated(config, tiny.model(config), TEXTS)
    assert [c.value for c in conditions] == list(counts)
    assert len({c.tokens for c in conditions}) == 1
    np.testing.assert_allclose([c.loss for c in conditions], conditions[0].loss, rtol=1e-5)


def test_branches_that_see_each_other_change_the_loss_and_not_the_labels():
    config = tiny.config(evaluate__loss__branches=(1, 4))
    one, four = evaluated(config, tiny.model(config), TEXTS)
    assert one.tokens == four.tokens and abs(one.loss - four.loss) > 1e-3


def test_batches_of_unequal_size_weigh_by_token():
    """One row of short texts and one of long ones, in calls of their own."""
    texts = [text[:2] if i < 8 else text for i, text in enumerate(tiny.texts(16, seed=6, longest=6))]
    config = tiny.config(evaluate__loss__branches=(1,))
    config.evaluate.loss.update(rows=1)
    model = tiny.model(config)
    (condition,) = evaluated(config, model, texts)
    assert condition.loss == pytest.approx(np.concatenate(one_by_one(model, texts)).mean(), rel=1e-5)


def test_a_mesh_changes_nothing():
    config = tiny.config()
    model = tiny.model(config)
    one, many = (evaluated(config, model, TEXTS, mesh) for mesh in (tiny.mesh(), tiny.mesh(data=2)))
    for a, b in zip(one, many, strict=True):
        assert (a.value, a.tokens) == (b.value, b.tokens)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)


def test_a_stop_is_answered_within_a_condition():
    config, calls = tiny.config(), iter([False, True])
    config.evaluate.loss.rows = 1
    with pytest.raises(Stopped):
        evaluated(config, tiny.model(config), TEXTS, stop=lambda: next(calls))
