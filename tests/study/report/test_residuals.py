"""What cells cost beside their losses, and how the sides of a comparison differ in it."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies import branches, write, write_study
from test_verdicts import CONTRAST, STUDY, VALUES, loss, noise, table

from lab import report
from lab.study import numbers, results
from lab.study.judge import evidence, residuals

NUMBERS = st.integers(1, 10**12)
CELLS = st.builds(
    lambda parameters, flops, tokens, cache, work: {
        "parameters": parameters,
        "train_flops_per_token": float(flops),
        "tokens": tokens,
        "cache_per_token_per_layer": cache,
        "attention_work": work,
    },
    *[NUMBERS] * 5,
)
SIDES = st.lists(CELLS, min_size=1, max_size=4)
COLUMNS = ["parameters", "training FLOPs", "cache", "attention work"]
FACTOR = dict.fromkeys(VALUES["rope_ratio"], 1.0) | {0.5: 1.25, 1.0: 2.0}  # of every cost, by rope_ratio


def costs(side):
    """[4]: the means over a side's cells."""
    flops = [cell["train_flops_per_token"] * cell["tokens"] for cell in side]
    others = [[cell[name] for cell in side] for name in ("parameters", "cache_per_token_per_layer", "attention_work")]
    return np.array([np.mean(others[0]), np.mean(flops), np.mean(others[1]), np.mean(others[2])])


@given(SIDES, SIDES)
def test_two_sides_against_numpy(plus, minus):
    found = residuals.residuals([plus, minus])
    assert list(found) == COLUMNS
    np.testing.assert_allclose(list(found.values()), costs(plus) / costs(minus) - 1, rtol=1e-9, atol=1e-9)


@given(SIDES, SIDES, SIDES, SIDES)
def test_four_sides_against_numpy(a, b, c, d):
    each = np.array(list(map(costs, (a, b, c, d))))
    expected = (each[0] - each[1] - each[2] + each[3]) / each.mean(axis=0)
    np.testing.assert_allclose(list(residuals.residuals([a, b, c, d]).values()), expected, rtol=1e-9, atol=1e-9)


@given(SIDES, SIDES)
def test_sides_that_cost_the_same_differ_by_nothing(one, other):
    assert set(residuals.residuals([one, one[::-1]]).values()) == {0.0}
    assert set(residuals.residuals([one, other, one, other]).values()) == {0.0}


def test_a_reference_that_costs_nothing_and_a_plan_that_says_nothing():
    cell = {"parameters": 5, "train_flops_per_token": 1.0, "tokens": 2, "cache_per_token_per_layer": 4}
    found = residuals.residuals([[cell], [cell | {"cache_per_token_per_layer": 0}]])
    assert found["parameters"] == 0.0 and found["cache"] == math.inf and math.isnan(found["attention work"])
    assert residuals.relative(found) == ["+0.0%", "+0.0%", "+inf%", "—"]


@pytest.mark.parametrize(("value", "text"), [(0.1234, "+12.3%"), (-0.5, "-50.0%"), (-1e-9, "+0.0%"), (2.5, "+250.0%")])
def test_residuals_are_per_cents(value, text):
    assert residuals.percent(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (1.93e6, "1.93 M"), (999_999, "1 M"), (1e20, "100 E"), (1.6e10 * 6e9, "96 E"), (3e21, "3 Z"), (576, "576"),
    (999.9, "1 k"), (0.0123, "0.0123"), (0, "0"), (math.nan, "—"),
])  # fmt: skip
def test_short_numbers(value, text):
    assert numbers.short(value) == text


@pytest.mark.parametrize(("value", "text"), [(4096, "4,096"), (512.0, "512"), (341.3333, "341.3"), (math.nan, "—")])
def test_whole_numbers(value, text):
    assert numbers.whole(value) == text


def made(directory, study=STUDY, changed=lambda cell: {}, **options):
    """A study whose cells cost FACTOR times those of rope_ratio 0."""
    options = {"values": VALUES, "loss": loss, "counts": (1, 16), "seeds": 4, "noise": noise} | options
    write_study(directory, study=study, **options)
    plan = json.loads((directory / "plan.json").read_text())
    for cell in plan["cells"]:
        factor = FACTOR[cell["labels"]["rope_ratio"]]
        names = ("parameters", "train_flops_per_token", "cache_per_token_per_layer", "attention_work")
        cell |= {name: factor * cell[name] for name in names} | changed(cell)
    write(directory / "plan.json", plan)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    directory = made(tmp_path_factory.mktemp("study"), sections=(branches(VALUES), "curves"))
    report.rebuild(directory)
    return (directory / "report.md").read_text()


def test_costs_stand_beside_every_cell_with_what_they_are_of_the_baselines(text):
    rows = {row["rope_ratio"]: row for row in table(text, "rope_ratio")}
    assert [rows["0.0"][name] for name in COLUMNS] == ["297 k", "988 G", "48", "192"]
    assert [rows["0.5"][name] for name in COLUMNS] == [
        "372 k (+25.0%)",
        "1.24 T (+25.0%)",
        "60 (+25.0%)",
        "240 (+25.0%)",
    ]
    assert {rows["1.0"][name].split(" (")[1] for name in COLUMNS} == {"+100.0%)"}


def test_contrasts_and_evidence_show_their_residuals(text):
    assert [table(text, "contrast")[0][name] for name in COLUMNS] == ["+100.0%"] * 4
    overall, single = table(text, "claim")
    assert [single[name] for name in COLUMNS] == ["+100.0%"] * 4 and {overall[name] for name in COLUMNS} == {"—"}


@pytest.mark.parametrize("parts", [("curves",), (branches(VALUES),), ("series",)])
@pytest.mark.parametrize("alike", [False, True])
def test_no_section_has_losses_without_costs(tmp_path, parts, alike):
    """Whether cells differ in what they cost (columns) or not (a line)."""
    if alike:
        write_study(tmp_path, VALUES, loss, (1, 16), 2, study=STUDY, noise=noise, sections=parts)
    else:
        made(tmp_path, sections=parts, seeds=2)
    report.rebuild(tmp_path)
    with_losses = 0
    for part in (tmp_path / "report.md").read_text().split("\n## ")[1:]:
        header = [line for line in part.splitlines() if line.startswith("| ")]
        losses = any(f" {word} |" in line for line in header for word in ("loss", "difference", "1 | 16"))
        if losses and not part.startswith("Learning curves"):
            with_losses += 1
            named = all(name in part for name in COLUMNS)
            numbers = "297 k" in part or "+100.0%" in part or "+0.0%" in part
            assert named and numbers, part
    assert with_losses >= 2


def test_comparisons_csv_has_the_residuals(tmp_path):
    factorial = tuple(
        (("rope_ratio", ratio), ("train_branch", draw))
        for ratio, draw in itertools.product((1.0, 0.0), ("1-15", "fixed1"))
    )
    asked = STUDY | {"contrasts": (CONTRAST, ("together", *factorial))}
    directory = made(tmp_path, asked, lambda cell: {"tokens": 512000 * (1 + (cell["labels"] == dict(factorial[0])))})
    study = results.collect(directory)
    path = evidence.write_csv(directory / "comparisons.csv", evidence.find(study).comparisons)
    with open(path, newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    names = ["residual_parameters", "residual_flops", "residual_cache", "residual_attention_work"]
    found = {name: [float(row[column]) for column in names] for name, row in rows.items()}
    # The cell of ratio 1.0 on 1-15 costs 2 and trains twice as long: FLOPs 4, of its side (4 + 2) / 2, of all four 8.
    assert found["rope_ratio=0.5,train_branch=fixed1"] == pytest.approx([0.25] * 4)
    assert found["rope_ratio=1.0,train_branch=1-15"] == pytest.approx([1, 3, 1, 1])
    assert found["all or nothing"] == pytest.approx([1, 2, 1, 1])
    assert found["together"] == pytest.approx([0, (4 - 2) / ((4 + 2 + 1 + 1) / 4), 0, 0])


def test_a_plan_without_attention_work_has_a_report(tmp_path):
    """As plans were before it was counted."""
    directory = write_study(tmp_path, VALUES, loss, (1, 16), 2, study=STUDY, noise=noise)
    plan = json.loads((directory / "plan.json").read_text())
    for cell in plan["cells"]:
        for later in ("attention_work", "cache_bytes_per_token", "intensity_training", "intensity_decoding"):
            del cell[later]
    write(directory / "plan.json", plan)
    report.rebuild(directory)
    rows = table((directory / "report.md").read_text(), "rope_ratio")
    assert "of decoding" not in (directory / "report.md").read_text()
    assert {row["attention work"] for row in rows} == {"—"} and {row["cache"] for row in rows} == {"48", "48 (+0.0%)"}
    with open(directory / "comparisons.csv", newline="") as file:
        assert {row["residual_attention_work"] for row in csv.DictReader(file)} == {""}


def test_a_recurrent_state_is_shown_with_the_cache(tmp_path):
    state = lambda cell: {"state_per_layer": 1024 if cell["labels"]["rope_ratio"] else 0}  # noqa: E731
    report.rebuild(made(tmp_path, changed=state))
    text = (tmp_path / "report.md").read_text()
    assert {row["cache"] for row in table(text, "rope_ratio")} == {
        "48", "60 + 1,024 a row (+25.0%)", "96 + 1,024 a row (+100.0%)"
    }  # fmt: skip
    assert "state per row and layer" in text


def test_studies_side_by_side_show_costs_and_residuals(tmp_path):
    directories = [str(made(tmp_path / "a")), str(made(tmp_path / "b", changed=lambda cell: {"parameters": 594816}))]
    report.main([*directories, "--output", str(tmp_path)])
    text = (tmp_path / "comparison.md").read_text()
    assert {row["parameters"] for row in table(text, "study")} == {"297 k", "372 k", "595 k"}
    found = {row["cell"].split("rope_ratio=")[1][:3]: row for row in table(text, "cell | seeds")}
    assert [found[ratio]["parameters"] for ratio in ("0.0", "0.5", "1.0")] == ["+100.0%", "+60.0%", "+0.0%"]
    assert {row["cache"] for row in found.values()} == {"+0.0%"}
