"""Which runs may be subtracted, and which are refused by the field in which they differ."""

import json
import math

import pytest
from studies import change_evaluation, write, write_study

from lab import report
from lab.study import results
from lab.study.judge import pairing

PAIR = {"rope_ratio": [0.0, 1.0]}


def loss(labels, count):
    return 2.0 - labels["rope_ratio"] + 0.001 * count


def changed(directory, change=lambda result: None, rows=lambda rows: None, cell=0, seed=1):
    """Rewrites one result and its rows in a study of two cells and three seeds; returns the differences of the two."""
    write_study(directory, PAIR, loss=loss, counts=(1, 16), seeds=3)
    place = directory / results.collect(directory).plan["cells"][cell]["directory"] / f"seed-{seed}"
    result = json.loads((place / "result.json").read_text())
    change(result)
    write(place / "result.json", result)
    change_evaluation(place, rows)
    return differences(directory)


def differences(directory, judged=()):
    found = pairing.scores(results.collect(directory), judged)
    baseline, other = found.values()
    return pairing.differences([[other], [baseline]], (1, -1))


def test_scores_are_means_over_the_judged_conditions(tmp_path):
    study = results.collect(write_study(tmp_path, PAIR, loss=loss, counts=(1, 16), seeds=2))
    every, one = (pairing.scores(study, judged)["rope_ratio=0.0"][1] for judged in ((), (16,)))
    assert every.loss == pytest.approx(2.0 + 0.001 * 8.5 + 0.01) and every.conditions == (1, 16)
    assert one.loss == pytest.approx(2.016 + 0.01)


def test_pairs_of_a_seed_are_subtracted(tmp_path):
    found = changed(tmp_path)
    assert found.kept == pytest.approx({0: -1.0, 1: -1.0, 2: -1.0}) and not found.refused


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("platform", "gpu"),
        ("device_kind", "another card"),
        ("devices", 4),
        ("implementation", "reference"),
        ("vmapped", True),
        ("text_hash", "ab" * 32),
    ],
)
def test_runs_that_differ_in_more_are_refused_by_field(tmp_path, field, value):
    def change(result):
        where = result if field in result else result["segments"][0]
        where[field] = value

    found = changed(tmp_path, change)
    assert set(found.kept) == {0, 2} and found.refused[1].startswith(field) and str(value) in found.refused[1]


@pytest.mark.parametrize("field", ["platform", "device_kind"])
def test_runs_asked_on_another_device_are_refused(tmp_path, field):
    write_study(tmp_path, PAIR, loss=loss, counts=(1, 16), seeds=2)
    study = results.collect(tmp_path)
    run = next(run for run in study.runs if run.seed == 1)
    run.asked["loss"]["environment"] = run.asked["loss"].get("environment", {}) | {field: "another"}
    baseline, other = pairing.scores(study, ()).values()
    found = pairing.differences([[other], [baseline]], (1, -1))
    assert set(found.kept) == {0} and found.refused[1].startswith(f"{field} where they were asked: ")


def test_a_run_that_read_no_texts_is_paired_with_one_that_did(tmp_path):
    """Weights as a checkpoint has them, before and after they are tuned."""
    found = changed(tmp_path, lambda result: result.update(tokens=0, text_hash="of nothing"))
    assert found.kept == pytest.approx({0: -1.0, 1: -1.0, 2: -1.0}) and not found.refused


def test_runs_that_were_trained_on_other_texts_are_refused(tmp_path):
    """Of two corpora, whose texts have the same numbers."""
    write_study(tmp_path, PAIR, loss=loss, counts=(1,), seeds=2, sections=["curves"])
    for digest, cell in zip(("0a", "0b"), results.collect(tmp_path).plan["cells"], strict=True):
        path = tmp_path / cell["directory"] / "seed-1" / "result.json"
        write(path, json.loads(path.read_text()) | {"data": digest})
    found = differences(tmp_path)
    assert {*found.kept} == {0} and found.refused == {1: "training texts: 0b and 0a"}
    report.rebuild(tmp_path)
    assert "read different training texts" in (tmp_path / "report.md").read_text()


def test_runs_that_were_asked_on_other_texts_are_refused(tmp_path):
    study = results.collect(write_study(tmp_path, PAIR, loss=loss, counts=(1,), seeds=2))
    run = next(run for run in study.runs if run.seed == 1)
    run.asked["loss"]["parts"] = run.asked["loss"]["parts"] | {"data": "0a"}
    one, other = pairing.scores(study, ()).values()
    assert pairing.differences([[other], [one]], (1, -1)).refused == {1: "validation texts: None and 0a"}


@pytest.mark.parametrize(("field", "value", "remedy"), [
    ("vmapped", 3, "study.vmap = 'none', in a --workdir of its own"),
    ("devices", 4, "rm -r 'cells/variant=Q&O L-f/seed-1' in the study's directory, and the study's command"),
])  # fmt: skip
def test_a_remedy_is_one_that_works(tmp_path, field, value, remedy):
    write_study(tmp_path, {"variant": ["a", "b"]}, loss=lambda labels, count: 2.0, counts=(1,), seeds=2)
    study = results.collect(tmp_path)
    run = next(run for run in study.runs if run.seed == 1)
    run.result["segments"][0][field], run.cell["directory"] = value, "cells/variant=Q&O L-f"
    one, other = pairing.scores(study, ()).values()
    (told,) = pairing.differences([[other], [one]], (1, -1)).refused.values()
    assert told.endswith(remedy)


def test_a_result_without_a_hash_is_not_taken_on_trust(tmp_path):
    write_study(tmp_path, PAIR, loss=loss, counts=(1,))
    for path in tmp_path.glob("cells/*/seed-0/result.json"):
        write(path, {name: value for name, value in json.loads(path.read_text()).items() if name != "text_hash"})
    assert "text_hash" in differences(tmp_path).refused[0]


def test_losses_that_are_not_finite_are_none(tmp_path):
    assert set(changed(tmp_path, rows=lambda rows: rows[0].update(loss=math.inf)).kept) == {0, 2}


def test_runs_evaluated_otherwise_are_refused(tmp_path):
    found = changed(tmp_path, rows=lambda rows: rows.pop())
    assert found.refused[1].startswith("conditions: ")


@pytest.mark.parametrize("field", ["platform", "device_kind", "devices", "implementation", "jax", "jaxlib"])
def test_runs_asked_elsewhere_are_refused_by_field(tmp_path, field):
    write_study(tmp_path, PAIR, loss=loss, counts=(1,), seeds=2)
    for cell, value in zip(results.collect(tmp_path).plan["cells"], ("this", "that"), strict=True):
        (path,) = (tmp_path / cell["directory"] / "seed-1").glob("evaluations/loss-*.json")
        write(path, json.loads(path.read_text()) | {"environment": {"platform": "cpu", field: value}})
    found = differences(tmp_path)
    assert {*found.kept} == {0} and found.refused == {1: f"{field} where they were asked: that and this"}


def test_conditions_that_no_run_has_give_no_score(tmp_path):
    write_study(tmp_path, PAIR, loss=loss, counts=(1,), seeds=2)
    assert set(differences(tmp_path, judged=(7,)).refused) == {0, 1}


def test_unfinished_seeds_are_neither_kept_nor_refused(tmp_path):
    write_study(tmp_path, PAIR, loss=loss, counts=(1,), seeds=3, skip={("rope_ratio=1.0", 2)})
    found = differences(tmp_path)
    assert set(found.kept) == {0, 1} and not found.refused


@pytest.mark.parametrize("order", ["same", "other"])
def test_a_longer_run_is_paired_if_it_begins_with_the_same_texts(tmp_path, order):
    found = changed(tmp_path, lambda result: result.update(text_hash="cd" * 32))
    assert 1 in found.refused
    place = results.collect(tmp_path).plan["cells"][0]["directory"]
    path = tmp_path / place / "seed-1" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    shorter = (
        lines[:10] if order == "same" else [lines[0].replace('"text_hash": "a"', '"text_hash": "b"'), *lines[1:10]]
    )
    assert order == "same" or shorter[0] != lines[0]
    path.write_text("\n".join(shorter) + "\n")
    assert (1 in differences(tmp_path).kept) == (order == "same")


def test_sides_of_several_cells_are_averaged_and_crossed(tmp_path):
    values = {"head": ["h8", "h16"], "rope_ratio": [0.0, 1.0]}
    table = {("h8", 0.0): 1.0, ("h8", 1.0): 1.5, ("h16", 0.0): 2.0, ("h16", 1.0): 4.0}
    write_study(tmp_path, values, loss=lambda labels, count: table[tuple(labels.values())], counts=(1,), seeds=2)
    a, b, c, d = pairing.scores(results.collect(tmp_path), ()).values()
    assert pairing.differences([[c, d], [a, b]], (1, -1)).kept == pytest.approx({0: 1.75, 1: 1.75})
    assert pairing.differences([[d], [c], [b], [a]], (1, -1, -1, 1)).kept == pytest.approx({0: 1.5, 1: 1.5})
