"""Requests that come and go: each has the tokens that it has alone, those of the full pass, and frees its slots."""

import decoding
import jax
import numpy as np
import pytest
import tiny
import variants
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lab.data import packing
from lab.decode import engine as lab_engine
from lab.decode import programs
from lab.decode.sampling import Sampling
from lab.errors import UserError

CLOSE = 1e-3  # float32 in another order
DECODING = (
    *("default", "rule causal", "mixer mla", "mixer s2", "mixer gta", "mixer forgetting", "delta on own_branch"),
    *("delta : attention", "local : global", "position fourier", "t5 : learned"),
    *("stream v1m7, sandwich", "stream v3m3.2, local : global", "stream v4m1E", "stream hyper"),
)
LIKELY = Sampling(temperature=1.0, top_k=9, min_p=0.02, repetition_penalty=1.2)


@pytest.mark.matrix("variant")
@pytest.mark.parametrize("variant", variants.marked(DECODING))
def test_greedy_tokens_are_those_of_the_full_pass(variant):
    """A single text, branches of a prompt, and branches with beginnings of their own and no prompt, side by side."""
    rng, model = np.random.default_rng(3), decoding.built(variant)
    engine, asked = decoding.engine(model), []
    for prompt, begin in (
        ([], [decoding.tokens(rng, 9)]),
        (decoding.tokens(rng, 6), [[], [], []]),
        ([], [decoding.tokens(rng, n) for n in (3, 1, 4)]),
        (decoding.tokens(rng, 1), [decoding.tokens(rng, n) for n in (0, 3)]),
    ):
        alone = not asked
        number = engine.submit(begin[0] if alone else prompt, branches=0 if alone else len(begin),
                               texts=None if alone else begin, most_tokens=5)  # fmt: skip
        asked.append((number, prompt, begin))
    found = decoding.run(engine)
    for number, prompt, begin in asked:
        texts = {branch: own + found[number, branch] for branch, own in enumerate(begin, 1)}
        assert all(len(text) == len(own) + 5 for text, own in zip(texts.values(), begin, strict=True))
        given_tokens = {branch: len(own) for branch, own in enumerate(begin, 1)}
        assert decoding.short_of_the_best(model, prompt, texts, given_tokens) < CLOSE


def test_the_full_pass_lays_tokens_as_packing_does():
    rng = np.random.default_rng(0)
    prompt, texts = decoding.tokens(rng, 4), {branch: decoding.tokens(rng, 3) for branch in (1, 2, 3)}
    held, at = decoding.row(prompt, texts, 20)
    packed = packing.interleave(
        [np.array(text) for text in (prompt, *texts.values())], [4], 20, np.zeros(4, int), np.arange(4),
        align="left", prompt="first",
    )  # fmt: skip
    np.testing.assert_array_equal(held[0], packed.tokens)
    jax.tree.map(lambda ours, theirs: np.testing.assert_array_equal(ours[0], theirs), at, packed.coordinates)


@pytest.mark.parametrize("seed", range(3))
def test_a_branch_alone_has_the_tokens_that_it_has_among_others(seed):
    """Under own_branch, with the same number, where no pair turns by the flat index."""
    rng, model = np.random.default_rng(seed), decoding.built("default", **decoding.ALONE)
    prompt, begin = decoding.tokens(rng, 7), [decoding.tokens(rng, n) for n in rng.integers(0, 4, 3)]
    asked = dict(sampling=LIKELY._replace(seed=seed), most_tokens=6, stream=11)
    together = decoding.engine(model)
    together.submit(prompt, branches=3, texts=begin, **asked)
    found = decoding.run(together)
    for branch in (1, 2, 3):
        alone = decoding.engine(model)
        alone.submit(prompt, branches=(branch,), texts=begin[branch - 1 : branch], **asked)
        assert decoding.run(alone) == {(0, branch): found[0, branch]}
    assert len({*map(tuple, found.values())}) > 1


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 2**32 - 1)),
        st.tuples(st.just("cancel"), st.integers(0, 2**32 - 1)),
        st.tuples(st.just("step"), st.integers(1, 4)),
    ),
    min_size=3,
    max_size=14,
)


def drawn_request(seed: int) -> tuple[list[int], dict]:
    rng = np.random.default_rng(seed)
    sampled = LIKELY._replace(seed=int(rng.integers(100))) if rng.random() < 0.6 else Sampling()
    return decoding.tokens(rng, rng.integers(1, 12)), dict(
        branches=int(rng.integers(0, 4)), sampling=sampled, most_tokens=int(rng.integers(1, 8)),
        stop=decoding.tokens(rng, rng.integers(0, 3)),
    )  # fmt: skip


def check_schedule(actions) -> None:
    """Every request has the tokens that an engine of the same shape gives it alone; a cancelled one some of them."""
    model = decoding.built("default", **decoding.ALONE)
    engine, events, asked, cancelled = decoding.engine(model), [], [], set()
    for action, number in actions:
        if action == "submit":
            prompt, options = drawn_request(number)
            assert engine.submit(prompt, **options) == len(asked)
            asked.append((prompt, options))
        elif action == "step":
            for _ in range(number):
                events += engine.step()
        elif asked:
            request, branch = number % len(asked), (None, 1, 2, 3)[number % 4]
            engine.cancel(request, branch)
            cancelled.add(request)
    while engine.busy:
        events += engine.step()
    assert engine.free_slots == decoding.SHAPE["rows"] * decoding.SHAPE["length"] and engine.step() == []
    for request, (prompt, options) in enumerate(asked):
        alone = decoding.engine(model)
        alone.submit(prompt, **options, stream=request)
        expected = [event._replace(request=request) for event in all_events(alone)]
        for branch in {event.branch for event in expected}:
            ours, theirs = ([e for e in each if e[:2] == (request, branch)] for each in (events, expected))
            assert [e.ended for e in ours[:-1]] == [""] * (len(ours) - 1) and ours[-1].ended
            if ours[-1].ended == "cancelled":
                assert request in cancelled
                ours, theirs = ours[:-1], theirs[: len(ours) - 1]
            if request in cancelled:  # what others of its branches left out moves what comes after it in the cache
                assert [e[2:4] for e in ours] == [e[2:4] for e in theirs]
            else:
                assert ours == theirs
    assert {e.request for e in events} == {*range(len(asked))}


def all_events(engine) -> list:
    events = []
    while engine.busy:
        events += engine.step()
    return events


@given(ACTIONS)
@settings(max_examples=5)
def test_requests_come_and_go(actions):
    check_schedule(actions)


@pytest.mark.slow
@given(ACTIONS)
@settings(max_examples=25)
def test_many_requests_come_and_go(actions):
    check_schedule(actions)


def test_two_programs_serve_every_request():
    """Whatever joins and leaves: one of prefill and one of decoding are compiled."""
    model = decoding.built("default", **decoding.ALONE)
    counted = []
    for seed in range(4):
        engine = decoding.engine(model)
        for i in range(4):
            prompt, options = drawn_request(4 * seed + i)
            engine.submit(prompt, **options)
        engine.step()
        engine.cancel(0)
        decoding.run(engine)
        counted.append([f._cache_size() for f in (programs.prefill, programs.decode, programs.released)])
    assert counted[0] == counted[-1] and min(counted[0]) > 0


def test_weights_on_a_mesh_have_two_programs_too():
    """As an imported model's are: the first call finds the cache where later ones do."""
    whole = NamedSharding(Mesh(jax.devices()[:1], ("data",)), PartitionSpec())
    model = jax.device_put(decoding.built("default", **decoding.ALONE), whole)
    engine, used = decoding.engine(model), (programs.prefill, programs.decode)
    before = [f._cache_size() for f in used]
    for _ in range(2):
        engine.submit([3, 1, 4], branches=2, most_tokens=3)
        decoding.run(engine)
    assert [f._cache_size() - count for f, count in zip(used, before, strict=True)] == [1, 1]


def test_a_stop_token_is_no_part_of_a_text():
    model, prompt = decoding.built("default", **decoding.ALONE), [3, 1, 4]
    engine = decoding.engine(model)
    engine.submit(prompt, most_tokens=8)
    (text,) = decoding.run(engine).values()
    stop = text[4]
    engine.submit(prompt, most_tokens=8, stop=[stop])
    assert decoding.run(engine)[1, 1] == text[: text.index(stop)]


def test_no_two_rows_of_a_sampled_request_are_alike():
    """Streams of random numbers are apart: of branches, of requests with one prompt, and of steps."""
    engine = decoding.engine(decoding.built("default", **decoding.ALONE))
    for _ in range(2):
        engine.submit([1, 2], branches=3, sampling=Sampling(temperature=5.0), most_tokens=8)
    found = decoding.run(engine).values()
    assert len({*map(tuple, found)}) == 6 and all(len({*text}) > 2 for text in found)


def test_log_probabilities_are_those_of_the_full_pass_and_change_no_token():
    """Of the model's own logits, whatever is done to them before a token is drawn."""
    rng, model = np.random.default_rng(5), decoding.built("default", **decoding.ALONE)
    prompt, drawn = decoding.tokens(rng, 7), LIKELY._replace(seed=5)
    engine = lab_engine.Engine(model, **decoding.SHAPE, alternatives=4)
    silent = decoding.engine(model)
    for each, told in ((engine, dict(alternatives=3)), (silent, {})):
        each.submit(prompt, branches=2, sampling=drawn, most_tokens=6, **told)
        each.submit(prompt, most_tokens=4)
    events, others = all_events(engine), all_events(silent)
    assert [e._replace(likeliest=()) for e in events] == others and not any(e.likeliest for e in events if e.request)
    texts = {branch: [e.token for e in events if e[:2] == (0, branch)] for branch in (1, 2)}
    held, at = decoding.row(prompt, texts, decoding.LENGTH)
    z = np.asarray(decoding.full_pass()(model, held, at))[0].astype(np.float64)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    for branch, text in texts.items():
        for i, event in enumerate(e for e in events if e[:2] == (0, branch)):
            inside = (at.segment[0] == 0) & (at.branch[0] == (branch if i else 0)) & (at.time[0] == len(prompt) + i - 1)
            (place,) = np.flatnonzero(inside)
            np.testing.assert_allclose(event.log_p, log_p[place, text[i]], atol=CLOSE)
            np.testing.assert_allclose([p for _, p in event.likeliest], np.sort(log_p[place])[:-4:-1], atol=CLOSE)
            np.testing.assert_allclose([log_p[place, t] for t, _ in event.likeliest], np.sort(log_p[place])[:-4:-1],
                                       atol=CLOSE)  # fmt: skip


@pytest.mark.parametrize(("prompt", "options", "says"), [
    ([], {}, "the prompt is empty"),
    ([1], dict(branches=(2, 11)), "branch 11 is over the budget of 10 branches"),
    ([1], dict(branches=10**12), "branches = 1000000000000 is not within the budget; choose 0 to 10"),
    ([1], dict(branches=-1), "branches = -1 is not within the budget; choose 0 to 10"),
    ([1], dict(branches=(2, 1)), "choose distinct ones from 1 on, in order"),
    ([1], dict(branches=2, texts=[[1]]), "1 texts for 2 branches"),
    ([1, tiny.VOCABULARY], {}, f"token {tiny.VOCABULARY} is outside of the model's vocabulary; choose 0 to 28"),
    ([1], dict(most_tokens=0), "most_tokens = 0 generates nothing"),
    ([1] * 897, dict(most_tokens=65), "a prompt of 897 tokens and 1 x 65 to generate need 1024 slots, and a row of the "
                                      "cache has 960"),
    ([1], dict(sampling=Sampling(top_k=-1)), "top_k = -1 is not valid"),
    ([1], dict(alternatives=1), "alternatives = 1 is not valid; choose 0 to 0"),
])  # fmt: skip
def test_requests_that_cannot_be_served_are_refused(prompt, options, says):
    engine = decoding.engine(decoding.built("default", **decoding.ALONE))
    with pytest.raises(UserError) as refused:
        engine.submit(prompt, **options)
    assert says in str(refused.value) and "\n" not in str(refused.value) and not engine.busy


@pytest.mark.parametrize(("shape", "says"), [
    (dict(rows=0), "an engine of rows = 0 holds nothing"),
    (dict(alternatives=30), "alternatives = 30 is not valid; choose 0 to 29"),
    (dict(length=2, branches=3), "a row of 2 slots has no room for 3 branches"),
])  # fmt: skip
def test_engines_that_hold_nothing_are_refused(shape, says):
    with pytest.raises(UserError, match=says):
        lab_engine.Engine(decoding.built("default", **decoding.ALONE), **shape)


def test_the_last_slot_is_used():
    engine = decoding.engine(decoding.built("default", **decoding.ALONE))
    engine.submit([1] * 321, most_tokens=64)
    assert len(decoding.run(engine)[0, 1]) == 64


def test_a_text_longer_than_the_model_is_refused():
    """Of learned positions there are so many."""
    engine = decoding.engine(decoding.built("t5 : learned"))
    engine.submit([1] * 20, most_tokens=variants.ROW - 19)
    with pytest.raises(UserError, match=f"beyond model.position.length = {variants.ROW}"):
        engine.submit([1] * 20, most_tokens=variants.ROW - 18)
