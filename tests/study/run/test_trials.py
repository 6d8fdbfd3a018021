"""Tuning: the same grid for every cell, the best point by the judged loss, and refusals."""

import pytest

import lab.config
from lab.errors import UserError
from lab.study import evaluations, results
from lab.study.define import cells, resolve
from lab.study.define.asked import wanted
from lab.study.evaluations import LOSS
from lab.study.report import trials as section
from lab.study.run import trials as tuning

GRID = (("train.learning_rate", (1e-3, 3e-3, 1e-2)), ("train.weight_decay", (0.0, 0.1)))


@pytest.fixture
def config(monkeypatch):
    made = lab.config.base()
    made.study.update(name="tuned", tune=GRID, seeds=3, judged=(1, 4), labels=(("model.position.ratio", "rope_ratio"),))
    made.study.cells = cells.vary("model.position.ratio", (0.0, 1.0))
    return made


def tried(config, tmp_path):
    resolved = resolve.resolve(config)
    return resolved, tuning.trials(config, resolved, tmp_path)


def finish(trial, losses: dict[int, float]) -> None:
    rows = [{"eval_branch": branches, "loss": loss} for branches, loss in losses.items()]
    about = wanted(trial.run.cell.config, trial.run.data)[LOSS]
    found = evaluations.begun(LOSS, "eval_branch", about) | {"complete": True, "conditions": rows}
    evaluations.save(trial.run.directory, found)


def test_every_cell_is_tried_on_the_same_grid_and_seed(config, tmp_path):
    resolved, trials = tried(config, tmp_path)
    assert len(trials) == len(resolved) * 6
    for cell in resolved:
        points = [trial.values for trial in trials if trial.cell == cell.name]
        assert points == [
            {"train.learning_rate": rate, "train.weight_decay": decay} for rate in GRID[0][1] for decay in GRID[1][1]
        ]
    assert {trial.run.seed for trial in trials} == {1000}
    assert len({trial.run.directory for trial in trials}) == len(trials)
    for trial in trials:
        assert trial.run.cell.config.train.learning_rate == trial.values["train.learning_rate"]
        assert trial.run.cell.config.train.weight_decay == trial.values["train.weight_decay"]


def test_the_best_point_is_that_of_the_lowest_judged_loss(config, tmp_path):
    resolved, trials = tried(config, tmp_path)
    for number, trial in enumerate(trials):
        # Not judged: a loss at 2 branches that would choose another point.
        finish(trial, {1: 2.0 + abs(number % 6 - 3), 2: -10.0 * number, 4: 2.0 + abs(number % 6 - 3)})
    for cell in tuning.tuned(resolved, trials):
        assert (cell.config.train.learning_rate, cell.config.train.weight_decay) == (3e-3, 0.1)
    assert [cell.name for cell in tuning.tuned(resolved, trials)] == [cell.name for cell in resolved]


def test_a_failed_trial_is_never_the_best_and_an_unfinished_one_decides_nothing(config, tmp_path):
    resolved, trials = tried(config, tmp_path)
    first = [trial for trial in trials if trial.cell == resolved[0].name]
    for trial in first[:-1]:
        finish(trial, {1: 5.0, 4: 5.0})
    assert tuning.tuned(resolved, trials)[0].config.train == resolved[0].config.train
    first[-1].run.directory.mkdir(parents=True)
    (first[-1].run.directory / "failure.json").write_text("{}")
    assert tuning.tuned(resolved, trials)[0].config.train.learning_rate == 1e-3
    assert tuning.tuned(resolved, trials)[1].config.train == resolved[1].config.train


@pytest.mark.parametrize(("settings", "told"), [
    (dict(tune=(("train.learning_rate", (1e-3, 1e-3)),)), r"study\.tune has a value of train\.learning_rate twice"),
    (dict(tune=(("model.position.ratio", (0.5, 1.0)),)), r"study\.tune names model\.position\.ratio, which the"),
    (dict(tune=(("train.learning_rat", (1e-3,)),)), r"study\.tune = 'train\.learning_rat' is unknown \(did you mean"),
    (dict(tune=(("data.tokenizer", ("bytes", "bpe:512")),)), r"study\.tune names data\.tokenizer: losses per token of"),
    (dict(tune_seed=2), r"study\.tune_seed = 2 is among the seeds \[0, 1, 2\] that cells are judged on"),
])  # fmt: skip
def test_a_grid_that_cannot_be_is_refused(config, tmp_path, settings, told):
    config.study.update(settings)
    with pytest.raises(UserError, match=told):
        tried(config, tmp_path)


def test_nothing_is_tried_where_nothing_is_tuned(config, tmp_path):
    config.study.tune = ()
    resolved, trials = tried(config, tmp_path)
    assert trials == [] and tuning.tuned(resolved, trials) == resolved


def test_the_report_shows_what_tuning_gained_and_flags_the_edge(config, tmp_path):
    """Own values 3e-3 and 0.01: in the grid where only the rate is tuned."""
    config.study.tune = (("train.learning_rate", (1e-3, 3e-3, 1e-2)),)
    resolved, tried_out = tried(config, tmp_path)
    for trial, loss in zip(tried_out, (3.0, 2.0, 2.5, 3.0, 2.0, 1.5), strict=True):
        finish(trial, {1: loss, 2: 99.0, 4: loss})
    plan = {
        "config": resolved[0].described(),
        "labels": [["model.position.ratio", "rope_ratio"]],
        "condition": "eval_branch",
        "tuning": [trial.describe() for trial in tried_out],
        "cells": [{"name": cell.name, "labels": cell.labels, "seeds": []} for cell in resolved],
    }
    table = section.section(results.Results(tmp_path, plan, []))[-1]
    assert [row[1:] for row in table.rows] == [
        ["train.learning_rate 0.003", "no", "2.0000", "2.0000", "0.0000"],
        ["train.learning_rate 0.01", "**train.learning_rate**", "1.5000", "2.0000", "0.5000"],
    ]
