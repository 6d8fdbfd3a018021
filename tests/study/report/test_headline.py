"""The sentence that a page opens with: right where something can be told, and plain about why where nothing can."""

import json
import pathlib
import re

import numpy as np
import pytest
from scipy import stats
from studies import write, write_study
from test_verdicts import STUDY, VALUES, loss, noise, table

from lab import report
from lab.study import results
from lab.study.judge import evidence
from lab.study.judge.statistics import detectable
from lab.study.report import headline

VARIANTS = {"variant": ["a", "b", "c"]}
LEVELS = {"a": 2.3, "b": 2.0, "c": 2.1}
CONTRAST = ("wider", (("variant", "b"),), (("variant", "a"),))
BASELINE = {"baseline": (("variant", "a"),)}


def level(labels, count):
    return LEVELS[labels["variant"]]


def loud(labels, seed):
    return float(np.random.default_rng([seed, *map(ord, labels["variant"])]).normal(scale=0.5))


def quiet(labels, seed):
    return 0.01 * loud(labels, seed)


def opened(directory, values=VARIANTS, loss=level, seeds=4, noise=quiet, study=None, counts=(1, 16), **options):
    """A study and its findings."""
    options = {"sections": ("curves",)} | options
    write_study(directory, values, loss, counts, seeds, study=study, noise=noise, **options)
    study = results.collect(directory)
    return study, evidence.find(study)


def answer(directory, **options):
    return headline.answer(*opened(directory, **options))


def numbers(text):
    return [float(found) for found in re.findall(r"[-+]?\d+\.\d{4}", text)]


def fail(directory, name, seed):
    (cell,) = (directory / "cells").glob(f"{name}-*")
    write(cell / f"seed-{seed}" / "failure.json", {"reason": "loss is nan", "step": 7})


def test_the_best_verdict_comes_with_its_interval_its_costs_and_the_rest(tmp_path):
    write_study(tmp_path, VALUES, loss, (1, 16), 4, study=STUDY, noise=noise)
    study = results.collect(tmp_path)
    said = headline.answer(study, evidence.find(study))
    frame = study.results.groupby(["rope_ratio", "train_branch", "seed"])["loss"].mean()
    found = {}
    for draw in VALUES["train_branch"]:
        values = (frame[1.0, draw] - frame[0.0, draw]).to_numpy()
        found[draw] = values.mean(), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    best = min(found, key=lambda draw: found[draw][0])
    mean, (low, high) = found[best]
    sides = (f"rope_ratio {ratio}, train_branch {best}" for ratio in (1.0, 0.0))
    assert said.startswith(f"**{' is better than '.join(sides)}**")
    assert numbers(said) == pytest.approx([-mean, -high, -low], abs=6e-5)
    assert "at the same cost; of 4 comparisons 2 better, 0 worse, 2 cannot be told." in said


def test_where_all_is_worse_nothing_is_said_to_be_better(tmp_path):
    said = answer(tmp_path, study={"baseline": (("variant", "b"),)})
    assert said.startswith("**Nothing is better than what it is compared with**; variant a is worse than variant b by")
    assert "of 2 comparisons 0 better, 2 worse, 0 cannot be told." in said


def test_noise_is_no_answer(tmp_path):
    said = answer(tmp_path, study=BASELINE, noise=loud)
    assert said.startswith("**No difference can be told from noise**") and "2 cannot be told" in said


def test_one_seed_cannot_tell_a_baseline(tmp_path):
    said = answer(tmp_path, study=BASELINE, seeds=1)
    assert said.startswith("**One seed cannot tell**") and "of variant b less variant a" in said and "[" not in said


def test_contrasts_answer_where_there_is_no_baseline(tmp_path):
    said = answer(tmp_path, study={"contrasts": (CONTRAST,)})
    assert said.startswith("**variant b is better than variant a** by 0.")


def test_a_cell_that_costs_more_says_so(tmp_path):
    study, _ = opened(tmp_path, study=BASELINE)
    plan = json.loads((tmp_path / "plan.json").read_text())
    for cell in plan["cells"]:
        cell["parameters"] *= 1 + (cell["labels"]["variant"] == "b")
    write(tmp_path / "plan.json", plan)
    study = results.collect(tmp_path)
    assert ", at parameters +100.0%; of 2" in headline.answer(study, evidence.find(study))


@pytest.mark.parametrize(("noise", "said"), [(quiet, "more than noise"), (loud, "cannot tell them apart")])
def test_without_a_baseline_the_two_best_are_set_against_each_other(tmp_path, noise, said):
    text = answer(tmp_path, noise=noise)
    losses = results.collect(tmp_path).results.groupby(["variant", "seed"])["loss"].mean()
    best, second = losses.groupby("variant").mean().sort_values().index[:2]
    values = (losses[second] - losses[best]).to_numpy()
    bounds = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert text.startswith(f"**variant {best} has the lowest loss**") and said in text and f"variant {second}" in text
    assert numbers(text) == pytest.approx([losses[best].mean(), values.mean(), *bounds], abs=6e-5)
    assert (bounds.low > 0) == (said == "more than noise")


def test_without_a_baseline_one_seed_is_no_proof(tmp_path):
    text = answer(tmp_path, seeds=1, noise=lambda labels, seed: 0.0)
    assert text == (
        "**variant b has the lowest loss**, 2.0000 nats per token (mean over eval_branch 1, 16, one seed), 0.1000 "
        "below the next, variant c: one seed cannot tell that from noise."
    )


def test_seeds_that_do_not_vary_test_nothing(tmp_path):
    assert "their seeds do not vary" in answer(tmp_path, noise=lambda labels, seed: 0.1 * seed)


def test_one_cell_is_compared_with_nothing(tmp_path):
    text = answer(tmp_path, values={"variant": ["b"]}, seeds=1, noise=lambda labels, seed: 0.0)
    assert text.startswith("**There is one cell, so nothing is compared**: its loss is 2.0000 nats per token")
    assert headline.certainty(results.collect(tmp_path), None) == ""


def test_one_cell_that_is_done_of_several(tmp_path):
    text = answer(tmp_path, seeds=1, skip={("variant=a", 0), ("variant=c", 0)})
    assert text.startswith("So far: **Only variant b is done, so nothing is compared**")


def test_failed_runs_count_in_nothing_and_are_said(tmp_path):
    opened(tmp_path, seeds=3, skip={("variant=b", 2)})
    fail(tmp_path, "variant=b", 2)
    study = results.collect(tmp_path)
    text = headline.answer(study, None)
    assert text.startswith("**variant b has the lowest loss**") and text.endswith("; 1 failed run counts in nothing.")
    assert headline.progress(study) == "**8 of 9 runs done**, 1 failed."


def test_a_cell_is_not_best_for_want_of_a_hard_seed(tmp_path):
    """It is worse at every seed that both have, and has failed at the one where all lose."""

    def hard(labels, seed):
        return 0.5 * (seed == 2) + quiet(labels, seed)

    study, findings = opened(tmp_path, {"variant": ["c", "b"]}, seeds=3, noise=hard, skip={("variant=c", 2)})
    fail(tmp_path, "variant=c", 2)
    losses = study.results.groupby("variant")["loss"].mean()
    assert losses["c"] < losses["b"]  # over the seeds of each
    text = headline.answer(results.collect(tmp_path), findings)
    assert text.startswith("**variant b has the lowest loss**") and "0.1" in text and "next, variant c" in text


@pytest.mark.parametrize("study", [None, BASELINE])
def test_nothing_done_tells_nothing(tmp_path, study):
    every = {(f"variant={name}", 0) for name in "abc"}
    opened(tmp_path, seeds=1, skip=every, study=study)
    asked = results.collect(tmp_path)
    assert headline.answer(asked, evidence.find(asked)) == "**Nothing can be told yet**: no run is done."
    fail(tmp_path, "variant=a", 0)
    asked = results.collect(tmp_path)
    assert headline.answer(asked, evidence.find(asked)).endswith("no run is done, and 1 failed.")
    fail(tmp_path, "variant=b", 0), fail(tmp_path, "variant=c", 0)
    asked = results.collect(tmp_path)
    assert headline.answer(asked, evidence.find(asked)) == "**Nothing can be told**: all 3 runs failed."


def test_cells_without_a_seed_in_common_are_not_compared(tmp_path):
    skipped = {("variant=a", 0), ("variant=b", 1), ("variant=c", 0), ("variant=c", 1)}
    study, findings = opened(tmp_path, seeds=2, skip=skipped, study=BASELINE)
    assert "no two have finished a seed both" in headline.answer(study, findings)
    assert "the next, variant a, has no seed that was made like it" in headline.answer(study, None)


def test_the_noise_floor_is_what_these_seeds_find_and_more_would(tmp_path):
    study, findings = opened(tmp_path, study=BASELINE, noise=loud)
    deviation = np.median([one.estimate.deviation for one in findings.comparisons])
    text = headline.certainty(study, findings)
    assert numbers(text) == pytest.approx([detectable(k) * deviation for k in (4, 8, 16)], abs=6e-5)
    assert "`--config.study.seeds=8`" in text and "no baseline" not in text
    assert "names no baseline" in headline.certainty(study, None)


def test_one_seed_has_no_noise_floor(tmp_path):
    assert "unknown with one seed" in headline.certainty(*opened(tmp_path, seeds=1))


def test_claims_are_counted(tmp_path):
    hypotheses = (
        ("b is better", (("single", "wider", -1),)),
        ("a is better", (("single", "wider", 1),)),
    )
    _, findings = opened(tmp_path, study={"contrasts": (CONTRAST,), "hypotheses": hypotheses})
    assert headline.claims(findings) == "Of 2 claims 1 supported, 1 contradicted, 0 cannot be told."
    assert headline.claims(None) == ""


@pytest.mark.parametrize("noise", [quiet, loud])
def test_each_condition_has_its_own_best_cell(tmp_path, noise):
    """The lines cross: b is best at 1, c at 16."""

    def crossing(labels, count):
        return LEVELS[labels["variant"]] + (count / 16) * {"a": 0.0, "b": 0.4, "c": 0.05}[labels["variant"]]

    study, _ = opened(tmp_path, loss=crossing, noise=noise)
    found, _ = headline.best_by_condition(study)
    losses = study.results.set_index(["eval_branch", "variant", "seed"])["loss"]
    told = []
    for row in (dict(zip(found.columns, row, strict=True)) for row in found.rows):
        ours = losses[int(row["eval_branch"])]
        best, second = ours.groupby("variant").mean().sort_values().index[:2]
        values = (ours[second] - ours[best]).to_numpy()
        bounds = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (row["variant"], row["told apart"]) == (best, "yes" if bounds.low > 0 else "cannot tell")
        shown = numbers(" ".join((row["loss"], row["next is worse by"], row["95% interval"])))
        assert shown == pytest.approx([ours[best].mean(), values.mean(), *bounds], abs=6e-5)
        told.append((best, row["told apart"]))
    assert (told == [("b", "yes"), ("c", "yes")]) == (noise is quiet)


def test_a_study_of_one_condition_has_no_table_of_conditions(tmp_path):
    study, _ = opened(tmp_path, counts=(1,))
    assert headline.best_by_condition(study) == []


def test_the_page_opens_with_question_answer_and_figure(tmp_path):
    opened(tmp_path, study=BASELINE)
    report.rebuild(tmp_path)
    first = (tmp_path / "report.md").read_text().split("\n## ")[1].split("\n\n")
    assert first[0] == "Answer" and first[1].endswith("?")
    assert first[2].startswith("**variant b is better than variant a**")
    assert first[3] == "**12 of 12 runs done**." and first[5] == "![effects](figures/effects.png)"
    assert (tmp_path / "report.md").read_text().count("figures/effects.png") == 1


def test_verdicts_name_the_fields_in_which_their_sides_differ(tmp_path):
    opened(tmp_path, study=BASELINE)
    plan = json.loads((tmp_path / "plan.json").read_text())
    for cell in plan["cells"]:
        cell["fields"] = {"model.layers": 2, "train.steps": 9 if cell["labels"]["variant"] == "c" else 7}
    write(tmp_path / "plan.json", plan)
    report.rebuild(tmp_path)
    rows = {row["variant"]: row["differs in"] for row in table((tmp_path / "report.md").read_text(), "variant")}
    assert rows == {"a": "—", "b": "—", "c": "train.steps: 7 / 9"}


@pytest.mark.whole
@pytest.mark.slow
def test_a_thousand_cells_have_a_page(tmp_path):
    """It draws what a reader can tell apart, says so, and leads to every cell."""
    names = ["a", *(f"v{number}" for number in range(999))]
    options = dict(loss=lambda labels, count: 2.0 + (sum(map(ord, labels["variant"])) % 97) / 97, seeds=1)
    opened(tmp_path, values={"variant": names}, study=BASELINE, **options)
    report.rebuild(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Of 1000 cells the 60 with the lowest loss are drawn." in text
    assert len(list(tmp_path.glob("cells/*/index.html"))) == 1000
    assert (tmp_path / "figures" / "learning_curves.png").stat().st_size < 2**20


def test_what_reading_a_report_names_is_on_the_page(tmp_path):
    """Titles of sections and parts of the page that docs/reading_a_report.md sends readers to."""
    document = (pathlib.Path(__file__).parents[3] / "docs" / "reading_a_report.md").read_text()
    hypotheses = (("b is better", (("single", "wider", -1),)),)
    asked = BASELINE | {"contrasts": (CONTRAST,), "hypotheses": hypotheses}
    every = ""
    for name, study in (("baseline", asked), ("none", None)):
        opened(tmp_path / name, study=study, skip={("variant=c", 3)})
        report.rebuild(tmp_path / name)
        every += (tmp_path / name / "report.html").read_text()
    named = re.findall(r"(?<!\*)\*{1,2}([A-Za-z][^*]+)\*{1,2}(?!\*)", document)
    assert len(named) >= 8 and [name for name in named if name.lower() not in every.lower()] == []
