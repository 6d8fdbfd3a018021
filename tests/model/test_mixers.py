"""Every mixer against its formula, one head and one query after another, in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import variants

from lab import model as lab_model
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels import rules
from lab.model import abstract, accounting, parameter, spec
from lab.model.mixers import MIXERS


def weights(variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)[0]  # of the first layer


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normed(x, norm, eps: float):
    return x if norm is None else x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weights(norm.weight)


def turn(x: np.ndarray, angle_F: np.ndarray) -> np.ndarray:
    """One vector, the end of which rotates: pairs as complex numbers."""
    F = len(angle_F)
    still, pairs = x[: len(x) - 2 * F], x[len(x) - 2 * F :]
    z = (pairs[:F] + 1j * pairs[F:]) * np.exp(1j * angle_F)
    return np.concatenate([still, z.real, z.imag])


def angles(config, at: Coordinates) -> np.ndarray:
    """[T, R / 2] at ratio 0: the index alone."""
    K = config.mixer.head_dim
    R = config.position.dim or K
    inverse = config.position.theta ** (-2 * np.arange(R // 2) / (R if config.position.table == "own" else K))
    return np.outer(at.index, inverse)


class Formula:
    """Queries, keys and values of every query head, as lists of vectors; what happens to its output."""

    def __init__(self, config, mixer, x_TD, at, seen_TS):
        self.config, self.mixer, self.x_TD, self.seen_TS = config, mixer, x_TD, seen_TS
        self.angle_TF = angles(config, at)
        asked, every = config.mixer.rotate, config.mixer.name == "s2"
        self.rotate = {"auto": "qkvo" if every else "qk", "none": ""}.get(asked, asked)

    def through(self, weight, x=None):
        return np.tensordot(self.x_TD if x is None else x, weights(weight), 1)

    def turned(self, letter: str, x_TNK):
        if letter not in self.rotate:
            return x_TNK
        return np.array([[turn(x, angle) for x in row] for row, angle in zip(x_TNK, self.angle_TF, strict=True)])

    def queries(self):
        x = self.x_TD
        if self.mixer.q_down is not None:
            x = normed(self.through(self.mixer.q_down), self.mixer.q_latent_norm, self.config.norm.eps)
        return self.turned("q", normed(self.through(self.mixer.q, x), self.mixer.q_norm, self.config.norm.eps))

    def keys_values(self):
        """Lists over query heads of [S, K] and [S, V]."""
        k_SGK, v_SGV = getattr(self, self.config.mixer.name)()
        G, H = k_SGK.shape[1], self.mixer.heads
        return [k_SGK[:, h * G // H] for h in range(H)], [v_SGV[:, h * G // H] for h in range(H)]

    def attention(self):
        k = normed(self.through(self.mixer.k), self.mixer.k_norm, self.config.norm.eps)
        return self.turned("k", k), self.turned("v", self.through(self.mixer.v))

    differential = forgetting = attention

    def mla(self):
        c_SGC = normed(self.through(self.mixer.kv_down), self.mixer.latent_norm, self.config.norm.eps)
        rope_S1R = self.turned("k", self.through(self.mixer.rope))
        H, G, k, v = self.mixer.heads, self.mixer.kv_heads, [], []
        for h in range(H):
            c_SC = c_SGC[:, h * G // H]
            k.append(np.concatenate([c_SC @ weights(self.mixer.up_k)[:, h], rope_S1R[:, 0]], -1))
            v.append(c_SC @ weights(self.mixer.up_v)[:, h])
        return np.stack(k, 1), np.stack(v, 1)

    def s1(self):
        c, r, e = (self.through(w) for w in (self.mixer.c, self.mixer.rope, self.mixer.extra))
        r = np.repeat(self.turned("k", r), c.shape[1] // r.shape[1], 1)
        return np.concatenate([c, r], -1), np.concatenate([c, self.turned("v", e)], -1)

    gta = s1

    def s2(self):
        kv = normed(self.through(self.mixer.kv), self.mixer.k_norm, self.config.norm.eps)
        return (self.turned("k", kv),) * 2

    def s3(self):
        c = normed(self.through(self.mixer.c), self.mixer.latent_norm, self.config.norm.eps)
        return np.concatenate([c, self.turned("k", self.through(self.mixer.rope))], -1), c

    def log_forget(self):
        """log f [T, H]."""
        return np.log(sigmoid(self.x_TD @ weights(self.mixer.forget) + weights(self.mixer.forget_bias)))

    def bias(self, h: int, i: int, j: int) -> float:
        """What is added to the score: for forgetting, log f of every token that i sees and j does not."""
        if self.config.mixer.name != "forgetting":
            return 0.0
        return self.log_forget()[self.seen_TS[i] & ~self.seen_TS[j], h].sum()

    def output(self):
        options = self.config.mixer
        scale = options.softmax_scale or options.head_dim**-0.5
        q_THK, (k, v) = self.queries(), self.keys_values()
        T, H = q_THK.shape[:2]
        o_THV = np.zeros((T, H, v[0].shape[-1]))
        for h in range(H):
            for i in range(T):
                there = np.flatnonzero(self.seen_TS[i])
                scores = np.array([scale * q_THK[i, h] @ k[h][j] for j in there])
                if options.softcap:
                    scores = options.softcap * np.tanh(scores / options.softcap)
                e = np.exp(scores + [self.bias(h, i, j) for j in there])
                rest = 0 if self.mixer.sink is None else np.exp(weights(self.mixer.sink)[h])
                if len(there):
                    o_THV[i, h] = e @ v[h][there] / (e.sum() + rest)
        if "o" in self.rotate:
            o_THV = np.array([[turn(x, -a) for x in row] for row, a in zip(o_THV, self.angle_TF, strict=True)])
        if self.config.mixer.name == "differential":
            share_TH = sigmoid(self.x_TD @ weights(self.mixer.subtracted))
            o_THV = o_THV[:, ::2] - share_TH[..., None] * o_THV[:, 1::2]
        if self.mixer.output_gate is not None:
            o_THV = o_THV * sigmoid(self.through(self.mixer.output_gate))
        y = np.tensordot(o_THV, weights(self.mixer.o), 2)
        return y if self.mixer.o_up is None else y @ weights(self.mixer.o_up)


def delta(config, mixer, x_TD, at: Coordinates) -> np.ndarray:
    """The recurrence itself, a token at a time."""
    silu = lambda x: x * sigmoid(x)  # noqa: E731
    unit = lambda x: x / np.sqrt((x**2).sum() + 1e-6)  # noqa: E731
    q, k, v, gate = (np.tensordot(x_TD, weights(w), 1) for w in (mixer.q, mixer.k, mixer.v, mixer.output_gate))
    fast = np.logaddexp(0, x_TD @ weights(mixer.alpha) + weights(mixer.alpha_bias))
    alpha, beta = np.exp(-np.exp(weights(mixer.alpha_log)) * fast), sigmoid(x_TD @ weights(mixer.beta))
    T, H, V = v.shape
    out_TD = np.zeros_like(x_TD)
    for h in range(H):
        state, of, branches = np.zeros((q.shape[-1], V)), None, {}
        for t in range(T):
            if at.segment[t] < 0:
                continue
            if at.segment[t] != of:
                state, of, branches = np.zeros_like(state), at.segment[t], {}
            if config.rule == "own_branch":  # each branch goes on from what the prompt, 0, has become
                state = branches.get(at.branch[t], branches.get(0, np.zeros_like(state)))
            k_t, v_t = unit(silu(k[t, h])), silu(v[t, h])
            state = alpha[t, h] * (state - beta[t, h] * np.outer(k_t, k_t @ state)) + beta[t, h] * np.outer(k_t, v_t)
            branches[at.branch[t]] = state
            o = unit(silu(q[t, h])) @ state / np.sqrt(q.shape[-1])
            out_TD[t] += normed(o, mixer.norm, config.norm.eps) * silu(gate[t, h]) @ weights(mixer.o)[h]
    return out_TD


@functools.cache
def float64_layer(variant: str, length: int, **overrides):
    """(config, mixer with generic weights, x [1, T, D], coordinates, the mixer's output), all of it in float64."""
    with jax.enable_x64(True):
        config = variants.config(variant, model__position__ratio=0.0, model__position__theta=20.0, **overrides)
        wide = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
        model = jax.tree.map(wide, tiny.model(config))
        coordinates = tiny.batch(3, rows=1, length=length).coordinates
        x_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(1, length, config.model.dim)))
        mixer = jax.tree.map(lambda w: w[0], model.blocks[0].mixer)
        view = model.views(coordinates, coordinates)[0]
        return (
            config.model,
            model.blocks[0].mixer,
            x_BTD,
            coordinates,
            jax.jit(type(mixer).__call__)(mixer, x_BTD, view)[0],
        )


SUBSETS = ["".join(c for i, c in enumerate("qkvo") if mask >> i & 1) or "none" for mask in range(16)]
EVERY = [*variants.VARIANTS, *variants.ON_RULES]


def marked(cases: list) -> list:
    """Every mixer always, its options among the slow tests."""
    fast = [("default", (("model__mixer__rotate", "qkvo"), ("model__position__dim", 4)))]
    fast += [(f"mixer {name}", ()) for name in MIXERS]
    return [pytest.param(*case, marks=[] if case in fast else pytest.mark.slow) for case in cases]


@pytest.mark.matrix("variant")
@pytest.mark.parametrize(("variant", "overrides"), marked([
    *((name, ()) for name in EVERY if name.startswith("mixer ") or " on " in name),
    *((name, ()) for name in ("mla with a query latent", "low rank, everything rotates", "values of another width")),
    *(("default", (("model__mixer__rotate", subset), ("model__position__dim", dim)))
      for subset in SUBSETS for dim in (0, 4)),
    ("mixer mla", (("model__mixer__latent_norm", False), ("model__mixer__kv_heads", 1),
     ("model__mixer__v_head_dim", 10))),
    ("mixer s3", (("model__mixer__latent_norm", False), ("model__mixer__softmax_scale", 0.2),
     ("model__mixer__softcap", 2.0))),
    ("mixer s1", (("model__mixer__v_head_dim", 10), ("model__mixer__rotate", "qkvo"))),
    ("mixer gta", (("model__mixer__v_head_dim", 14), ("model__mixer__rotate", "kv"))),
    ("mixer s2", (("model__mixer__rotate", "qkv"),)),
    ("mixer s2", (("model__mixer__rotate", "none"),)),
    ("mixer s2", (("model__position__dim", 0),)),
]), ids=str)  # fmt: skip
def test_against_the_formula(variant, overrides):
    config, stacked, x_BTD, coordinates, got = float64_layer(variant, 40, **dict(overrides))
    at = coordinates.map(lambda x: np.asarray(x[0]))
    real = at.segment >= 0
    if config.mixer.name == "delta":
        expected = delta(config, stacked, np.asarray(x_BTD[0]), at)
    else:
        seen = np.asarray(rules.visible(rules.parse(config.rule), at, at))
        expected = Formula(config, stacked, np.asarray(x_BTD[0]), at, seen).output()
    assert np.abs(expected[real]).max() > 0.05
    np.testing.assert_allclose(np.asarray(got[0])[real], expected[real], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("length", [1, 63, 64, 150])
@pytest.mark.parametrize("variant", ["mixer delta", "delta on own_branch"])
def test_chunks_of_the_delta_rule_are_the_recurrence(variant, length):
    config, stacked, x_BTD, coordinates, got = float64_layer(variant, length)
    at = coordinates.map(lambda x: np.asarray(x[0]))
    expected = delta(config, stacked, np.asarray(x_BTD[0]), at)
    np.testing.assert_allclose(np.asarray(got[0])[at.segment >= 0], expected[at.segment >= 0], atol=2e-6, rtol=2e-6)


def shifted_difference(rotate: str, dtype) -> float:
    """How far the logits of an S2 model move when all times and indices do, by 1000."""
    with jax.enable_x64(dtype == jnp.float64):
        config = variants.config("mixer s2", model__mixer__rotate=rotate, model__position__ratio=0.5)
        wide = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
        model, batch = jax.tree.map(wide, tiny.model(config)), tiny.batch()
        model.compute = jnp.dtype(dtype)
        forward = jax.jit(type(model).__call__)
        here = forward(model, batch.tokens, batch.coordinates)
        there = forward(model, batch.tokens, tiny.moved(batch.coordinates, time=1000, index=1000))
        return float(np.abs(np.asarray(there - here)[batch.coordinates.segment >= 0]).max())


@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 5e-4), (jnp.float64, 1e-8)])
def test_s2_does_not_feel_where_it_is_thanks_to_the_inverse_rotation(dtype, most):
    relative, absolute = shifted_difference("auto", dtype), shifted_difference("qkv", dtype)
    assert relative < most
    assert absolute > 100 * max(relative, most / 100)


@pytest.mark.parametrize("latent_norm", [pytest.param(True, marks=pytest.mark.slow), False])
def test_s3_with_the_absorbed_weights_of_an_mla_is_that_mla(latent_norm):
    shape = dict(model__mixer__kv_heads=1, model__position__dim=4, model__mixer__latent_norm=latent_norm)
    mla = tiny.model(tiny.config(model__mixer__name="mla", model__mixer__latent=12, **shape))
    s3 = tiny.model(
        tiny.config(model__mixer__name="s3", model__mixer__softmax_scale=8**-0.5, model__mixer__head_dim=16, **shape)
    )
    inner, outer = mla.blocks[0].mixer, s3.blocks[0].mixer
    q_LDHN, q_LDHR = jnp.split(inner.q[...], [4], -1)
    absorbed = jnp.einsum("ldhn,lchn->ldhc", q_LDHN, inner.up_k[...])
    outer.q[...] = jnp.concatenate([absorbed, q_LDHR], -1)
    outer.o[...] = jnp.einsum("lchv,lhvd->lhcd", inner.up_v[...], inner.o[...])
    outer.c[...], outer.rope[...] = inner.kv_down[...], inner.rope[...]
    if latent_norm:
        outer.latent_norm.weight[...] = inner.latent_norm.weight[...]
    s3.embedding, s3.norm, s3.rotary = mla.embedding, mla.norm, mla.rotary
    for name in ("mixer_placement", "feedforward_placement", "feedforward"):
        setattr(s3.blocks[0], name, getattr(mla.blocks[0], name))
    batch = tiny.batch()
    got, expected = (jax.jit(type(m).__call__)(m, batch.tokens, batch.coordinates) for m in (s3, mla))
    real = batch.coordinates.segment >= 0
    np.testing.assert_allclose(got[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_naive_and_absorbed_mla_agree(groups):
    model, batch = tiny.model(variants.config("mixer mla", model__mixer__kv_heads=groups)), tiny.batch()
    view, mixer = (
        model.views(batch.coordinates, batch.coordinates)[0],
        jax.tree.map(lambda w: w[0], model.blocks[0].mixer),
    )
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(*batch.tokens.shape, 16)), jnp.float32)

    @jax.jit
    def attend(mixer):
        q_BTHK, (kept, _) = mixer.queries(x_BTD), mixer.remember(x_BTD, view, None)
        return [mixer.attend(q_BTHK, kept, view, decoding=form) for form in (True, False)]

    (absorbed, lse), (naive, expected_lse) = attend(mixer)
    np.testing.assert_allclose(absorbed, naive, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", [name for name in variants.VARIANTS if name.startswith("mixer ")])
def test_what_is_cached_is_what_the_mixer_says(variant):
    config = variants.config(variant).model
    model = abstract(config)
    layers = jax.eval_shape(lambda: model.init_cache(5, 7)).layers
    numbers = sum(x.size for x in jax.tree.leaves(layers) if jnp.issubdtype(x.dtype, jnp.floating)) / config.layers
    mixer = model.blocks[0].mixer
    assert numbers == 5 * (7 * accounting.cache_per_token_per_layer(model) + mixer.state_numbers)


@pytest.mark.slow
@pytest.mark.matrix("variant")
@pytest.mark.parametrize("variant", variants.marked(variants.VARIANTS | variants.ON_STREAMS))
def test_no_two_weights_are_drawn_from_the_same_numbers(variant):
    """Keys that are split and keys that are folded in coincide unless their numbers are kept apart."""
    model = lab_model.build(variants.config(variant).model, jax.random.key(0))
    drawn, seen = jax.tree.flatten_with_path(parameter.split(model)[1])[0], {}
    for path, w in drawn:
        flat = np.asarray(w).reshape(-1)
        if len(np.unique(flat)) < 8:
            continue  # starts at a constant
        shape = np.round(flat[:6] / flat[0], 3)
        assert tuple(shape) not in seen, (jax.tree_util.keystr(path), seen[tuple(shape)])
        seen[tuple(shape)] = jax.tree_util.keystr(path)
    assert len(seen) > 5


@pytest.mark.parametrize(("overrides", "says"), [
    (dict(model__position__dim=3), "model.position.dim = 3 must be even and at least 2"),
    (dict(model__position__dim=10), "model.position.dim = 10 is above model.mixer.head_dim = 8"),
    (dict(model__mixer__head_dim=7), "model.mixer.head_dim = 7 must be even"),
    (dict(model__position__table="slice"), "own, head"),
    (dict(model__mixer__name="mla", model__mixer__latent=12), "leaves none of model.mixer.head_dim = 8 unrotated"),
    (dict(model__mixer__name="s3"), "choose an even number of 2 to 6"),
    (dict(model__mixer__name="mla", model__position__dim=4, model__mixer__latent=0),
     "model.mixer.latent = 0 must be at least 1"),
    (dict(model__mixer__name="mla", model__position__dim=4, model__mixer__qk_norm=True),
     "model.mixer.qk_norm = True means nothing beside model.mixer.name = 'mla'; choose False, or one of: "),
    (variants.mixer("mla", model__mixer__rotate="qkvo"), "auto, none, or letters of 'qk'"),
    (variants.mixer("mla", model__mixer__kv_heads=3), "choose model.mixer.kv_heads among: 1, 2, 4"),
    (dict(model__mixer__rotate="qkx"), "letters of 'qkvo'"),
    (dict(model__mixer__rotate="qq"), "letters of 'qkvo'"),
    (dict(model__mixer__name="s2", model__mixer__rotate="qk"), "have both k and v in it, or neither"),
    (dict(model__mixer__name="s2", model__mixer__v_head_dim=4),
     "model.mixer.v_head_dim = 4 means nothing beside model.mixer.name = 's2'; choose 0"),
    (dict(model__mixer__name="s1", model__position__dim=4, model__mixer__v_head_dim=4), "must be above 4"),
    (dict(model__mixer__name="s1", model__position__dim=4, model__mixer__v_head_dim=6, model__mixer__rotate="qkv"),
     "leave out v"),
    (dict(model__position__dim=8, model__mixer__v_head_dim=6, model__mixer__rotate="qkvo"),
     "does not fit into values of width 6"),
    (dict(model__mixer__name="forgetting", model__mixer__softcap=2.0),
     "model.mixer.softcap = 2.0 means nothing beside model.mixer.name = 'forgetting'; choose 0.0"),
    (dict(model__mixer__name="forgetting", model__rule="causal & window(4)"), "causal, all_branches, own_branch"),
    (dict(model__mixer__name="delta"), "model.rule of model.mixer.name = 'delta' = 'all_branches' is unknown"),
    (dict(model__mixer__name="delta", model__rule="causal", model__mixer__sink=True),
     "model.mixer.sink = True means nothing beside model.mixer.name = 'delta'; choose False"),
    (dict(model__mixer__name="delta", model__rule="causal", model__mixer__rotate="qk"),
     "model.mixer.rotate = 'qk' means nothing beside model.mixer.name = 'delta'; choose 'auto'"),
    (dict(model__mixer__q_rank=-1), "model.mixer.q_rank = -1 must be at least 0"),
    (dict(model__mixer__latent=12),
     "model.mixer.latent = 12 means nothing beside model.mixer.name = 'attention'; choose 0, or one of: "
     "model.mixer.name = 'mla'"),
    (dict(model__pattern=((("mixer.rotate", 3),),)), "model.pattern sets mixer.rotate = 3, which is of another type"),
], ids=str)  # fmt: skip
def test_mixers_that_mean_nothing_are_refused(overrides, says):
    with pytest.raises(UserError) as refused:
        spec.check(tiny.config(**overrides).model)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_layer_in_order_is_refused_a_row_cut_in_parts():
    config, batch = variants.config("mixer delta"), tiny.batch(rows=2, length=32)
    model = tiny.model(config)
    with jax.set_mesh(tiny.mesh(context=2)), pytest.raises(UserError, match=r"mesh\.context must be 1"):
        jax.eval_shape(lambda model: model(batch.tokens, batch.coordinates), model)


def test_every_mixer_has_a_formula_here():
    """And is one of those that are compared with it; no two are one class under two names."""
    assert all(callable(getattr(Formula, name)) for name in MIXERS if name != "delta")
    assert {f"mixer {name}" for name in MIXERS} <= {*EVERY}
    trees = {name: jax.tree.structure(abstract(variants.config(f"mixer {name}").model)) for name in MIXERS}
    assert len({*map(str, trees.values())}) == len(MIXERS)


def test_a_layer_of_a_pattern_reads_what_its_own_mixer_declares():
    """qk_norm and softcap are set for the first entry, and the mixer of the second has no place for them."""
    for name, option, value in (("mla", "qk_norm", True), ("forgetting", "softcap", 2.0)):
        second = tuple(
            (field.removeprefix("model__").replace("__", "."), x) for field, x in variants.mixer(name).items()
        )
        made = tiny.config(model__pattern=((), second), **{f"model__mixer__{option}": value})
        first, other = (block.mixer for block in lab_model.abstract(made.model).blocks)
        assert (first.q_norm is not None, first.softcap) == (option == "qk_norm", 2.0 if option == "softcap" else 0)
        assert other.q_norm is None and not other.softcap
