"""Reading the directory of a study, done or half done, and the csv files made of it."""

import csv
import json
import math
import random

import pandas as pd
import pytest
from studies import HEADS, plausible, write, write_metrics, write_run, write_study

from lab import storage
from lab.errors import UserError
from lab.study import results


def written(directory):
    results.write_csv(results.collect(directory))
    return (directory / "results.csv").read_bytes()


def test_results_csv_holds_every_loss_exactly_in_the_order_of_the_plan(tmp_path):
    generator = random.Random()
    losses = {}

    def loss(labels, count):
        return losses.setdefault((labels["rope_ratio"], labels["train_branch"], count), generator.uniform(1, 6))

    write_study(tmp_path, loss=loss, counts=(1, 16))
    written(tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["rope_ratio", "train_branch", "seed", "eval_branch", "loss", "ppl", "tokens", "parameters"]
    keys = [(float(row["rope_ratio"]), row["train_branch"], int(row["eval_branch"])) for row in rows]
    assert keys == list(losses)  # the generator was asked in the order of the plan
    assert [float(row["loss"]) for row in rows] == list(losses.values())
    assert [float(row["ppl"]) for row in rows] == [math.exp(loss) for loss in losses.values()]
    assert {row["tokens"] for row in rows} == {"512000"}


def test_results_csv_does_not_depend_on_timings_or_on_when_cells_finished(tmp_path):
    first = written(write_study(tmp_path / "a", seeds=2))
    other = write_study(tmp_path / "b", seeds=2)
    plan = json.loads((other / "plan.json").read_text())
    for cell in reversed(plan["cells"]):
        for seed in reversed(cell["seeds"]):
            write_run(other, cell, seed, speed=random.uniform(1e3, 1e6))
    assert written(other) == first == written(other)
    assert (other / "timings.csv").read_bytes() != (tmp_path / "a" / "timings.csv").read_bytes()


def test_timings_csv_has_training_and_every_condition(tmp_path):
    written(write_study(tmp_path, HEADS, counts=(1, 4)))
    frame = pd.read_csv(tmp_path / "timings.csv")
    assert len(frame) == 30 * 3
    train = frame[frame["phase"] == "train"]
    assert len(train) == 30 and train["eval_branch"].isna().all()
    assert sorted(set(frame[frame["phase"] == "eval"]["eval_branch"])) == [1, 4]


def test_half_done_study_reports_what_each_run_is(tmp_path):
    missing = {("rope_ratio=0.0,train_branch=fixed1", 0), ("rope_ratio=0.0,train_branch=1-15", 0)}
    write_study(tmp_path, skip=missing)
    failed, pending = (tmp_path / cell["directory"] / "seed-0" for cell in plan_of(tmp_path)["cells"][:2])
    write(failed / "failure.json", {"reason": "loss is not finite", "step": 7})
    write_metrics(pending, range(10, 60, 10))
    study = results.collect(tmp_path)
    assert [run.status for run in study.runs] == ["failed", "pending"] + ["done"] * 8
    assert set(study.results["cell"]).isdisjoint(name for name, _ in missing)
    assert study.runs[1].metrics[-1]["step"] == 50


def test_a_result_outweighs_the_failure_of_an_earlier_attempt(tmp_path):
    write_study(tmp_path)
    write(tmp_path / plan_of(tmp_path)["cells"][0]["directory"] / "seed-0" / "failure.json", {"reason": "x", "step": 7})
    assert results.collect(tmp_path).runs[0].status == "done"


def test_metrics_of_a_killed_and_resumed_run_have_each_step_once(tmp_path):
    write_study(tmp_path)
    path = tmp_path / plan_of(tmp_path)["cells"][0]["directory"] / "seed-0" / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 3.0}\n{"step": 20, "loss": 9.0}\n{"step": 20, "loss": 2.5}\n{"step": 30, "lo')
    run = results.collect(tmp_path).runs[0]
    assert [(line["step"], line["loss"]) for line in run.metrics] == [(10, 3.0), (20, 2.5)]
    curves = results.collect(tmp_path).curves
    assert len(curves[curves["cell"] == run.cell["name"]]) == 2


def test_overflowing_perplexity_is_infinite(tmp_path):
    write_study(tmp_path, loss=lambda labels, count: 1e4, counts=(1,))
    assert set(results.collect(tmp_path).results["ppl"]) == {math.inf}


def test_bad_directories_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no plan\.json"):
        results.collect(tmp_path)
    write_study(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json is damaged"):
        results.collect(tmp_path)
    write_study(tmp_path, published="configs/published/none.csv")
    with pytest.raises(UserError, match=r"none\.csv"):
        results.collect(tmp_path).published()


def test_atomic_write_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = storage.write_atomically(tmp_path / "a" / "page.md", b"old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        storage.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_plausible_losses_show_the_published_shape():
    """The made-up losses of the other tests are such that their recommendations are known."""
    flat, steep = ({"rope_ratio": ratio, "train_branch": "1-15"} for ratio in (1.0, 0.0))
    assert plausible(flat, 64) - plausible(flat, 1) < 0.15 < 1 < plausible(steep, 64) - plausible(steep, 1)


def plan_of(directory):
    return json.loads((directory / "plan.json").read_text())
