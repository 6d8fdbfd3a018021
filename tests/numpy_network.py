"""A network's sublayers in float64 numpy, for streams to combine, and what is checked of a stream with them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from numpy_layers import normed, placed, swiglu, turned, weights

from lab import model as lab_model
from lab.data import Batch
from lab.kernels import reference, rules
from lab.model import parameter, position
from lab.model.streams import hyper, laurel, muddformer, v4_tokens
from lab.model.transformer import Block

LENGTH = 24
COMPILED = [  # what streams put together, and weights that they infer for it: compiled once for all streams
    (owner, name, jax.jit(getattr(owner, name), static_argnames=static))
    for owner, name, static in [
        (Block, "mix", ()),
        (Block, "feed", ()),
        (hyper.Hyper, "__call__", ()),
        (hyper.Constrained, "__call__", ()),
        (laurel.Augmented, "__call__", ()),
        (muddformer.DynamicWeights, "__call__", ()),
        (v4_tokens.InferredWeights, "__call__", ()),
        (reference, "attend", ("rule", "scale", "softcap")),
        (reference, "attend_scores", ("rule", "softcap")),
    ]
]


class Network:
    """The sublayers of a model on one row. x: the stream at a layer's input; n: what the placement makes of it."""

    def __init__(self, config, model, at):
        self.config, self.block, self.stream, self.at = config, model.blocks[0], model.stream, at
        self.seen_TS = np.asarray(rules.visible(rules.parse(config.rule), at, at))
        self.d, self.eps, self.name, self.L = config.mixer.head_dim, config.norm.eps, config.stream.name, config.layers

    def n1(self, i: int, x_TD):
        return placed(self.block.mixer_placement, "input", i, x_TD, self.config)

    def q(self, i: int, n_TD) -> np.ndarray:
        return turned(np.tensordot(n_TD, weights(self.block.mixer.q)[i], 1), self.at, self.config)

    def k(self, i: int, n_TGD) -> np.ndarray:
        return turned(self.of_groups(n_TGD, weights(self.block.mixer.k)[i]), self.at, self.config)

    def v(self, i: int, n_TGD) -> np.ndarray:
        return self.of_groups(n_TGD, weights(self.block.mixer.v)[i])

    def of_groups(self, n, weight_DGK) -> np.ndarray:
        """[T, G, K], of one input for all groups or one for each."""
        G = weight_DGK.shape[1]
        return np.stack([(n if n.ndim == 2 else n[:, g]) @ weight_DGK[:, g] for g in range(G)], axis=1)

    def to_heads(self, x_SGK) -> np.ndarray:
        return np.repeat(x_SGK, self.config.mixer.heads // self.config.mixer.kv_heads, axis=1)

    def scores(self, q_THK, k_SGK) -> np.ndarray:
        """q k^T [H, T, S], each group's keys for all of its heads."""
        return np.einsum("thk,shk->hts", q_THK, self.to_heads(k_SGK))

    def own_scores(self, i: int, x_TD) -> np.ndarray:
        """l_i."""
        n_TD = self.n1(i, x_TD)
        return self.scores(self.q(i, n_TD), self.k(i, n_TD))

    def softmax(self, z_HTS) -> np.ndarray:
        p_HTS = np.where(self.seen_TS, np.exp(z_HTS), 0)
        return p_HTS / np.maximum(p_HTS.sum(-1, keepdims=True), 1e-300)

    def P(self, i: int, x_TD) -> np.ndarray:
        """Ordinary attention probabilities."""
        return self.softmax(self.own_scores(i, x_TD) / np.sqrt(self.d))

    def output(self, i: int, P_HTS, v_SGV) -> np.ndarray:
        """What the stream is given of attention, of its probabilities and values."""
        y_TD = np.einsum("hts,shv,hvd->td", P_HTS, self.to_heads(v_SGV), weights(self.block.mixer.o)[i])
        return placed(self.block.mixer_placement, "output", i, y_TD, self.config)

    def drawn(self, i: int, P_HTS, x_TD) -> np.ndarray:
        """P (n1(x) W_V) W_O, placed."""
        return self.output(i, P_HTS, self.v(i, self.n1(i, x_TD)))

    def attention(self, i: int, x_TD) -> np.ndarray:
        return self.drawn(i, self.P(i, x_TD), x_TD)

    def mlp(self, i: int, h_TD) -> np.ndarray:
        placement = self.block.feedforward_placement
        y_TD = swiglu(self.block.feedforward, i, placed(placement, "input", i, h_TD, self.config))
        return placed(placement, "output", i, y_TD, self.config)

    def layer(self, i: int, x_TD) -> np.ndarray:
        """An ordinary layer."""
        h_TD = x_TD + self.attention(i, x_TD)
        return h_TD + self.mlp(i, h_TD)


class Double(NamedTuple):
    """A model in float64: what it gave, and the gradient of `objective`, a function of the model."""

    config: object
    model: object
    batch: Batch
    logits: np.ndarray
    gradient: object
    objective: object


def drawn(made):
    """A model with generic weights in float64 numpy, of one kind of layer."""
    structure, trainable, table = parameter.split(lab_model.abstract(made.model, made.run))
    found = position.frequencies(made.model)
    exact = np.stack([found[n] for n in ("index", "branch", "time")])
    model = nnx.merge(structure, tiny.drawn(trainable, seed=2), jax.tree.map(lambda _: exact, table))
    model.compute = jnp.dtype("float64")
    return model


def double(made) -> Double:
    model = drawn(made)
    batch = tiny.batch(2, length=LENGTH)
    real = (batch.coordinates.segment >= 0)[..., None]
    pull = np.random.default_rng(0).normal(size=(2, LENGTH, tiny.VOCABULARY)) * real

    def objective(model):
        logits = model(batch.tokens, batch.coordinates)
        return jnp.sum(pull * logits), logits

    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(objective, has_aux=True))
        (_, logits), gradient = jax.device_get(run(model))
    assert logits.dtype == np.float64
    return Double(made.model, model, batch, logits, gradient, lambda model: run(model)[0][0])


def check_stream(made, formula) -> None:
    """What the head reads, of layers that run op by op over the parts that are COMPILED, with reference attention.

    formula: a function (network, embedding of a row) to that.
    """
    made.run.implementation = "reference"
    model, batch = drawn(made), tiny.batch(2, length=LENGTH)
    x_BTD = weights(model.embedding)[batch.tokens]
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        for part in COMPILED:
            patch.setattr(*part)
        view = model.views(batch.coordinates, batch.coordinates)[0]
        state = model.stream.start(jnp.asarray(x_BTD), None)
        for m in range(model.layers):
            block = jax.tree.map(lambda w, m=m: w[m], model.blocks[0])
            state, _ = model.stream.layer(state, block, view, None, m=m)
        got_BTD, _ = model.stream.finish(state)
    assert got_BTD.dtype == np.float64
    for got_TD, x_TD, net in zip(got_BTD, x_BTD, networks(made.model, model, batch), strict=True):
        real = net.at.segment >= 0
        np.testing.assert_allclose(got_TD[real], formula(net, x_TD)[real], rtol=1e-6, atol=1e-6)


def networks(config, model, batch: Batch) -> list[Network]:
    """Of each row."""
    return [Network(config, model, batch.coordinates.map(lambda x, b=b: x[b])) for b in range(len(batch.tokens))]


def check_logits(got: Double, formula) -> None:
    """Of the whole model as it is compiled, with the attention that it has by itself."""
    model = got.model
    for logits, tokens, net in zip(got.logits, got.batch.tokens, networks(got.config, model, got.batch), strict=True):
        real, x_TD = net.at.segment >= 0, formula(net, weights(model.embedding)[tokens])
        expected = normed(x_TD, weights(model.norm.weight), net.eps) @ weights(model.embedding).T
        np.testing.assert_allclose(logits[real], expected[real], rtol=1e-6, atol=1e-6)


def check_gradients(got: Double) -> None:
    """Along random directions: of all weights, and of those of the stream alone."""
    rng = np.random.default_rng(3)
    trainable, grads = (parameter.split(x)[1] for x in (got.model, got.gradient))
    structure, _, rest = parameter.split(got.model)
    named = jax.tree_util.tree_leaves_with_path(trainable)
    of_stream = ["stream" in jax.tree_util.keystr(path) for path, _ in named]
    for chosen in [[True] * len(named)] + [of_stream] * any(of_stream):
        along = [rng.normal(size=x.shape) * c for (_, x), c in zip(named, chosen, strict=True)]
        along = jax.tree.unflatten(jax.tree.structure(trainable), along)

        def moved(by: float, along=along):
            there = jax.tree.map(lambda w, step: w + by * step, trainable, along)
            with jax.enable_x64(True):
                return float(got.objective(nnx.merge(structure, there, rest)))

        difference = (moved(1e-7) - moved(-1e-7)) / 2e-7
        exact = sum(np.sum(g * v) for g, v in zip(jax.tree.leaves(grads), jax.tree.leaves(along), strict=True))
        assert exact == pytest.approx(difference, rel=1e-5, abs=1e-4)
        assert abs(exact) > 1e-3
