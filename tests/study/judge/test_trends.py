"""Whether an ordering of training losses holds all along, or only at the end."""

import json

import numpy as np
import pytest
from studies import write_study

from lab.study import results
from lab.study.judge import evidence, trends
from lab.study.judge.trends import Trend, reading

PAIR = {"rope_ratio": [0.0, 1.0]}
STUDY = {"baseline": (("rope_ratio", 0.0),)}


def curve(mean, half=0.01):
    """Three seeds around a mean, apart by `half`."""
    mean = np.asarray(mean, float)
    return Trend(np.arange(1, len(mean) + 1) * 1000.0, mean + np.array([[-half], [0.0], [half]]))


@pytest.mark.parametrize(
    ("mean", "words"),
    [
        ([-0.05] * 20, "lower through training"),
        ([0.05] * 20, "higher through training"),
        ([0.001] * 2 + [-0.05] * 18, "lower from the first 10% of training on"),
        ([0.05] * 10 + [-0.05] * 10, "lower from 11 k tokens on"),
        ([0.001] * 18 + [-0.05] * 2, "lower only at the end, from 19 k tokens on"),
        ([-0.05] * 18 + [0.0] * 2, "cannot tell: the interval of the end holds 0"),
        ([-0.05] * 10 + [-0.001] + [-0.05] * 9, "lower through training"),  # one noisy bin does not matter
        ([0.0] * 20, "cannot tell: the interval of the end holds 0"),
    ],
)
def test_readings(mean, words):
    assert reading(curve(mean)) == words


def test_seeds_that_do_not_differ_tell_nothing():
    values = -0.05 + 1e-8 * np.arange(60).reshape(3, 20)
    assert reading(Trend(np.arange(20.0), values, resolution=2.4e-7)) == "cannot tell: the seeds do not differ"
    assert reading(Trend(np.arange(20.0), values)) == "lower through training"


def test_one_seed_has_no_reading():
    trend = Trend(np.ones(3), np.ones((1, 3)))
    assert trend.half is None and reading(trend).startswith("one seed")


def found(directory, change=None, seeds=3):
    write_study(directory, PAIR, lambda labels, count: 2.0, (1,), seeds, study=STUDY, sections=("curves",))
    for cell in results.collect(directory).plan["cells"]:
        for seed in range(seeds):
            path = directory / cell["directory"] / f"seed-{seed}" / "metrics.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            lines = [change(cell["labels"]["rope_ratio"], seed, line) for line in lines] if change else lines
            path.write_text("".join(json.dumps(line) + "\n" for line in lines if line))
    findings = evidence.find(results.collect(directory))
    return trends.trend(findings, findings.comparisons[0])


def test_differences_are_taken_step_by_step_within_a_seed(tmp_path):
    """0.001 nats lower for each step, more or less by seed; whatever the seeds share is taken out."""

    def change(ratio, seed, line):
        return line | {"loss": line["loss"] + 3.0 * seed - ratio * line["step"] * 0.001 * (1 + 0.1 * (seed - 1))}

    trend = found(tmp_path, change)
    steps = np.arange(10, 251, 10)
    np.testing.assert_allclose(trend.mean, -0.001 * steps, atol=1e-9)
    np.testing.assert_allclose(trend.tokens, 2048 * np.arange(1, 26))
    spread = 0.001 * steps * np.std([0.9, 1.0, 1.1], ddof=1)
    np.testing.assert_allclose(trend.half, 4.302653 * spread / np.sqrt(3), rtol=1e-5)


def test_runs_of_other_lengths_are_compared_where_both_have_steps(tmp_path):
    trend = found(tmp_path, lambda ratio, seed, line: line if ratio or line["step"] <= 100 else None)
    assert len(trend.mean) == 10 and trend.tokens[-1] == 2048 * 10


def test_no_steps_no_trend(tmp_path):
    assert found(tmp_path, lambda ratio, seed, line: None) is None
