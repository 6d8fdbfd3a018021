"""What is compared with what, and every way of asking for something that is not there."""

import itertools
import json

import pytest
from ml_collections import ConfigDict

from lab.config import base
from lab.errors import UserError
from lab.study.define import contrasts

CELLS = {f"{part}-{width}": {"part": part, "width": width} for part, width in itertools.product(("a", "b"), (1, 2, 4))}
ONE, TWO = (("width", 1),), (("width", 2),)


def asked(**study):
    config = base()
    config.study.update(study)
    return config.study


def test_every_part_has_its_own_baseline():
    found = contrasts.baselines(CELLS, ONE)
    assert found == {"a-2": "a-1", "a-4": "a-1", "b-2": "b-1", "b-4": "b-1"}
    assert set(contrasts.baselines(CELLS, (("part", "a"), ("width", 1))).values()) == {"a-1"}
    assert contrasts.baselines(CELLS, ()) == {}


def test_cells_whose_part_lacks_the_baseline_are_left_out():
    cells = CELLS | {"c-8": {"part": "c", "width": 8}}
    assert "c-8" not in contrasts.baselines(cells, ONE)


def test_selections_are_by_one_value_or_several():
    assert contrasts.select(CELLS, (("part", "a"), ("width", (1, 4)))) == ["a-1", "a-4"]
    assert contrasts.select(CELLS, ()) == list(CELLS)


def test_values_that_are_tuples_survive_json():
    """plan.json has lists where the config has tuples."""
    written = {"x": {"pattern": ["window", 4]}, "y": {"pattern": ["full"]}}
    assert contrasts.select(written, (("pattern", ("window", 4)),)) == ["x"]
    study = {"baseline": [["pattern", ["window", 4]]], "contrasts": [["c", [["pattern", ["full"]]], []]]}
    found = contrasts.settings(study)
    assert found.baseline == (("pattern", ("window", 4)),)
    assert found.contrasts[0].sides == ((("pattern", ("full",)),), ())
    assert contrasts.baselines(written, found.baseline) == {"y": "x"}


def test_a_config_and_its_json_ask_for_the_same():
    study = asked(
        judged=(1, 16),
        baseline=ONE,
        contrasts=(("narrow", ONE, TWO), ("crossed", ONE, TWO, (("part", "a"),), (("part", "b"),))),
        hypotheses=(("narrow is better", (("single", "narrow", -1),)),),
    )
    kept = ConfigDict({"study": study}).to_json_best_effort()
    contrasts.check(study, CELLS, (1, 4, 16))
    assert contrasts.settings(json.loads(kept)["study"]) == contrasts.settings(study)


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"baseline": (("widht", 1),)}, "did you mean 'width'"),
        ({"baseline": (("width", 3),)}, "width = 3 is unknown.*1, 2, 4"),
        ({"baseline": ("width", 1)}, r"study.baseline = \(.width., 1\) is no tuple \(\(str, object\), ...\)"),
        ({"judged": (3,)}, "judged = 3 is unknown.*1, 16"),
        (
            {"contrasts": (("narrow", ONE),)},
            r"study.contrasts = .* is no tuple .*: \(name, plus, minus\) or \(name, a, b, c, d\)",
        ),
        ({"contrasts": (("narrow", ONE, ("width", 1)),)}, "study.contrasts = .*'narrow'.* is no tuple"),
        ({"contrasts": (("narrow", ONE, (("width", (2, 3)),)),)}, "width = 3 is unknown"),
        ({"contrasts": (("narrow", ONE, (("part", "b"), ("width", 9))),)}, "width = 9 is unknown"),
        ({"contrasts": (("same", ONE, ONE),)}, "width 1 and width 1 are the same cells"),
        ({"contrasts": (("one", ONE, TWO), ("one", TWO, ONE))}, "two named 'one'"),
        ({"contrasts": (("one", ONE, TWO),), "hypotheses": (("x", (("single", "on", 1),)),)}, "did you mean 'one'"),
        ({"contrasts": (("one", ONE, TWO),), "hypotheses": (("x", (("double", "one", 1),)),)}, "single, crossed, al"),
        (
            {"contrasts": (("one", ONE, TWO),), "hypotheses": (("x", (("single", "one", 0),)),)},
            "a sign in study.hypotheses = 0",
        ),
        (
            {"contrasts": (("one", ONE, TWO),), "hypotheses": (("x", ("single", "one", 1)),)},
            r"study.hypotheses = .* is no tuple .*: \(claim, ",
        ),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(study, message):
    with pytest.raises(UserError, match=message) as error:
        contrasts.check(asked(**study), CELLS, (1, 16))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("sides", "found"), [
    ([[{"a": 1, "b": 2}], [{"a": 1, "b": 3}]], {"b": ("2", "3")}),
    ([[{"a": 1}], [{"a": 1}]], {}),
    ([[{"a": "x", "of x": 3}], [{"a": "y"}]], {"a": ("x", "y")}),  # an option of x goes with its name
    ([[{"a": 1, "b": 1}, {"a": 1, "b": 2}], [{"a": 2, "b": 2}, {"a": 2, "b": 1}]], {"a": ("1", "2")}),  # crossed
    ([[{"a": 2, "b": 2}], [{"a": 1, "b": 2}], [{"a": 2, "b": 1}], [{"a": 1, "b": 1}]],
     {"a": ("2", "1", "2", "1"), "b": ("2", "2", "1", "1")}),
])  # fmt: skip
def test_a_contrast_says_in_which_fields_its_sides_differ(sides, found):
    assert contrasts.differing(sides) == found


def test_a_baseline_without_a_cell_names_the_nearest():
    cells = {name: CELLS[name] for name in ("a-2", "b-1", "b-4")}
    with pytest.raises(UserError, match=r"part a, width 1 matches no cell; the nearest is (a-2|b-1)"):
        contrasts.check(asked(baseline=(("part", "a"), ("width", 1))), cells, (1,))


def test_a_study_that_asks_for_nothing_passes():
    assert not contrasts.settings({})
    contrasts.check(asked(), CELLS, (1,))
