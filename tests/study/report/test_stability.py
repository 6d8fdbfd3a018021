"""The section on stability: what was measured, which run failed first, and the gradient of each layer."""

import json
import math
import types

import numpy as np
import pytest
from studies import write, write_run, write_study
from test_live import checked
from test_report import rows_of

from lab import report
from lab.study import results
from lab.study.judge import spikes
from lab.study.report import figures, live, stability
from lab.study.run import study as run_study
from lab.train import loop

VARIANTS = {"variant": ["pre", "post", "broken", "later"]}
STEPS = 80


def measured(place: int, seed: int, step: int) -> dict:
    """Of two layers, the second without softmax; something in it is the largest at a step of its own."""
    return {
        "activation": [1.0, 2.0 + (step == 19)],
        "attention_max": [10.0 * place + seed + (step == 39), None],
        "attention_entropy": [1.0 + place + seed, None],
        "log_z_max": 3.0,
        "gradient": [1.0, 10.0 ** (place + seed)] if step == 0 else [2.0, 4.0],
        "update": [0.01, 0.02],
        "weight": [3.0, 4.0 + place + (step == 79)],
        "spikes": 0,
    }


@pytest.fixture
def study(tmp_path):
    """Four cells of two seeds: one is whole, one has measured nothing but spikes, two have failed in one seed."""
    write_study(tmp_path, VARIANTS, lambda labels, count: 2.0, (1,), 2, sections=("stability",),
                skip={("variant=broken", 1), ("variant=later", 0)})  # fmt: skip
    for place, cell in enumerate(results.collect(tmp_path).plan["cells"]):
        for seed in cell["seeds"]:
            failed = {("broken", 1): 30, ("later", 0): 50}.get((cell["labels"]["variant"], seed))
            lines = [{"step": step, "loss": 2 + 0.01 * math.sin(step)} for step in range(failed or STEPS)]
            lines[25]["loss"] += 5 * (place == 1)
            for line in lines:
                if line["step"] in (0, 19, 39, 59, 79) and place != 3:
                    line["instruments"] = measured(place, seed, line["step"])
            run = tmp_path / cell["directory"] / f"seed-{seed}"
            run.mkdir(parents=True, exist_ok=True)
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            if failed:
                write(run / "failure.json", {"reason": f"step {failed}: loss nan", "step": failed})
    return tmp_path


def rows(directory) -> dict[str, dict]:
    report.rebuild(directory)
    text = (directory / "report.md").read_text().replace("## Stability", "### Stability")
    return {row["variant"]: row for row in rows_of(text, "Stability")}


def test_a_row_has_the_largest_the_last_and_what_failed(study):
    pre, post, broken, later = rows(study).values()
    assert pre["largest attention score"] == "2.0" and post["largest attention score"] == "12.0"
    assert (pre["attention entropy at the end"], post["attention entropy at the end"]) == ("1.500", "2.500")
    assert pre["largest activation"] == "3.0" and pre["largest update / weights"] == "0.0200"
    assert pre["gradient, last / first layer at the start"] == "5.50"  # of 1 and 10
    assert pre["training loss at the end"] == f"{2 + sum(0.01 * math.sin(x) for x in range(72, 80)) / 8:.3f}"
    assert pre["norm of a layer's weights at the end"] == "4.00"  # of 3 and 5
    assert post["norm of a layer's weights at the end"] == "4.50" and stability.SLOWER not in pre
    assert (pre["spikes"], post["spikes"]) == ("0.0", "1.0") and spikes.spikes([2.0] * 30 + [9.0]) == [30]
    assert (pre["failed"], broken["failed"], later["failed"]) == (
        "none", "1 of 2, first at step 30", "1 of 2, first at step 50"
    )  # fmt: skip
    assert {later[name] for name in ("largest attention score", "largest log Z", "largest update / weights")} == {"—"}
    told = "**Failed first**: variant broken, seed 1 at step 30; variant later, seed 0 at step 50."
    assert told in (study / "report.md").read_text()


def test_the_gradient_of_each_layer_is_drawn_at_both_ends(study, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "by_label", lambda *given: drawn.append(given) or figures.Figure())
    stability.section(results.collect(study))
    (((panels,), axis, vertical),) = drawn
    assert (axis, vertical) == ("layer", "log10 of the norm of its gradient")
    first, last = panels.values()
    assert [*first] == [*last] == ["pre", "post", "broken"]
    for place, curve in enumerate(first.values()):
        np.testing.assert_allclose([curve[0], curve[1]], [0, np.log10((10**place + 10 ** (place + 1)) / 2)], atol=1e-9)
    assert all(curve == pytest.approx({0: np.log10(2), 1: np.log10(4)}) for curve in last.values())
    (panel, _) = checked(live.by_label([panels], axis, vertical))
    assert panel["layout"]["yaxis"]["title"]["text"] == vertical and len(panel["data"]) == 3


def test_a_study_that_measured_nothing_has_its_spikes_and_failures(tmp_path):
    write_study(tmp_path, {"variant": ["a"]}, lambda labels, count: 2.0, (1,), sections=("stability",))
    of_steps = {step: 2.0 + 3.5 * 20 / (20 + step) for step in (240, 250)}  # as write_study has it; a tenth of 25
    shown = f"{sum(of_steps.values()) / 2:.3f}"
    assert rows(tmp_path) == {"a": {"variant": "a", "training loss at the end": shown, "spikes": "0", "failed": "no"}}


def test_a_step_that_takes_longer_than_the_baselines_says_by_how_much(tmp_path):
    of = {"variant": ["pre", "post", "pending"]}
    study = {"baseline": (("variant", "pre"),)}
    write_study(tmp_path, of, lambda labels, count: 2.0, (1,), sections=("stability",), study=study,
                skip={("variant=pending", 0)})  # fmt: skip
    write_run(tmp_path, results.collect(tmp_path).plan["cells"][1], 0, lambda labels, count: 2.0, (1,), speed=36000.0)
    found = rows(tmp_path)
    assert found["post"][stability.SLOWER] == "+25.0%" and found["pre"][stability.SLOWER] == "—"  # 45,000 and 36,000
    assert "pending" not in found


def test_before_the_first_step_there_is_nothing_to_say(tmp_path):
    every = {("variant=a", 0)}
    write_study(tmp_path, {"variant": ["a"]}, lambda labels, count: 2.0, (1,), sections=("stability",), skip=every)
    report.rebuild(tmp_path)
    assert "No step has been logged yet." in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(("step", "kept"), [(7, {"step": 7}), (None, {})], ids=["of training", "of an ask"])
def test_a_failure_is_written_down_with_its_step(tmp_path, step, kept):
    run = types.SimpleNamespace(directory=tmp_path, name="a")
    display = types.SimpleNamespace(finish_run=lambda *_, fresh: None)
    run_study._fail(run, loop.NonFinite("loss nan", 0, step), display)
    failure = results.failed(tmp_path)
    assert failure == {"reason": "loss nan", **kept}
