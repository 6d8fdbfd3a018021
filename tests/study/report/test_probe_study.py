"""Probes from the command line to the report: what cannot have an ability is told from what has it."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from studies import change_evaluation, write_study

from lab.study import results
from lab.study.report import accuracy


def test_accuracies_reach_the_csv_and_the_report(tmp_path):
    values = {"rope_ratio": [0.0, 1.0]}
    directory = write_study(tmp_path, values=values, loss=lambda labels, count: 1.0, counts=(2, 4), seeds=2)
    text = "No accuracy has been recorded yet."
    assert [block.text for block in accuracy.section(results.collect(directory))] == [text]
    assert "accuracy" not in results.collect(directory).results.columns
    for path in directory.glob("cells/*/seed-*/result.json"):
        result = json.loads(path.read_text())

        def answered(rows, ratio=result["labels"]["rope_ratio"], seed=result["seed"]):
            for row in rows:
                row["accuracy"] = ratio / row["eval_branch"] + 0.1 * seed

        change_evaluation(path.parent, answered)
    study = results.collect(directory)
    results.write_csv(study)
    assert pd.read_csv(directory / "results.csv")["accuracy"].tolist() == pytest.approx(
        [0, 0, 0.1, 0.1, 0.5, 0.25, 0.6, 0.35]
    )
    (table,) = accuracy.section(study)
    assert table.columns == ["rope_ratio", "2", "4"]
    assert table.rows == [["0.0", "5.0%", "5.0%"], ["1.0", "55.0%", "30.0%"]]


@pytest.mark.whole
@pytest.mark.slow
def test_the_cpu_study_separates_its_variants(tmp_path):
    command = [sys.executable, "-m", "lab.main", "--config=configs/probes.py", f"--workdir={tmp_path / 'probes'}"]
    subprocess.run(command, check=True, capture_output=True)
    frame = pd.read_csv(tmp_path / "probes" / "results.csv")
    found = frame.set_index(["probe", "model", "difficulty"])["accuracy"]
    for difficulty in (4, 8, 12):
        for probe in ("induction", "mqar", "needle"):
            assert found[probe, "full", difficulty] > 0.95
        assert found["needle", "1 layer", difficulty] > 0.95  # recall alone needs no second layer
        for probe in ("induction", "mqar"):
            for model in ("1 layer", "causal & window(4)"):
                assert found[probe, model, difficulty] < 2 / difficulty  # little more than any of those seen
    assert found["needle", "causal & window(4)", 4] > 0.95  # two layers of it reach six tokens back
    assert found["needle", "causal & window(4)", 8] < 0.2
    assert "Share of answers that are right" in (tmp_path / "probes" / "report.md").read_text()
