"""The numbers of a report against numpy and against the published note's own columns."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from studies import HEADS, RATIOS, write, write_study

from lab.study import results
from lab.study.report import tables

COUNTS = (1, 2, 8, 16, 32, 64)
LOSSES = st.lists(st.lists(st.floats(0.5, 9), min_size=6, max_size=6), min_size=1, max_size=8)
PUBLISHED = "configs/published/head_dim_1024.csv"


def as_curves(rows):
    return {(place,): dict(zip(COUNTS, row, strict=True)) for place, row in enumerate(rows)}


@given(LOSSES)
def test_recommendation_against_numpy(rows):
    array, chosen = np.array(rows), tables.recommend(as_curves(rows))
    scores = {
        "parallel": array[:, 3:].mean(axis=1),
        "single": array[:, 0],
        "flattest": array.max(axis=1) - array.min(axis=1),
    }
    assert set(chosen) == set(scores)
    for use, score in scores.items():
        choice = chosen[use]
        np.testing.assert_allclose([choice.value, score[choice.key[0]]], score.min(), atol=1e-12)
        if len(rows) > 1:
            assert choice.margin == pytest.approx(np.sort(score)[1] - score.min(), abs=1e-12)
        else:
            assert choice.runner_up is None


@given(LOSSES)
def test_best_and_spread_against_numpy(rows):
    for row in rows:
        named = dict(zip("abcdef", row, strict=True))
        assert named[tables.best(named)] == np.min(row)
        assert tables.spread(named) == np.ptp(row)
    assert tables.best({}) is None and tables.spread({"a": 1.0}) is None


def test_cells_without_every_count_are_not_recommended():
    curves = {("half",): {16: 1.0}, ("whole",): {1: 2.0, 16: 3.0}}
    assert {choice.key for choice in tables.recommend(curves).values()} == {("whole",)}


def test_criteria_without_their_counts_are_left_out():
    assert set(tables.recommend({("a",): {2: 1.0, 4: 2.0}})) == {"flattest"}
    assert tables.recommend({}) == {}


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_means_deviations_and_grids_of_a_study(tmp_path_factory, seed):
    directory = tmp_path_factory.mktemp("study")
    generator = np.random.default_rng(seed)
    drawn = {}

    def loss(labels, count):
        return drawn.setdefault((*labels.values(), count), generator.uniform(1, 5))

    study = results.collect(write_study(directory, HEADS, loss=loss, counts=(1, 64), seeds=2))
    means, deviations = tables.losses(study), tables.deviations(study)
    assert len(means) == 30
    for (head, ratio, draw, count), value in drawn.items():
        # The second seed is 0.01 worse: mean + 0.005, sample deviation 0.01 / sqrt(2).
        assert means[head, ratio, draw][count] == pytest.approx(value + 0.005)
        assert deviations[head, ratio, draw][count] == pytest.approx(0.01 / math.sqrt(2))
    grid = tables.grid(study, means, 64, "rope_ratio", "head", {"train_branch": "1-15"})
    assert list(grid) == RATIOS["rope_ratio"] and list(grid[0.5]) == HEADS["head"]
    assert grid[0.5]["h16"] == means["h16", 0.5, "1-15"][64]


def test_the_notes_own_columns_come_out_of_its_numbers(tmp_path):
    """Best, difference range, fluctuation and recommendation as printed in the published note (two decimals)."""
    study = results.collect(write_study(tmp_path, HEADS, published=PUBLISHED))
    theirs = tables.published(study)
    single = tables.grid(study, theirs, 1, "rope_ratio", "head", {"train_branch": "1-15"})
    assert [tables.best(row) for row in single.values()] == ["h16", "h32", "h16", "h32", "h32"]
    parallel = tables.grid(study, theirs, 64, "rope_ratio", "head", {"train_branch": "1-15"})
    assert [tables.best(row) for row in parallel.values()] == ["h16", "h8", "h8", "h16", "h16"]
    alone = tables.grid(study, theirs, 1, "rope_ratio", "head", {"train_branch": "fixed1"})
    assert [round(tables.spread(row), 3) for row in alone.values()] == [0.025, 0.044, 0.067, 0.082, 0.051]
    # The note subtracts rounded losses, so its fluctuations are off by up to 0.015.
    printed = {("h8", 1.0): 0.13, ("h16", 1.0): 0.07, ("h32", 1.0): 0.35, ("h16", 0.75): 0.61, ("h8", 0.75): 0.83}
    for (head, ratio), value in printed.items():
        assert tables.spread(theirs[head, ratio, "1-15"]) == pytest.approx(value, abs=0.015)
    chosen = tables.recommend(theirs)
    assert chosen["parallel"].key == chosen["flattest"].key == ("h16", 1.0, "1-15")
    assert chosen["single"].key == ("h32", 1.0, "1-15")


def test_published_numbers_with_other_columns_are_not_set_beside_ours(tmp_path):
    study = results.collect(write_study(tmp_path, RATIOS, published=PUBLISHED))
    assert tables.published(study) == {}


def test_published_rows_without_a_loss_are_missing_not_nan(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text("rope_ratio,train_branch,eval_branch,loss,ppl\n0.5,1-15,1,2.5,\n0.5,1-15,2,,\n")
    study = results.collect(write_study(tmp_path / "study", published=str(path)))
    assert tables.published(study) == {(0.5, "1-15"): {1: 2.5}}


@given(st.lists(st.integers(1, 9000), min_size=6, max_size=6, unique=True))
def test_rank_correlation_sees_orderings_only(row):
    ours = as_curves([row])
    same = {key: {count: math.sqrt(loss) + 7 for count, loss in curve.items()} for key, curve in ours.items()}
    opposite = {key: {count: -loss for count, loss in curve.items()} for key, curve in ours.items()}
    assert tables.rank_correlation(ours, same) == (pytest.approx(1.0), 6)
    assert tables.rank_correlation(ours, opposite) == (pytest.approx(-1.0), 6)
    assert tables.rank_correlation(ours, {("other",): {1: 1.0}}) is None


def test_cells_that_lack_a_label_are_kept_apart(tmp_path):
    write_study(tmp_path)
    study = results.collect(tmp_path)
    cells = study.plan["cells"]
    write(tmp_path / "plan.json", study.plan | {"cells": [cells[0] | {"labels": {"rope_ratio": 0.0}}, *cells[1:]]})
    assert len(tables.losses(results.collect(tmp_path))) == 10
