"""Random combinations of the options of an architecture: each builds, sees nothing later, learns and is counted.

COMBINATIONS=200 python -m pytest tests/model/test_combinations.py       # CI draws 10
"""

import os

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from lab.coordinates import Coordinates
from lab.data import Batch
from lab.errors import UserError
from lab.model import parameter, spec
from lab.model.branch import BRANCHES
from lab.model.feedforward import FEEDFORWARDS
from lab.model.init import INITIALISERS
from lab.model.mixers import MIXERS
from lab.model.norm import NORMS
from lab.model.parametrization import PARAMETRIZATIONS
from lab.model.placement import PLACEMENTS
from lab.model.position import POSITIONS
from lab.options import leaves
from lab.train import step

T = 12
CHOICES = {
    "mixer.name": [*MIXERS], "mixer.kv_heads": [1, 2, 4], "mixer.bias": ["none", "qkv", "all"],
    "mixer.qk_norm": [False, True], "mixer.qk_norm_over": ["head", "heads"], "mixer.softcap": [0.0, 2.0],
    "mixer.sink": [False, True], "mixer.output_gate": [False, True],
    "feedforward.name": [*FEEDFORWARDS], "feedforward.bias": [False, True],
    "norm.name": [*NORMS], "norm.bias": [False, True], "placement.name": [*PLACEMENTS],
    "branch.name": [*BRANCHES], "init.name": [*INITIALISERS], "parametrization.name": [*PARAMETRIZATIONS],
    "position.name": [*POSITIONS], "position.share": [0.5, 1.0], "stream.name": ["plain", "parallel", "parallel-two"],
    "tied": [False, True], "embedding_scale": [1.0, 3.0], "logit_softcap": [0.0, 5.0],
    "rule": ["causal", "causal & window(3)", "causal & strided(3)", "causal & fixed(4, 1)"],
    "pattern": [((),), ((("rule", "causal & window(2)"),), ())],
}  # fmt: skip


def config(chosen: dict):
    """That of the options, but for those that the others leave unread."""
    made = tiny.config()
    model = made.model
    model.position.ratio, model.position.stride = 0.0, 128
    model.position.theta = 1e4
    for field, value in chosen.items():
        tiny.set_field(model, field, value)
    declared, read = spec.MODEL.declared(), set().union(*spec.read_by_layers(model))
    for field in leaves(model):
        if field not in read:
            tiny.set_field(model, field, declared[field].default)
    if model.mixer.name in ("s1", "gta", "s3", "mla") and not POSITIONS[model.position.name].frequencies:
        model.mixer.v_head_dim = 12 if "mixer.v_head_dim" in read else 0
    elif "position.dim" in read and model.mixer.name != "s2":
        model.position.dim = 4
    for field, size in (("mixer.latent", 12), ("position.length", T), ("position.clip", 2)):
        if field in read:
            tiny.set_field(model, field, size)
    return made


def looked_at(model, tokens_BT, batch: Batch):
    """Logits of tokens, and the loss and its gradient of a batch."""
    loss, grads = step.accumulated_gradient(model, batch, 0.0, 1)
    return model(tokens_BT, Coordinates.single(*tokens_BT.shape)), loss, grads


LOOK = jax.jit(looked_at)


@pytest.mark.long
@pytest.mark.slow
@settings(max_examples=int(os.environ.get("COMBINATIONS", 10)), suppress_health_check=list(HealthCheck))
@given(chosen=st.fixed_dictionaries({field: st.sampled_from(values) for field, values in CHOICES.items()}))
def test_any_combination_is_built_counted_and_learns_and_sees_nothing_later(chosen):
    made = config(chosen)
    try:
        spec.check(made.model)
    except UserError as refused:  # what means nothing together says so, in one line
        assert "\n" not in str(refused) and "model." in str(refused)
        reject()
    model, rng = tiny.model(made), np.random.default_rng(0)
    assert parameter.count(model) == sum(closed_forms.parameters(made.model))
    tokens_BT = rng.integers(0, tiny.VOCABULARY, (2, T)).astype(np.int32)
    tokens_BT[1] = tokens_BT[0]
    tokens_BT[1, 7:] = (tokens_BT[0, 7:] + 1) % tiny.VOCABULARY
    labels_BT = np.where(rng.random((2, T)) < 0.8, np.roll(tokens_BT, -1, 1), -1)
    batch = Batch(jnp.asarray(tokens_BT), jnp.asarray(labels_BT), Coordinates.single(2, T).map(jnp.asarray))
    logits_BTC, loss, grads = LOOK(model, jnp.asarray(tokens_BT), batch)
    assert np.isfinite(float(loss))
    np.testing.assert_allclose(logits_BTC[1, :7], logits_BTC[0, :7], rtol=1e-4, atol=1e-5)  # what comes later differs
    assert np.abs(np.asarray(logits_BTC[1, 7:] - logits_BTC[0, 7:])).max() > 1e-3
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, jax.tree_util.keystr(path)
