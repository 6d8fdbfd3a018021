"""Lists of prompts: in their order, whatever is decoded beside them."""

import decoding
import numpy as np
import pytest
import tiny
import variants
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.decode.generate import generate
from lab.decode.sampling import Sampling
from lab.errors import UserError
from lab.model import spec
from lab.options import set_field

SHAPE = dict(rows=decoding.SHAPE["rows"], chunk=decoding.SHAPE["chunk"])  # and its branches and length: no new program


def model():
    return decoding.built("default", **decoding.ALONE)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=5)
def test_greedy_branches_are_those_of_the_full_pass(seed):
    rng = np.random.default_rng(seed)
    prompts = [decoding.tokens(rng, rng.integers(1, 14)) for _ in range(4)]
    found = generate(model(), prompts, branches=3, most_tokens=5, **SHAPE)
    for prompt, texts in zip(prompts, found, strict=True):
        assert [len(text) for text in texts] == [5, 5, 5]
        missing = decoding.short_of_the_best(model(), prompt, dict(enumerate(texts, 1)), dict.fromkeys((1, 2, 3), 0))
        assert missing < 1e-3


def test_a_prompt_is_sampled_alike_whatever_is_beside_it():
    """A text depends on the seed, on its number in the list, and on nothing else."""
    rng = np.random.default_rng(1)
    asked = dict(branches=3, most_tokens=6, sampling=Sampling(temperature=1.5, seed=3), **SHAPE)
    prompt = decoding.tokens(rng, 9)
    others = [[decoding.tokens(rng, n) for n in lengths] for lengths in ((1, 12), (7, 3))]
    first, second = (generate(model(), [one, prompt, other], **asked) for one, other in others)
    assert first[1] == second[1] and first[0] != second[0]
    assert generate(model(), [prompt, prompt], **asked)[0] != first[1]


def test_no_prompts_give_no_texts():
    assert generate(model(), [], most_tokens=4) == []


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="the prompt is empty"):
        generate(model(), [[1], []], branches=3, most_tokens=4, **SHAPE)


def test_branches_of_a_model_of_single_texts_are_kept_apart():
    """Laid over a model whose rules are causal, greedy branches are each what the text alone is; else they are not."""
    pattern = (("rule", "causal & window(6)"),), ()
    made = variants.config("default", model__rule="causal", model__position__ratio=0.0, model__pattern=pattern,
                           model__position__unselected="time")  # fmt: skip
    model, prompt = tiny.model(made), [decoding.tokens(np.random.default_rng(2), 9)]
    alone, together = (generate(model, prompt, branches=n, most_tokens=12, **SHAPE)[0] for n in (0, 3))
    for name, value in spec.apart(made.model):
        set_field(made.model, name, value)
    assert generate(tiny.model(made), prompt, branches=3, most_tokens=12, **SHAPE)[0] == [alone] * 3 != together
