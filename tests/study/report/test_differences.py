"""Comparisons at each condition: what the rows of runs say, by t intervals of their own."""

import numpy as np
import pytest
from scipy import stats
from studies import write_study
from test_verdicts import table

from lab import report

VALUES = {"rope_ratio": [0.0, 1.0], "train_branch": ["1-15"]}
CONTRAST = ("all or nothing", (("rope_ratio", 1.0),), (("rope_ratio", 0.0),))
COUNTS, SEEDS = (1, 8, 64), 4
MOVED = {1: 0.001, 8: -0.2, 64: 0.3}  # of ratio 1 from ratio 0


def loss(labels, count):
    return 2.0 + 0.01 * count + (labels["rope_ratio"] == 1.0) * MOVED[count]


def noise(labels, seed):
    """Alike for all counts, so that each has the same interval about its own mean."""
    return (labels["rope_ratio"] == 1.0) * [0.01, -0.02, 0.005, 0.005][seed]


def written(place, **made) -> str:
    report.rebuild(write_study(place, VALUES, loss=loss, counts=COUNTS, **made))
    return (place / "report.md").read_text()


def test_each_count_has_its_own_interval(tmp_path):
    asked = {"contrasts": (CONTRAST,), "judged": (8,)}
    text = written(tmp_path, seeds=SEEDS, noise=noise, sections=["differences", "curves"], study=asked)
    (row,) = table(text, "comparison")
    values = np.array([noise({"rope_ratio": 1.0}, seed) for seed in range(SEEDS)])
    half = stats.t.ppf(0.975, SEEDS - 1) * values.std(ddof=1) / SEEDS**0.5
    assert row["comparison"] == "all or nothing" and row["seeds"] == "4"
    for count, moved in MOVED.items():
        shown = f"{moved:+.4f} [{moved - half:+.4f}, {moved + half:+.4f}]"
        assert row[str(count)] == (shown if count == 1 else f"**{shown}**"), count


@pytest.mark.parametrize("study", [{}, {"contrasts": (CONTRAST,)}], ids=["no contrast", "no run"])
def test_what_is_not_there_is_said(tmp_path, study):
    skip = [(f"rope_ratio={ratio},train_branch=1-15", 0) for ratio in VALUES["rope_ratio"]] if study else ()
    assert "No comparison has finished yet." in written(tmp_path, skip=skip, sections=["differences"], study=study)
