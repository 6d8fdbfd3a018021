"""What is asked of branches that are decoded, against a network in float64 numpy; what cannot leak does not."""

import itertools

import numpy as np
import pytest
import tiny
from decoding import row
from numpy_layers import normed, weights
from numpy_network import Network

from lab.config import add_ask
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.evaluate import asks, conditions, decoding
from lab.train.loop import Stopped

TEXTS = tiny.texts(40, seed=5)
P, N = 3, 4
SHAPE = dict(texts=3, rows=2, prompt_tokens=P, new_tokens=N)
OWN = dict(model__rule="own_branch", model__position__unselected="time")  # nothing turns by the flat index


def asked(branches=(3,), ask=(), **overrides) -> tiny.ConfigDict:
    made = tiny.config(**dict(model__position__ratio=0.75) | overrides)
    add_ask(made, "decoded", "decoding", branches=branches, **SHAPE | dict(ask))
    asks.check(made)
    return made


def found(made, model, mesh=None, done=0, stop=lambda: False) -> list[conditions.Condition]:
    return list(conditions.evaluate(made, "decoded", model, TEXTS, mesh or tiny.mesh(), done=done, stop=stop))


def drawn(made, model, n) -> decoding.Drawn:
    ask = made.evaluate.decoded
    begun, stop = decoding.begun(ask, TEXTS, n), lambda: None
    return decoding.draw(ask, decoding._engine(ask, model, begun, stop), begun, stop)


class Read:
    """One row of a model in float64: log p [T, C] of what follows each token, and how a token attends, mean over layers
    and heads, [T, T]."""

    def __init__(self, made, model, tokens_1T, at):
        net = Network(made.model, model, at.map(lambda x: x[0]))
        x_TD, attended = weights(model.embedding)[tokens_1T[0]], []
        for layer in range(made.model.layers):
            attended.append(net.P(layer, x_TD).mean(0))
            x_TD = net.layer(layer, x_TD)
        z_TC = normed(x_TD, weights(model.norm.weight), net.eps) @ weights(model.embedding).T
        self.log_p_TC = (
            z_TC
            - np.log(np.exp(z_TC - z_TC.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - z_TC.max(-1, keepdims=True)
        )
        self.attended_TT, self.tokens, self.at = np.mean(attended, 0), tokens_1T[0], net.at

    def places(self, branch: int) -> np.ndarray:
        return np.flatnonzero((self.at.branch == branch) & (self.at.segment >= 0))

    def nats(self, places) -> np.ndarray:
        """Of each token given the one before it."""
        return np.array([-self.log_p_TC[a, self.tokens[b]] for a, b in itertools.pairwise(places)])


def parallel(made, model, begun_nP, texts: dict[int, np.ndarray]) -> Read:
    """texts: what each branch generated."""
    if made.evaluate.decoded.prompt == "shared":
        return Read(made, model, *row([*begun_nP[0]], {b: [*text] for b, text in texts.items()}, 40))
    return Read(made, model, *row([], {b: [*begun_nP[b - 1], *text] for b, text in texts.items()}, 40))


@pytest.mark.parametrize("prompt", decoding.PROMPTS)
def test_what_is_found_is_what_a_network_in_float64_finds(prompt):
    made = asked(ask=dict(prompt=prompt))
    model, n, groups = tiny.model(made), 3, SHAPE["texts"]
    shown = drawn(made, model, n)
    (got,) = found(made, model)
    nats, alone, shares, kls, right = [], [], [], [], []
    for i in range(groups):
        texts = dict(enumerate(shown.ids_GnN[i], 1))
        read = parallel(made, model, shown.begun_GnP[i], texts)
        s = 1 + i % n
        swapped = texts | {s: shown.ids_GnN[(i + 1) % groups, s - 1]}
        begun = shown.begun_GnP[i].copy()
        begun[s - 1] = shown.begun_GnP[i if prompt == "shared" else (i + 1) % groups, s - 1]
        after = parallel(made, model, begun, swapped)
        for b in texts:
            places = read.places(b)
            generated = places[-N:]
            before = [*(read.places(0) if prompt == "shared" else places[:P])]
            chain = [*before[-1:], *generated]
            nats += [*read.nats(chain)]
            right += [read.log_p_TC[at].argmax() == token for at, token in zip(chain, texts[b], strict=False)]
            others = (read.at.branch != b) & (read.at.branch > 0) & (read.at.segment >= 0)
            shares += [*read.attended_TT[generated][:, others].sum(-1)]
            if b != s:
                log_p, log_q = read.log_p_TC[generated], after.log_p_TC[generated]
                kls += [*(np.exp(log_p) * (log_p - log_q)).sum(-1)]
            whole = np.concatenate([shown.begun_GnP[i, b - 1], texts[b]])
            alone += [*Read(made, model, whole[None], Coordinates.single(1, len(whole))).nats(range(P + N))[-N:]]
    assert got.tokens == len(nats) == groups * n * N and got.accuracy == np.mean(right)
    assert got.loss == pytest.approx(np.mean(nats), rel=1e-5)
    assert got.further["loss_alone"] == pytest.approx(np.mean(alone), rel=1e-5)
    assert got.further["attention_on_others"] == pytest.approx(np.mean(shares), rel=1e-5)
    assert got.further["swap_kl"] == pytest.approx(np.mean(kls), rel=1e-3)
    assert abs(np.mean(nats) - np.mean(alone)) > 1e-2 and np.mean(shares) > 0.1 and np.mean(kls) > 1e-3


def test_branches_that_see_nothing_of_each_other_leak_nothing():
    """Exactly; and where each begins with a text of its own, decoding many costs nothing."""
    made = asked((1, 4), dict(prompt="own"), **OWN)
    one, four = found(made, tiny.model(made))
    assert (four.further["attention_on_others"], four.further["swap_kl"]) == (0, 0)
    assert (one.further["attention_on_others"], one.further["swap_kl"]) == (None, None)  # there are no others
    for each in (one, four):
        assert each.loss == pytest.approx(each.further["loss_alone"], rel=1e-5)


@pytest.mark.slow
def test_a_text_depends_on_its_number_its_branch_and_its_step():
    """Not on how many numbers of branches are asked, on which were found before, nor on devices."""
    made = asked((1, 2, 4))
    model = tiny.model(made)
    whole, rest = found(made, model), found(made, model, done=1)
    few = found(asked((4,), dict(rows=4)), model)
    for a, b in [*zip(whole[1:], rest, strict=True), (whole[-1], few[0])]:
        assert (a.value, a.tokens) == (b.value, b.tokens)
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.further == pytest.approx(b.further, rel=1e-4)
    texts = [drawn(made, model, n).ids_GnN for n in (1, 2)]
    assert (texts[0][:, 0, 0] == texts[1][:, 0, 0]).all() and len({*map(tuple, texts[1].reshape(-1, N))}) == 6
    (many,) = found(asked((4,)), model, tiny.mesh(data=2))
    assert many.loss == pytest.approx(few[0].loss, rel=1e-5)
    assert many.further == pytest.approx(few[0].further, rel=1e-3)


def test_a_stop_is_answered_while_it_decodes():
    made, calls = asked(), iter([False, False, True])
    with pytest.raises(Stopped, match="the ask decoded"):
        found(made, tiny.model(made), stop=lambda: next(calls))


@pytest.mark.parametrize(("ask", "told"), [
    (dict(branches=()), r"decoded\.branches is empty"),
    (dict(branches=(2, 2)), r"decoded\.branches = \(2, 2\) has a value twice"),
    (dict(texts=1), r"decoded\.texts = 1 is too small; choose at least 2"),
    (dict(prompt_tokens=7), r"decoded\.prompt_tokens = 7 is more than a text has; choose at most .* = 6"),
    (dict(temperature=1e9), r"decoded: temperature = 1000000000.0 is not valid; choose 0, which is greedy"),
    (dict(prompt="first"), r"decoded\.prompt = 'first'.*shared"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused(ask, told):
    with pytest.raises(UserError, match=told):
        asked(**dict(branches=(2,)) | dict(ask=ask) if "branches" not in ask else dict(branches=ask["branches"]))


def test_too_few_texts_are_told_before_anything_runs():
    ask = asked((4,), dict(prompt="own")).evaluate.decoded
    decoding.check_texts(ask, "evaluate.decoded", TEXTS)
    with pytest.raises(UserError, match="6 texts of at least 3 tokens are asked for, and the validation texts have 5;"):
        decoding.check_texts(ask, "evaluate.decoded", [text for text in TEXTS if len(text) >= P][:5])
