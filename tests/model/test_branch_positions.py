"""Positions that tell branches apart, against a network in float64 whose angles and codes are written out here."""

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy_layers import normed, weights
from numpy_network import Network

from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.model import codes, position
from lab.study.define import plan, resolve

SCHEMES = {
    "same start": dict(model__position__name="rope2d", model__position__ratio=0.0, model__position__unselected="time"),
    "rope2d": dict(model__position__name="rope2d", model__position__unselected="time"),
    "sequential": dict(model__position__name="sequential"),
    "fourier": dict(model__position__name="fourier"),
    "learned-branch": dict(model__position__name="learned-branch", model__position__branches=4),
}
RULES = ("all_branches", "own_branch")


def built(scheme: str, **overrides):
    made = tiny.config(**SCHEMES[scheme] | overrides)
    return made, tiny.model(made, seed=4)


def angle_of(scheme: str, branch: int, time: int, p: int, F: int, position) -> float:
    """Of pair p of F, for one token."""
    speed = position.theta ** (-p / F)
    if scheme == "sequential":
        return (branch * position.stride + time) * speed
    chosen = p - (F - round(F * position.ratio)) if scheme == "rope2d" else -1
    return (branch * position.stride if chosen >= 0 and chosen % 2 == 0 else time) * speed


def code_of(scheme: str, branch: int, model, dim: int) -> np.ndarray:
    """What the embedding of one token is given besides."""
    if scheme == "fourier":
        waves = [branch / 10_000 ** (2 * i / dim) for i in range(dim // 2)]
        return np.sqrt(2 / dim) * np.array([*np.sin(waves), *np.cos(waves)])
    return weights(model.code.table)[branch] if scheme == "learned-branch" else np.zeros(dim)


class Told(Network):
    """A row of a plain model under one of the schemes."""

    def __init__(self, scheme: str, config, model, at):
        super().__init__(config, model, at)
        self.model, F = model, config.mixer.head_dim // 2
        tokens = [(int(b), int(t)) for b, t in zip(at.branch, at.time, strict=True)]
        self.turn_TF = np.exp([[1j * angle_of(scheme, *bt, p, F, config.position) for p in range(F)] for bt in tokens])
        self.code_TD = np.array([code_of(scheme, b, model, config.dim) for b, _ in tokens])

    def rotated(self, x_THK):
        F = x_THK.shape[-1] // 2
        z_THF = (x_THK[..., :F] + 1j * x_THK[..., F:]) * self.turn_TF[:, None]
        return np.concatenate([z_THF.real, z_THF.imag], -1)

    def q(self, i: int, n_TD):
        return self.rotated(np.tensordot(n_TD, weights(self.block.mixer.q)[i], 1))

    def k(self, i: int, n_TGD):
        return self.rotated(self.of_groups(n_TGD, weights(self.block.mixer.k)[i]))

    def logits(self, tokens_T) -> np.ndarray:
        embedding_CD = weights(self.model.embedding)
        x_TD = embedding_CD[tokens_T] + self.code_TD
        for i in range(self.L):
            x_TD = self.layer(i, x_TD)
        return normed(x_TD, weights(self.model.norm.weight), self.eps) @ embedding_CD.T


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_against_float64_in_any_order_of_memory(scheme, rule):
    made, model = built(scheme, model__rule=rule)
    batch, forward = tiny.batch(seed=5), jax.jit(lambda tokens, at: model(tokens, at))
    found = np.asarray(forward(batch.tokens, batch.coordinates))
    for row, (tokens_T, logits_TC) in enumerate(zip(np.asarray(batch.tokens), found, strict=True)):
        at = batch.coordinates.map(lambda x, row=row: np.asarray(x)[row])
        real = at.segment >= 0
        expected_TC = Told(scheme, made.model, model, at).logits(tokens_T)
        np.testing.assert_allclose(logits_TC[real], expected_TC[real], atol=5e-4)
    shuffled = np.random.default_rng(6).permutation(found.shape[1])
    moved = jax.tree.map(lambda x: jnp.asarray(x)[:, shuffled], (batch.tokens, batch.coordinates))
    real = moved[1].segment >= 0
    np.testing.assert_allclose(forward(*moved)[real], found[:, shuffled][real], atol=5e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_number_of_another_branch_shows_unless_masks_alone_tell(scheme):
    """Branches 1 and 2 change numbers, under a rule that shows them to each other."""
    _, model = built(scheme)
    batch = tiny.batch(seed=5)
    tokens, at = batch.tokens, batch.coordinates
    other = np.where(at.branch == 1, 2, np.where(at.branch == 2, 1, at.branch)).astype(np.int32)
    forward = jax.jit(lambda at: model(tokens, at))
    changed = jnp.abs(forward(Coordinates(at.segment, other, at.time, at.index)) - forward(at))[at.segment >= 0]
    assert (float(changed.max()) < 1e-4) == (scheme == "same start")


def test_branches_that_lie_one_after_another_are_one_text_with_gaps():
    """Where what is seen does not depend on the branch, stride * branch + time is all there is."""
    _, model = built("sequential", model__rule="causal", model__position__stride=7)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (1, 12)).astype(np.int32)
    zeros, index = np.zeros((1, 12), np.int32), np.arange(12, dtype=np.int32)[None]
    branch, time = index // 5, index % 5
    forward = jax.jit(lambda branch, time: model(tokens, Coordinates(zeros, branch, time, index)))
    np.testing.assert_allclose(forward(branch, time), forward(zeros, 7 * branch + time), atol=2e-4)


def test_a_branch_without_a_vector_is_refused_and_nan_where_it_is_traced():
    _, model = built("learned-branch")
    at = Coordinates(*(np.array([row], np.int32) for row in ([0, 0, 0, -1], [0, 4, 5, 9], [0, 1, 1, 0], [0, 1, 2, 3])))
    says = r"a token is of branch 5, beyond model.position.branches = 4: .* fewer branches, or at least 5"
    with pytest.raises(UserError, match=says):
        model.code(at)
    lost = np.isnan(jax.jit(model.code.__call__)(at))
    assert lost[0, 2].all() and not lost[0, [0, 1, 3]].any()


def test_vectors_of_branches_and_of_the_prompt_are_drawn_as_embeddings_are():
    made = tiny.config(model__position__name="learned-branch", model__position__branches=200)
    table_RD = codes.LearnedBranchCode(made.model, jax.random.key(0)).table[...]
    assert table_RD.shape == (201, 16) and np.std(table_RD) == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize(("data", "asked", "says"), [
    ({}, (1, 2), None),
    (dict(draw="1-4", texts_per_row=10), (1, 2), r"data.draw = '1-4', slots = 0: a token may be of branch 4, beyond"),
    (dict(slots=5), (1, 2), r"data.draw = '1-3', slots = 5: a token may be of branch 5, beyond model.position.bra"),
    ({}, (1, 4), r"evaluate.loss.branches: a token may be of branch 4, beyond model.position.branches = 3"),
], ids=str)  # fmt: skip
def test_branches_beyond_the_vectors_are_refused_before_a_study_runs(data, asked, says):
    made = tiny.config(model__position__name="learned-branch", model__position__branches=3)
    made.data.update(data)
    made.evaluate.loss.branches = asked
    if says is None:
        return plan.check(*resolve.resolve(made))
    with pytest.raises(UserError, match=says):
        plan.check(*resolve.resolve(made))


def test_a_request_of_more_branches_than_vectors_is_refused():
    model = built("learned-branch")[1]
    engine = decoding.engine(model)
    number = engine.submit([1, 2], branches=4, most_tokens=2, further=1)
    with pytest.raises(UserError, match=r"of branch 5, beyond model.position.branches = 4"):
        engine.submit([1, 2], branches=5, most_tokens=2)
    engine.step()
    with pytest.raises(UserError, match=r"of branch 5, beyond model.position.branches = 4"):
        engine.fork(number, 1)


def test_a_map_of_times_is_refused_where_a_pair_turns_by_more():
    with pytest.raises(UserError, match=r"turn by time and branch at once under model.position.name = 'sequential'"):
        position.check(tiny.config(model__position__name="sequential", model__position__map__name="rerope",
                                   model__position__trained=8).model)  # fmt: skip
