"""Branches that fork and join, and prompts that are shared: exact for every mixer, whatever else is in the engine."""

import decoding
import forking
import jax
import numpy as np
import pytest
import variants
from forking import Op, Played, Script
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import kernels
from lab.decode import attention, forest, programs
from lab.decode.engine import Engine
from lab.decode.sampling import Sampling
from lab.errors import UserError
from lab.kernels import tiled
from lab.kernels.tiles import FEW, MANY, WIDE
from lab.model.mixers import MIXERS

CLOSE = 1e-3  # float32 in another order
SEED = st.integers(0, 2**32 - 1)


def on_rules() -> list[str]:
    """Every mixer on both rules of branches, or on those that it supports."""
    found = ["rule all_branches", "rule own_branch", "mixer delta", "delta on own_branch"]
    for name in MIXERS:
        if name not in ("attention", "delta"):
            found += [v for v in (f"mixer {name}", f"{name} on own_branch", f"{name} on all_branches")
                      if v in variants.VARIANTS | variants.ON_RULES]  # fmt: skip
    return found


@pytest.mark.matrix("variant")
@pytest.mark.parametrize("variant", variants.marked(on_rules(), fast=("rule all_branches", "delta on own_branch")))
@given(st.lists(SEED, min_size=1, max_size=4))
@settings(max_examples=3)
def test_greedy_tokens_are_those_of_the_full_pass(variant, seeds):
    """Of requests side by side, whose branches fork, join and are cancelled as they grow."""
    played = Played(decoding.engine(decoding.built(variant)))
    scripts = [forking.drawn_script(seed, sampled=False) for seed in seeds]
    for script in scripts:
        played.submit(script)
        played.step()
    played.finish()
    for script, texts in zip(scripts, played.texts.values(), strict=True):
        prompt = script.prompt if script.options["branches"] else []
        short = forking.short_on_its_own if variant == "delta on own_branch" else forking.short_of_the_best
        assert short(variant, prompt, texts) < CLOSE


def test_a_fork_and_a_join_are_exact():
    """Once with all in it, so that no draw leaves something out: forks of forks, of the prompt, and a join of all."""
    prompt, options = [3, 1, 4, 1, 5], dict(branches=2, further=4, most_tokens=6)
    ops = [Op("fork", (1,), 0, ((7, 8),)), Op("fork", (2,), 2, ((),)), Op("fork", (4,), 1, ((2,),)),
           Op("join", (1, 2, 5), 4, ((9, 9),))]  # fmt: skip
    for variant in ("rule own_branch", "rule all_branches"):
        played = Played(decoding.engine(decoding.built(variant)))
        played.submit(Script(prompt, options, ops))
        played.finish()
        texts = played.texts[0]
        assert not played.refused and {b: text.sources for b, text in texts.items()} == {
            1: (), 2: (), 3: (1,), 4: (2,), 5: (4,), 6: (1, 2, 5)
        }  # fmt: skip
        assert texts[6].begin == max(texts[b].end for b in (1, 2, 5)) and len(texts[6].tokens) == 6
        assert forking.short_of_the_best(variant, prompt, texts) < CLOSE


PREFIXES = [np.random.default_rng(i).integers(0, 29, n).tolist() for i, n in enumerate((64, 70, 130))]
PREFIXES.append(PREFIXES[2][:64] + PREFIXES[0])
RULES = ("own_branch", "all_branches")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("branches", [decoding.SHAPE["branches"], pytest.param(6, marks=pytest.mark.slow)])
@given(st.lists(st.tuples(SEED, st.integers(0, 60), st.booleans()), min_size=2, max_size=5), st.data())
@settings(max_examples=4)
def test_what_a_request_samples_is_the_same_to_the_bit_at_every_occupancy(rule, branches, asked, data):
    """Whoever else is there, in whatever row, lanes and pages: tokens and log probabilities alike. Others are cancelled
    at any time; and nothing is compiled for any of it."""
    model = decoding.built("default", **decoding.ALONE | dict(model__rule=rule))
    crowd, cancelled = Played(decoding.engine(model, branches=branches)), set()
    scripts = [forking.drawn_script(seed, sampled=True, shared=PREFIXES) for seed, _, _ in asked]
    for number, (script, (_, steps, gone)) in enumerate(zip(scripts, asked, strict=True)):
        assert crowd.submit(script) == number
        for _ in range(steps):
            crowd.step()
        if gone:
            cancelled.add(victim := data.draw(st.integers(0, number)))
            crowd.engine.cancel(victim)
    crowd.finish()
    for number, script in enumerate(scripts):
        alone = Played(decoding.engine(model, branches=branches))
        alone.submit(script, stream=number)
        alone.finish()
        found, expected = ({b: text.events for b, text in p.texts[n].items()} for p, n in ((crowd, number), (alone, 0)))
        if number in cancelled:  # as far as it came
            found = {b: [e for e in events if e.ended != "cancelled"] for b, events in found.items()}
            expected = {b: expected[b][: len(events)] for b, events in found.items()}
        assert found == {b: [e._replace(request=number) for e in events] for b, events in expected.items()}


@pytest.mark.matrix("variant")
@pytest.mark.parametrize("variant", variants.marked(variants.VARIANTS))
def test_what_every_variant_samples_is_the_same_to_the_bit_beside_others(variant):
    """Of one engine: with nobody else, then with another request in its row, or beside it. Its prompt fills a tile of
    keys, which hides nothing as long as nobody else is there."""
    engine = decoding.engine(decoding.built(variant))
    asked = dict(branches=2, texts=[[4], [5, 6]], sampling=Sampling(temperature=0.9), stream=1, most_tokens=6)
    try:
        engine.cancel(engine.submit(prompt := PREFIXES[2][:80], **asked))
    except UserError as refused:
        assert "beyond" in str(refused)  # the last place that the model has weights for
        prompt = PREFIXES[2][:11]
    decoding.run(engine)
    alone, beside = [], []
    for events in (alone, beside):
        if events is beside:
            engine.submit(PREFIXES[0][:3], branches=3, most_tokens=7, stream=7)
            engine.step()
        number = engine.submit(prompt, **asked)
        while not any(made.id == number and made.ready for made in engine.running):
            engine.step()
        if events is beside:  # what came before may have ended while the prompt was read
            engine.submit(PREFIXES[0][:3], branches=3, most_tokens=7, stream=7)
        while engine.busy:
            events += [event._replace(request=0) for event in engine.step() if event.request == number]
    assert len(alone) == 12 and alone == beside


@pytest.mark.parametrize("rule", [RULES[0], pytest.param(RULES[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("before", [18, pytest.param(3, marks=pytest.mark.slow)])
def test_many_branches_are_the_same_to_the_bit_beside_others(rule, before):
    """Of more than a tile of queries: alone all of them read the prompt at once, beside others not. Where no other sees
    what they write, they fill pages of their own."""
    texts = [decoding.tokens(np.random.default_rng(i), 60) for i in range(20)]
    alone, beside = (found_beside(n, rule, MANY + 6, PREFIXES[2], texts, rule == "own_branch") for n in (0, before))
    assert alone == beside


def test_capped_scores_are_the_same_to_the_bit_beside_others():
    """Of a prompt whose tiles hide nothing as long as nobody else is there."""
    texts = [decoding.tokens(np.random.default_rng(i), 60) for i in range(3)]
    asked = "own_branch", FEW + 2, PREFIXES[2], texts, True, 2048
    alone, beside = (found_beside(n, *asked, model__mixer__softcap=3.0) for n in (0, 6))
    assert alone == beside


def test_few_branches_in_a_long_row_are_the_same_to_the_bit_beside_others():
    """Their prompt has more than a tile of keys: were pages smaller than a tile, it would begin within one."""
    prompt = decoding.tokens(np.random.default_rng(9), 300)
    alone, beside = (found_beside(n, "own_branch", FEW, prompt, [[], [3]], False) for n in (0, 3))
    assert alone == beside


@pytest.mark.parametrize("rule", [RULES[0], pytest.param(RULES[1], marks=pytest.mark.slow)])
def test_the_kernel_of_gpus_gives_the_same_to_the_bit_beside_others(rule):
    """Interpreted: its lists are dealt into parts. It draws what `tiled` draws."""
    texts = [decoding.tokens(np.random.default_rng(i), 60) for i in range(3)]
    asked = rule, FEW + 2, PREFIXES[2], texts, rule == "own_branch"
    with kernels.interpreted():
        alone, beside = (found_beside(n, *asked, 2048, attention.KERNEL) for n in (0, 6))
    assert alone == beside
    for found, expected in zip(alone, found_beside(0, *asked), strict=True):
        assert found.token == expected.token and np.isclose(found.log_p, expected.log_p, atol=1e-4)


def found_beside(
    others: int,
    rule: str,
    branches: int,
    prompt: list[int],
    texts: list[list[int]],
    own_pages: bool,
    length: int = 8192,
    implementation: str = "auto",
    **overrides,
) -> list:
    """What the branches of a request draw, beside so many of another one. own_pages: whether each has some."""
    model = jax.tree.map(lambda w: w, decoding.built("default", **decoding.ALONE | dict(model__rule=rule) | overrides))
    model.execution = model.execution._replace(implementation=implementation)
    engine = Engine(model, rows=1, length=length, branches=branches, chunk=64)
    if others:
        engine.submit(PREFIXES[1], branches=others, most_tokens=9, stream=7)
        engine.step()
    asked = engine.submit(
        prompt, branches=len(texts), texts=texts, most_tokens=5, sampling=Sampling(temperature=0.9), stream=1
    )
    assert len(engine.find(asked).owns) == (len(texts) if own_pages else 1)
    events = []
    while engine.busy:
        events += [event._replace(request=0) for event in engine.step() if event.request == asked]
    assert len(events) == 5 * len(texts)
    return sorted(events, key=lambda event: event.branch)


def counted(monkeypatch) -> list[int]:
    """Of each call of prefill, the tokens that it reads."""
    calls, prefill = [], programs.prefill

    def watched(model, held, given, limits):
        tokens_BT, at, _ = programs.Given.read(given)
        assert tokens_BT.shape[1] > FEW  # which read tiles of a page at most
        calls.append(int((at.segment >= 0).sum()))
        return prefill(model, held, given, limits)

    monkeypatch.setattr(programs, "prefill", watched)
    return calls


@pytest.mark.parametrize(("end", "more"), [(PREFIXES[2][64:], 0), ([*PREFIXES[2][64:-1], 28], 0), ([5, 5], 1)])
def test_a_prompt_is_read_and_stored_once(monkeypatch, end, more):
    """By requests that begin with it: to its end where nothing but the last token differs, else its whole pages."""
    calls, engine = counted(monkeypatch), decoding.engine(decoding.built("default", **decoding.ALONE))
    prompt = PREFIXES[2]
    engine.submit(prompt, branches=2, most_tokens=20)
    while not engine.running or not engine.running[0].ready:
        engine.step()
    assert sum(calls) == engine.rows * engine.length - engine.free_slots == len(prompt) - 1
    engine.submit(prompt[:64] + end, branches=1, most_tokens=3)
    decoding.run(engine)
    assert sum(calls) == len(prompt) - 1 + more
    forking.check_empty(engine)


def test_a_prompt_stays_as_long_as_one_reads_it():
    """The first that read it is cancelled, be it before it has read all: others go on with what they would have."""
    model = decoding.built("default", **decoding.ALONE)
    alone = decoding.engine(model)
    alone.submit(PREFIXES[2], branches=2, most_tokens=6, stream=1)
    expected = {branch: text for (_, branch), text in decoding.run(alone).items()}
    for steps in (3, 40):
        engine = decoding.engine(model)
        engine.submit(PREFIXES[2], branches=1, most_tokens=6)
        engine.step()
        engine.submit(PREFIXES[2], branches=2, most_tokens=6)
        before = [event for _ in range(steps) for event in engine.step() if event.request]
        engine.cancel(0)
        found = decoding.run(engine)
        for branch, text in expected.items():
            assert [e.token for e in before if e.branch == branch] + found.get((1, branch), []) == text
        forking.check_empty(engine)


def test_a_long_prompt_stalls_nobody():
    """While it is read, chunk by chunk, every step gives each branch that runs a token."""
    engine = decoding.engine(decoding.built("default", **decoding.ALONE))
    engine.submit([1, 2], branches=2, most_tokens=30)
    engine.step()
    engine.step()
    engine.submit(PREFIXES[2], most_tokens=1)
    for _ in range(20):
        assert [event[:2] for event in engine.step()] == [(0, 1), (0, 2)]
    assert not engine.running[-1].ready


@pytest.mark.parametrize("variant", ["delta on own_branch", "rule all_branches"])
def test_a_fixed_set_of_programs_serves_every_schedule(variant):
    """Whatever forks, joins, comes and goes: nothing is compiled again."""
    sizes = []
    for seed in range(6):
        played = Played(decoding.engine(decoding.built(variant)))
        for i in range(3):
            played.submit(forking.drawn_script(7 * seed + i, sampled=seed % 2 > 0))
            played.step()
        played.finish()
        names = ("empty", "prefill", "decode", "released", "forked")
        sizes.append([getattr(programs, name)._cache_size() for name in names])
    assert sizes[2] == sizes[-1]


@pytest.mark.parametrize(("act", "says"), [
    (lambda e: e.fork(3, 1), "request 3 does not go on"),
    (lambda e: e.fork(0, 5), "branches = (5,) of request 0; choose distinct ones among 1, 2"),
    (lambda e: e.fork(0, 1, [[], [], []]), "request 0 has room for 2 further branches, not 3"),
    (lambda e: e.fork(0, 1, [[1] * 4]), "4 tokens to begin with and 0 to generate are over the 4 of a further branch"),
    (lambda e: e.fork(0, 1, [[1]], most_tokens=4), "1 tokens to begin with and 4 to generate are over the 4"),
    (lambda e: e.fork(0, 1, [[29]]), "token 29 is outside of the model's vocabulary"),
    (lambda e: (e.cancel(0, 1), e.fork(0, 1)), "branch 1 of request 0 has ended (cancelled); fork one that goes on"),
    (lambda e: (e.join(0, (1, 2), [5]), e.fork(0, 3)), "branch 3 of request 0 has not begun; fork one that goes on"),
    (lambda e: (e.join(0, (1, 2), [5]), e.join(0, (2, 3), [5])), "branch 3 of request 0 has not begun; join branches"),
    (lambda e: e.join(0, (1, 1), [5]), "branches = (1, 1) of request 0; choose distinct ones"),
    (lambda e: e.join(0, (1, 2), []), "a join without a text has no token to go on from"),
    (lambda e: (e.cancel(0, 1), e.step(), e.step(), e.join(0, (1,), [5])), "branches (1,) of request 0 ended before"),
    (lambda e: e.submit([1], branches=3, further=8), "branch 11 is over the budget of 10 branches"),
    (lambda e: e.submit([1], further=-1), "further = -1 is no number of branches"),
])  # fmt: skip
def test_what_cannot_be_is_refused_and_changes_nothing(act, says):
    engine, other = (decoding.engine(decoding.built("default", **decoding.ALONE)) for _ in range(2))
    for each in (engine, other):
        each.submit([1, 2], branches=2, further=2, most_tokens=4)
        each.step()
        each.step()
    with pytest.raises(UserError) as refused:
        act(engine)
    assert says in str(refused.value) and "\n" not in str(refused.value)
    assert engine.submitted == 1
    if not engine.cancelled and len(engine.running[0].branches) == 2 and not engine.running[0].branches[0].ended:
        assert decoding.run(engine) == decoding.run(other)


def test_a_mixer_with_a_state_forks_and_refuses_a_join_by_name():
    engine = decoding.engine(decoding.built("delta on own_branch"))
    engine.submit([1, 2], branches=2, further=1, most_tokens=9)
    with pytest.raises(UserError, match=r"model\.mixer\.name = 'delta' cannot join branches"):
        engine.join(0, (1, 2), [3])
    assert engine.fork(0, 1) == (3,)


def test_implementations_that_read_no_limits_refuse_by_name():
    with (
        kernels.interpreted(),
        pytest.raises(UserError, match=r"'pallas_tpu' reads no limits .* among: auto, reference"),
    ):
        kernels.resolve("pallas_tpu", forking=True)


@given(SEED)
@settings(max_examples=10)
def test_what_is_needed_for_a_request_is_enough_in_any_engine(seed):
    """Of as many branches and slots, or of more, that gives branches pages of their own or not."""
    rng = np.random.default_rng(seed)
    for _ in range(100):
        prompt, most, n = (int(rng.integers(1, high)) for high in (3000, 300, FEW + 3))
        texts = rng.integers(0, 300, n).tolist() if rng.random() < 0.9 else []
        more, longer, chunk = (int(rng.choice(some)) for some in ([0, 1, 20], [0, 1, 300, 3000], [1, 64, 128, 320]))
        length = forest.needed_for(prompt, texts, most, chunk)
        row, page, unit = forest.row_of(length + longer, len(texts) + more if texts else 1, chunk)
        assert row >= length + longer and not row % page and not unit % page and unit >= chunk
        for own_pages in {False, len(texts) + more > FEW}:
            assert forest.needed_for(prompt, texts, most, unit, page, own_pages) <= row


@pytest.mark.parametrize("branches", [1, 2, FEW, FEW + 1])
@given(st.integers(1, 5000), st.sampled_from([1, 64, 2048]))
@settings(max_examples=50)
def test_pages_are_whole_tiles(branches, length, chunk):
    """But in a row of one branch, where a request is alone: so none reads what others have in a tile of its own."""
    row, page, _ = forest.row_of(length, branches, chunk)
    for T in (branches, max(chunk, 2 * FEW)):
        assert branches == 1 or page % tiled.tile_sizes(T, row)[1] == 0
    assert branches > 1 or row <= WIDE or tiled.tile_sizes(1, row)[1] == WIDE


def test_chunks_that_cut_pages_are_refused():
    with pytest.raises(UserError, match="chunk = 48 is not valid; choose a divisor or a multiple of 64"):
        Engine(decoding.built("default", **decoding.ALONE), chunk=48)
