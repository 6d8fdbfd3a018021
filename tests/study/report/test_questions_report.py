"""What a report says of questions: means over seeds, costs a question, speeds beside one by one, paired verdicts."""

import types

import pandas as pd
import pytest

from lab.study.report import questions
from lab.study.report.page import Text

METHODS = ("one_by_one", "branches", "vote-1", "vote-8")


def study_of(right: dict[str, list[list[int]]], seeds: int = 2, passages: int = 12):
    """One cell; right: of each method, for every question of a passage, the same in all passages but the last third,
    where every answer is right."""
    cell = {"name": "model=own"}
    rows, timings, runs = [], [], []
    for seed in range(seeds):
        documents = []
        for place, (method, of) in enumerate(right.items()):
            exact = [of[seed]] * (passages - passages // 3) + [[1] * len(of[seed])] * (passages // 3)
            count = sum(map(len, exact))
            accuracy = sum(map(sum, exact)) / count
            row = dict(f1=accuracy, questions=count, processed=count * (2.5 + seed), steps=count * 0.5)
            rows.append(dict(cell=cell["name"], model="own", seed=seed, decoding=method, accuracy=accuracy) | row)
            speed = 100.0 * (1 + place)
            timings.append(dict(cell=cell["name"], phase="answers", difficulty=method, tokens_per_second=speed))
            given = [[f"right {i}" if one else method for i, one in enumerate(each)] for each in exact]
            documents.append(dict(decoding=method, exact=exact, answers=given))
        asked = {"answers": {"documents": documents}}
        runs.append(types.SimpleNamespace(cell=cell, asked=asked, rows=lambda name: [1]))
    timings.append(dict(cell=cell["name"], phase="eval", difficulty=4, tokens_per_second=1.0))
    return types.SimpleNamespace(
        further_asks={"answers": "decoding", "long": "length"}, answers=lambda name: pd.DataFrame(rows),
        timings=pd.DataFrame(timings), condition="difficulty", plan={"cells": [cell]}, labels=["model"],
        key=lambda cell: ("own",), runs_by_cell={cell["name"]: runs},
    )  # fmt: skip


def test_rows_are_means_over_seeds_and_comparisons_are_paired_by_passage():
    right = {
        "one_by_one": [[1, 0], [0, 0]],
        "branches": [[1, 0], [0, 0]],
        "vote-1": [[0, 0], [0, 0]],
        "vote-8": [[1, 1], [1, 0]],
    }
    costs, compared = questions.section(study_of(right))
    assert costs.columns == ["model", "decoding", "exact", "F1", "as one by one", "tokens a question",
                             "steps a question", "tokens/s", "times"]  # fmt: skip
    # Of 12 passages 4 are all right: (8 x 1/4 + 4) / 12 of one by one.
    assert [row[:4] for row in costs.rows] == [
        ["own", "one_by_one", "50.0%", "50.0%"], ["own", "branches", "50.0%", "50.0%"],
        ["own", "vote-1", "33.3%", "33.3%"], ["own", "vote-8", "83.3%", "83.3%"],
    ]  # fmt: skip
    assert [row[4] for row in costs.rows] == ["100.0%", "50.0%", "33.3%", "50.0%"]
    assert [row[5:] for row in costs.rows][1] == ["3.0", "0.50", "200", "2.00"]
    told = {row[1]: row[2:] for row in compared.rows}
    assert [*told] == ["branches - one_by_one", "vote-8 - vote-1", "vote-8 - one_by_one"]
    assert told["branches - one_by_one"] == ["+0.0%", "same"]
    assert told["vote-8 - vote-1"][0].startswith("+50.0% [") and told["vote-8 - vote-1"][1] == "better"


def test_few_passages_have_no_verdict_and_none_no_table():
    right = {"one_by_one": [[1, 1]], "branches": [[1, 0]]}
    _, compared = questions.section(study_of(right, seeds=1, passages=9))
    ((_, _, difference, verdict),) = compared.rows
    assert (difference, verdict) == ("-33.3%", "cannot tell (9 passages)")
    _, compared = questions.section(study_of(right, seeds=1, passages=30))
    assert compared.rows[0][3] == "worse"
    empty = study_of({}, seeds=0)
    assert questions.section(empty) == [Text("No question has been asked yet.")]


@pytest.mark.parametrize(("method", "others"), [
    ("one_by_one", []), ("branches", ["one_by_one"]), ("vote-1", []), ("best-of-1", []),
    ("vote-16", ["vote-1", "one_by_one"]), ("best-of-2", ["vote-1", "one_by_one"]),
])  # fmt: skip
def test_what_a_method_is_compared_with(method, others):
    assert questions._others(method) == others
