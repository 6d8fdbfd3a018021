"""What a model drops: numbers chosen by a hash of where they stand, at every site of every layer of every stream."""

import collections
import inspect

import jax
import jax.numpy as jnp
import murmur
import numpy as np
import packs
import pytest
import variants

from lab import model as lab_model
from lab.model import dropout
from lab.model.dropout import Dropout, Masks
from lab.model.streams import STREAMS

SEED, STEP = 7, 11
RATES = {"attention": 0.3, "embedding": 0.4, "residual": 0.6}
OWN_ATTENTION = ("v3m1", "v4m1A", "v4mC", "resformer", "muddformer", "lime")  # streams that call it themselves


def drawn(rates=None, rows: int = 2, length: int = 12) -> tuple[Dropout, packs.Coordinates]:
    at = packs.interleaved(np.random.default_rng(0), rows, length)
    numbers = {name: jnp.float32(rate) for name, rate in (RATES if rates is None else rates).items()}
    rows_BT = np.repeat(np.arange(40, 40 + rows)[:, None], length, axis=1)
    return Dropout(jnp.int32(SEED), jnp.int32(STEP), numbers, jnp.asarray(rows_BT)), at


def test_numbers_are_dropped_by_an_independent_hash_of_where_they_stand():
    drop, at = drawn()
    token_BT, rng = murmur.tokens(SEED, STEP, drop.rows, at), np.random.default_rng(1)
    given = [rng.normal(size=(2, 12, 16)).astype(np.float32) for _ in range(2)]  # numbers, and a cotangent
    sites = {"embedding": (0, 0.4), "mixer": (2, 0.6), "feedforward": (3, 0.6)}

    @jax.jit
    def made(drop, x_BTD, dy_BTD):
        masks = drop.masks(at).of_layer(3)
        pulled = {site: jax.vjp(lambda x, site=site: masks.drop(site, x), x_BTD) for site in sites}
        return {site: (y, pull(dy_BTD)[0]) for site, (y, pull) in pulled.items()}, masks.of_attention(4)

    dropped, of = made(drop, *given)
    for site, (number, rate) in sites.items():
        factor_BTD = murmur.factors(rate, SEED, STEP, 3, number, 0, token_BT[..., None], np.arange(16))
        for got, before in zip(dropped[site], given, strict=True):
            np.testing.assert_allclose(got, before * factor_BTD, rtol=1e-6)
        assert 0 < (factor_BTD == 0).mean() < 1
    np.testing.assert_array_equal(of.head_H, murmur.state(SEED, STEP, 3, 1, np.arange(4)))
    np.testing.assert_array_equal(of.query_BT, token_BT)
    np.testing.assert_array_equal(of.key_BS, token_BT)
    assert of.rate == np.float32(0.3)


def test_no_two_numbers_of_a_batch_share_their_words_but_padding():
    """A step, a layer, a site, a row or a token more is another mask; the order of the row is not."""
    drop, at = drawn(rows=3, length=60)
    token_BT = np.asarray(drop.masks(at).token_BT)
    real = at.segment >= 0
    assert len(np.unique(token_BT[real])) == real.sum()
    order = np.argsort(np.random.default_rng(0).random(at.shape), axis=1)
    moved = at.map(lambda x: np.take_along_axis(x, order, axis=1))
    np.testing.assert_array_equal(drop.masks(moved).token_BT, np.take_along_axis(token_BT, order, axis=1))
    later = Dropout(drop.seed, drop.step + 1, drop.rates, drop.rows).masks(at)
    assert not np.intersect1d(later.token_BT[real], token_BT[real]).size
    states = [masks.of_layer(m).state for masks in (drop.masks(at), later) for m in range(4)]
    assert len(np.unique(states)) == 8


def test_layers_that_attend_in_one_call_keep_their_masks():
    drop, at = drawn()
    masks = drop.masks(at)
    layers = [masks.of_layer(m) for m in (0, 2)]
    together = layers[0].of_layers(layers).of_attention(8)
    np.testing.assert_array_equal(together.head_H, np.concatenate([one.of_attention(4).head_H for one in layers]))


def test_a_rate_that_is_left_out_drops_nothing():
    drop, at = drawn({})
    x_BTD = jnp.ones((2, 12, 16))
    assert drop.masks(at).drop("mixer", x_BTD) is x_BTD and drop.masks(at).of_attention(4) is None


def asked(monkeypatch, config) -> collections.Counter:
    """How often each site of each layer drops in one pass, unrolled; traced only."""
    found, layers = collections.Counter(), {}

    class Watched(Masks):
        def of_layer(self, m):
            made = Watched(*super().of_layer(m))
            layers[id(made.state)] = m, made  # held, so that no other takes its id
            return made

        def of_layers(self, others):
            for other in others:
                found["attention", layers[id(other.state)][0]] += 1
            return super().of_layers(others)

        def drop(self, site, x_BTD):
            assert x_BTD.shape[-1] == config.model.dim
            found[site, layers[id(self.state)][0]] += 1
            return super().drop(site, x_BTD)

        def of_attention(self, H):
            if self.state.ndim == 0:
                found["attention", layers[id(self.state)][0]] += 1
            return super().of_attention(H)

    monkeypatch.setattr(dropout, "Masks", Watched)
    drop, at = drawn()
    tokens_BT = np.zeros(at.shape, np.int32)
    jax.eval_shape(lambda model: model(tokens_BT, at, drop), lab_model.abstract(config.model))
    return found


@pytest.mark.parametrize("name", ["plain", *OWN_ATTENTION])
def test_every_sublayer_of_every_layer_drops(monkeypatch, name):
    found = asked(monkeypatch, variants.config("default", **variants.stream(name)))
    assert {*found} == {("embedding", 0)} | {(s, m) for s in ("attention", "mixer", "feedforward") for m in range(3)}
    again = name.startswith("v3")  # its replays drop what their layers dropped
    assert all(count == 1 for site, count in found.items() if not again or site[0] == "embedding")
    assert not again or found["mixer", 0] == found["attention", 0] == 3


def test_no_stream_norms_what_a_mixer_put_out_by_itself():
    """It asks its block (`mixed`), which also drops."""
    for module in {inspect.getmodule(stream) for stream in STREAMS.values()}:
        assert "placement.after(" not in inspect.getsource(module), module.__name__


def test_a_sum_over_what_is_seen_is_taken_whole(monkeypatch):
    """Forgetting attention counts by attention, and drops of its probabilities alone."""
    found = asked(monkeypatch, variants.config("mixer forgetting"))
    assert found["attention", 0] == found["attention", 1] == 1
