"""Log likelihoods against the log softmax of one full pass, in float64."""

import functools

import decoding
import jax
import numpy as np
import pytest
import tiny
import variants
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.decode.scoring import SHORTEST, log_likelihoods
from lab.errors import UserError

TEXTS, LENGTH = 3, SHORTEST + 9  # longer than one shape, so that there are two


@functools.cache
def full():
    """(texts, the log probabilities of what follows each token of them)"""
    texts = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (TEXTS, LENGTH))
    z = np.asarray(jax.jit(lambda model, tokens: model(tokens))(decoding.built("default"), texts), np.float64)
    return texts, z - np.log(np.exp(z).sum(-1, keepdims=True))


PAIR = st.tuples(st.integers(0, TEXTS - 1), st.integers(1, LENGTH - 1), st.integers(1, LENGTH - 1))


@given(st.lists(PAIR, min_size=1, max_size=7), st.booleans())
@settings(max_examples=15)
def test_likelihoods_are_those_of_the_full_pass(asked, likeliest):
    """Of continuations from one token to a whole text; half of them end in the likeliest token."""
    texts, log_p = full()
    pairs, expected = [], []
    for text, one, other in asked:
        split, end = sorted((one, other + (one == other)))
        tokens = texts[text, :end].tolist()
        if likeliest and split == end - 1:
            tokens[-1] = int(log_p[text, end - 2].argmax())
        places = np.arange(split - 1, end - 1)
        of_tokens = log_p[text, places, tokens[split:]]
        pairs.append((tokens[:split], tokens[split:]))
        expected.append((of_tokens.sum(), bool((log_p[text, places].argmax(-1) == tokens[split:]).all())))
    found = log_likelihoods(decoding.built("default"), pairs, rows=2)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=1e-3)
    assert [x for _, x in found] == [x for _, x in expected]


def test_a_text_beyond_what_the_model_has_learned_is_refused():
    model = tiny.model(variants.config("default", model__position__name="learned", model__position__length=24))
    assert np.isfinite(log_likelihoods(model, [([1] * 20, [2] * 3)])[0][0])
    with pytest.raises(UserError, match="beyond"):
        log_likelihoods(model, [([1] * 28, [2] * 3)])


def test_the_likeliest_continuation_is_found_to_be_it():
    texts, log_p = full()
    context = texts[0, :5].tolist()
    best = int(log_p[0, 4].argmax())
    found = log_likelihoods(
        decoding.built("default"), [(context, [best]), (context, [(best + 1) % tiny.VOCABULARY])], rows=2
    )
    assert [likeliest for _, likeliest in found] == [True, False]
