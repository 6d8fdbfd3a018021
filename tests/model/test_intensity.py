"""Arithmetic intensity against operations and numbers counted array by array, in float64."""

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from lab import model as lab_model
from lab.model import accounting, intensity
from lab.study.define import plan

heads_and_groups = st.integers(1, 5).flatmap(lambda g: st.tuples(st.integers(1, 5).map(lambda r: r * g), st.just(g)))


def numbers(*shapes) -> float:
    return float(sum(np.prod(shape, dtype=np.float64) for shape in shapes))


@given(st.integers(1, 300), heads_and_groups, st.integers(1, 40))
def test_training_against_what_is_counted(b, grouped, k):
    """At n = d, as the formula has it, but for 1/d: what a token brings along is small beside its scores."""
    h, _ = grouped
    n = d = h * k
    tokens, scores, weights = (b, n, d), (b, h, n, n), (d, d)
    inverse = numbers(tokens, scores, weights) / (numbers(tokens) * d)
    assert 1 / intensity.training(b, n, d, h) == pytest.approx(inverse - 1 / d, rel=1e-9)
    assert 1 / intensity.training(b, n, d, h) == pytest.approx(1 / k + 1 / (b * n), rel=1e-12)


@given(st.integers(1, 300), st.integers(1, 30), heads_and_groups, st.integers(2, 40))
def test_decoding_against_what_is_counted(b, n, grouped, k):
    h, g = grouped
    d, operations, moved = h * k, 0.0, 0.0
    for _ in range(n):  # a step reads all keys, and the weights, for one token of each row
        operations += numbers((b, d)) * d
        moved += numbers((b, g, n, k), (d, d)) + (numbers((b, d)) if g == 1 else 0)
    assert intensity.decoding(b, n, d, h, g) == pytest.approx(operations / moved, rel=1e-9)


def test_the_named_forms():
    """Many heads (n/d + 1/b)^-1, groups n g/(d h) for n/d, one group (1/d + n/(d h) + 1/b)^-1."""
    b, n, d, h = 16, 4096, 1024, 8
    assert intensity.decoding(b, n, d, h, h) == pytest.approx(1 / (4 + 1 / 16))
    assert intensity.decoding(b, n, d, h, 2) == pytest.approx(1 / (4 * 2 / 8 + 1 / 16))
    assert intensity.decoding(b, n, d, h, 1) == pytest.approx(1 / (1 / 1024 + 4 / 8 + 1 / 16))


@pytest.mark.parametrize(("mixer", "of_float32"), [("attention", 0), ("forgetting", 2 * 4)])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_bytes_of_a_token_are_those_of_what_is_cached(compute, mixer, of_float32):
    config = tiny.config(model__compute=compute, model__mixer__name=mixer, model__layers=3).model
    keys_and_values = 2 * config.mixer.kv_heads * config.mixer.head_dim
    expected = 3 * ({"float32": 4, "bfloat16": 2}[compute] * keys_and_values + 4 * of_float32)
    assert accounting.cache_bytes_per_token(lab_model.abstract(config)) == expected


def moved(**overrides) -> dict:
    config = tiny.config(**overrides)
    return plan.moved(config, lab_model.abstract(config.model, config.run))


def test_the_plan_has_them_of_the_batch_and_the_row_of_the_study():
    """Width 16, 4 heads over 1 group of 4, 2 rows of 4 x 6 tokens; layers of 2 and 4 heads have 3."""
    found = moved(model__mixer__head_dim=4, model__mixer__kv_heads=1)
    assert found["intensity_training"] == pytest.approx(1 / (1 / 4 + 1 / 48))
    assert found["intensity_decoding"] == {
        "1": pytest.approx(1 / (1 / 16 + 24 / 64 + 1)), "64": pytest.approx(1 / (1 / 16 + 24 / 64 + 1 / 64)),
    }  # fmt: skip
    of_layers = moved(model__pattern=((("mixer.heads", 2),), ()))
    assert of_layers["intensity_training"] == pytest.approx(1 / (3 / 16 + 1 / 48))


def test_other_caches_count_as_the_groups_that_they_would_be():
    """12 + 4 numbers of MLA are those of 2 groups of keys and values of width 4; of a state nothing is said."""
    found = moved(model__mixer__name="mla", model__mixer__latent=12, model__mixer__kv_heads=1, model__position__dim=4)
    assert found["intensity_decoding"]["64"] == pytest.approx(1 / (24 * 2 / 64 + 1 / 64))
    stateful = moved(model__mixer__name="delta", model__rule="causal")
    assert stateful["intensity_decoding"] == {"1": None, "64": None} and stateful["cache_bytes_per_token"] == 0
