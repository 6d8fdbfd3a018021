"""Every field that is a tuple, given another shape or anything inside: one line that names it, or a plan."""

import contextlib

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import UserError
from lab.options import set_field
from lab.study.open import open as open_study

A, B = (("variant", "a"),), (("variant", "b"),)
MATCH = (("to", "a"), ("on", "parameters"), ("by", "model.feedforward.width"), ("multiple", 2))
GOOD = {
    "study.cells": ((("name", "a"), ("model.dim", 16)), (("name", "b"), ("model.dim", 32), ("match", MATCH))),
    "study.labels": (("name", "variant"),),
    "study.groups": (("one", ("a", "b")),),
    "study.sections": ("curves", ("branches", "variant", "variant")),
    "study.judged": (1, 2),
    "study.baseline": A,
    "study.contrasts": (("c", A, B), ("d", A, B, B, A)),
    "study.hypotheses": (("x", (("single", "c", 1),)),),
    "study.tune": (("train.learning_rate", (1e-3, 2e-3)),),
    "model.pattern": ((), (("mixer.heads", 4), ("rule", "causal"))),
    "evaluate.loss.branches": (1, 2),
    "evaluate.loss.model": (("position.theta", 9.0),),
    "train.muon.on": ("q",),
}


def planned(field: str, value) -> str:
    """What a user is told of a study with this value; "" if it plans."""
    made = tiny.config()
    made.study.update(name="tiny", cells=GOOD["study.cells"], labels=GOOD["study.labels"])
    if field == "study.hypotheses":
        made.study.contrasts = GOOD["study.contrasts"]
    if field == "train.muon.on":
        made.train.optimizer = "muon"
    with contextlib.suppress(TypeError):  # in the config's own line, which its loading names
        set_field(made, field, value)
        try:
            open_study(made)
        except UserError as told:
            return str(told)
    return ""


def test_the_shapes_that_are_meant_plan():
    made = tiny.config(train__optimizer="muon", **{name.replace(".", "__"): value for name, value in GOOD.items()})
    made.study.name, made.study.cells = "tiny", tuple(cell[:2] for cell in GOOD["study.cells"])  # solving takes seconds
    assert [row["name"] for row in open_study(made).rows] == ["variant=a", "variant=b"]


@pytest.mark.parametrize(("field", "value", "says"), [
    ("study.tune", (("train.learning_rate", (1e-3, [2e-3])),), "study.tune = (('train.learning_rate', (0.001, [0.002"),
    ("study.tune", (("train.learning_rate", 1e-3),), "is no tuple ((str, (object, ...)), ...): (field, values), ..."),
    ("study.cells", ((("name", ["a"]),),), "study.cells = ((('name', ['a']),),) is no tuple (((str, object), ...), "),
    ("study.cells", ((("name", 3),),), "a name in study.cells = 3 is no str"),
    ("study.cells", ((("match", True),),), "a match = True is no tuple ((str, object), ...): (key, value), ..."),
    ("study.cells", ((("match", ((), *MATCH)),),), "a match = ((), ('to', 'a'), "),
    ("study.cells", ((("match", (("to", (1,)), *MATCH[1:])),),), "to (of a match) = (1,) is no str or ((str, object)"),
    ("study.cells", ((("match", (*MATCH[:3], ("multiple", 0.5))),),), "multiple (of a match) = 0.5 is no int"),
    ("study.cells", ((("train.learning_rate", 10**400),),), "a cell of the study sets train.learning_rate = "),
    ("study.sections", ((),), "study.sections = '' is unknown; choose one of: accuracy, branches"),
    ("study.contrasts", (("c", A, B, A),), "is no tuple ((str, ((str, object), ...), ((str, object), ...)) or "),
    ("model.pattern", ((("mixer.heads", {"a.b": 1}),),), "model.pattern = ((('mixer.heads', {'a.b': 1}),),) is no "),
    ("evaluate.loss.model", (("position.theta", {}),), "evaluate.loss.model = (('position.theta', {}),) is no tuple"),
], ids=str)  # fmt: skip
def test_another_shape_is_refused_in_one_line(field, value, says):
    told = planned(field, value)
    assert says in told and "\n" not in told


def places(value, at=()):
    """Where a value has parts, itself among them."""
    return (
        [at, *(place for i, x in enumerate(value) for place in places(x, (*at, i)))] if type(value) is tuple else [at]
    )


def put(value, at, new):
    return (*value[: at[0]], put(value[at[0]], at[1:], new), *value[at[0] + 1 :]) if at else new


WORDS = st.sampled_from(["name", "match", "single", "variant", "model.dim", "train.learning_rate", "a", "", "a\nb"])
LEAVES = WORDS | st.integers(-2, 3) | st.floats() | st.none() | st.booleans() | st.sampled_from([10**400, b"x", 2**31])
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=2)
        | st.dictionaries(WORDS, inner, max_size=2)
        | st.frozensets(LEAVES, max_size=2)
    ),
    max_leaves=6,
)


@settings(max_examples=25)
@given(st.sampled_from([(field, at) for field, good in GOOD.items() for at in places(good)]), ANYTHING)
def test_nothing_but_a_line_comes_of_anything_at_any_place(where, new):
    field, at = where
    assert "\n" not in planned(field, put(GOOD[field], at, new))
