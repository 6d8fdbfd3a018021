"""Times of a longer text: their order stays, and nothing but times changes."""

import dataclasses

import numpy as np
import pytest

from lab.data import packing, pipeline, skipping
from lab.errors import UserError

LAYOUT = packing.Layout(6, 60, 1, 2, stagger=True, align="left", slots=0, prompt="none")
TEXTS = [np.arange(n) for n in (9, 5, 7, 3, 8, 6)]
WITHIN = 90


def row_of(positions: str, seed: int) -> packing.Row:
    within = 0 if positions == "whole" else WITHIN
    layout = dataclasses.replace(LAYOUT, positions=positions, positions_within=within)
    return layout.row(TEXTS, np.random.default_rng(seed))


@pytest.mark.parametrize("positions", ["random", "pose"])
def test_times_rise_as_they_did_within_the_longer_text_and_the_rest_stays(positions):
    largest, runs = 0, set()
    for seed in range(30):
        plain, moved = (row_of(name, seed).coordinates for name in ("whole", positions))
        for field in ("segment", "branch", "index"):
            np.testing.assert_array_equal(getattr(plain, field), getattr(moved, field))
        for segment in range(plain.segment.max() + 1):
            own = plain.segment == segment
            pairs = sorted({*zip(plain.time[own].tolist(), moved.time[own].tolist(), strict=True)})
            before, after = map(np.array, zip(*pairs, strict=True))
            assert len(set(before)) == len(pairs)  # one time of each
            assert (np.diff(after) >= np.diff(before)).all() and after[0] >= 0
            largest = max(largest, after[-1])
            runs.add(len({*(after - before)}))
    assert 0.8 * WITHIN < largest < WITHIN
    assert runs <= {1, 2} if positions == "pose" else max(runs) > 2
    padding = plain.segment < 0
    np.testing.assert_array_equal(moved.time[padding], 0)


def test_evaluation_reads_whole_texts(config):
    config.data.update(positions="random", positions_within=999)
    trained = pipeline.training_layout(config)
    assert (trained.positions, trained.positions_within) == ("random", 999)
    assert pipeline.evaluation_layout(config, config.evaluate.loss, 1).positions == "whole"
    assert packing.most_times(config.data) == 999


@pytest.mark.parametrize(("fields", "says"), [
    (dict(positions_within=9), "data.positions_within = 9 means nothing beside data.positions = 'whole'"),
    (dict(positions="pose", positions_within=3), "is fewer than the"),
    (dict(positions="random"), "data.positions_within = 0 is fewer than the"),
])  # fmt: skip
def test_ranges_that_mean_nothing_are_refused(config, fields, says):
    config.data.update(fields)
    with pytest.raises(UserError, match=says):
        skipping.check(config.data, packing.times_of_text(config.data))
