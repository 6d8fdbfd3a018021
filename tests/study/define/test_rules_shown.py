"""Rules under which a token sees what it is to predict are refused, in every layer and in every ask."""

import numpy as np
import packs
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from lab.errors import UserError
from lab.kernels import rules
from lab.study.define import plan
from lab.study.define.resolve import resolve

CASES = [  # (rule, a conjunction of it that is refused no more; None: it is fine as it is)
    ("window(32)", "causal & window(32)"),
    ("causal | window(2)", "own_branch & (causal | window(2))"),
    ("own_branch | window(1) & all_branches | window(3)", "all_branches & (own_branch | window(1) & all_branches | "),
    ("window(3) & window(5)", "causal & window(3) & window(5)"),
    *((f"{name}{more}", None) for name in rules.RULES for more in ("", " & window(3)", " & (window(3) | causal)")),
    ("causal | own_branch | all_branches", None),
]


def refused(**overrides) -> str:
    try:
        plan.check_rules(tiny.config(**overrides))
    except UserError as told:
        return str(told)
    return ""


@pytest.mark.parametrize("draw", ["1-3", "fixed1"])
@pytest.mark.parametrize(("rule", "instead"), CASES)
def test_a_rule_that_shows_the_future_is_refused_by_the_conjunction(rule, instead, draw):
    told = refused(model__rule=rule, data__draw=draw)
    assert bool(told) == bool(instead) and "\n" not in told
    if instead:
        assert told.startswith(f"model.rule = {rule!r} shows a token later ones of its own branch") and instead in told


@pytest.mark.parametrize(("where", "overrides"), [
    ("", dict(model__pattern=((), (("rule", "window(4)"),)))),
    ("evaluate.loss.model: ", dict(evaluate__loss__model=(("rule", "window(4)"),))),
    ("", dict(data__corpus="mqar", data__text_length=40, data__draw="fixed1", data__texts_per_row=1,
              model__rule="window(4)", model__vocabulary=40)),
])  # fmt: skip
def test_so_it_is_in_an_entry_of_the_pattern_in_an_ask_and_in_a_probe(where, overrides):
    assert refused(**overrides).startswith(f"{where}model.rule = 'window(4)' shows a token later ones")


def test_a_cell_is_checked_for_it():
    with pytest.raises(UserError, match="shows a token later ones of its own branch"):
        plan.check(*resolve(tiny.config(model__rule="window(32)")))


@given(st.integers(0, 2**32 - 1), st.sampled_from(["window(2)", "causal", "own_branch", "all_branches | window(1)"]))
def test_what_a_rule_shows_against_a_loop(seed, text):
    at, rule = packs.scattered(np.random.default_rng(seed), 1, 9), rules.parse(text)
    found = False
    for t, s in np.ndindex(9, 9):
        q, k = packs.token(at, 0, t), packs.token(at, 0, s)
        later = q.segment == k.segment >= 0 and q.branch == k.branch and k.time > q.time
        found |= bool(later and rule.visible(q, k))
    assert rules.shows_later(rule, at) == found
