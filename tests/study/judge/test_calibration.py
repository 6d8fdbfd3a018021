"""A/A calibration: no more false verdicts than promised among equals, more where the judge is broken."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats
from studies import write, write_run, write_study

from lab import report
from lab.study import results
from lab.study.judge import calibration, evidence, pairing, statistics
from lab.study.judge.pairing import Score
from lab.study.results import Outcome

PAIR = {"rope_ratio": [0.0, 0.5, 1.0]}
BASELINE = {"baseline": (("rope_ratio", 0.0),)}
CELL = "rope_ratio=0.0"


def score(seed, loss):
    result = {"environment": {}, "text_hash": str(seed)}
    return Score(Outcome({"name": CELL, "directory": ""}, seed, result, None, [], {}), loss, (1,))


def pool(losses):
    """Of losses [seeds, runs]."""
    return {seed: [score(seed, float(loss)) for loss in row] for seed, row in enumerate(losses)}


def losses(generator, seeds, runs):
    """Equals: what a seed's texts do to all of its runs, and what their initial values do to each."""
    return 2.0 + generator.normal(0, 0.1, (seeds, 1)) + generator.normal(0, 0.01, (seeds, runs))


def tried(monkeypatch, comparisons, studies=40, pools=25):
    """Over the pools of many studies of four seeds: all pseudo-studies, and those of them with a false verdict."""
    monkeypatch.setattr(calibration, "DRAWN", studies)
    generator = np.random.default_rng(comparisons)
    found = [calibration.calibrate(pool(losses(generator, 4, 5)), comparisons) for _ in range(pools)]
    return sum(one.studies for one in found), sum(one.false for one in found)


@pytest.mark.parametrize("comparisons", [1, 3])
def test_among_equals_at_most_five_in_a_hundred_are_told_apart(monkeypatch, comparisons):
    studies, false = tried(monkeypatch, comparisons)
    assert studies > 900
    assert 0.01 < false / studies < 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)


@pytest.mark.parametrize(("comparisons", "broken"), [
    (1, lambda patch: patch.setattr(evidence, "LEVEL", 0.3)),
    (3, lambda patch: patch.setattr(statistics, "holm", list)),
    (1, lambda patch: patch.setattr(pairing, "differences", unpaired)),
], ids=["another level", "nothing corrected", "seeds shared out twice"])  # fmt: skip
def test_a_broken_judge_is_found_out(monkeypatch, comparisons, broken):
    broken(monkeypatch)
    studies, false = tried(monkeypatch, comparisons)
    assert stats.binomtest(false, studies, 0.05, "greater").pvalue < 1e-4


def unpaired(sides, signs):
    """Every difference counted four times, as if it were four seeds."""
    right = _differences(sides, signs)
    kept = {(seed, copy): value + 1e-6 * copy for seed, value in right.kept.items() for copy in range(4)}
    return pairing.Differences(kept, {})


_differences = pairing.differences


def test_pseudo_studies_pair_two_runs_of_a_seed():
    values = losses(np.random.default_rng(0), 4, 3)
    wanted = [{a - b for a, b in itertools.permutations(row, 2)} for row in values.tolist()]
    generator, found = np.random.default_rng(1), [set() for _ in values]
    for _ in range(200):
        for one in calibration._drawn(pool(values), 3, generator):
            assert [*one.kept] == [0, 1, 2, 3]
            for seed, value in one.kept.items():
                found[seed].add(value)
    assert found == wanted


@pytest.mark.parametrize(("seeds", "runs", "studies"), [(3, 2, 4), (2, 2, 2), (3, 3, 108)])
def test_no_pseudo_study_counts_twice(monkeypatch, seeds, runs, studies):
    """At each seed r (r - 1) differences; turned round as a whole, a pseudo-study is judged alike."""
    monkeypatch.setattr(calibration, "EACH", 1000)
    monkeypatch.setattr(calibration, "DRAWN", 2000)
    found = calibration.calibrate(pool(losses(np.random.default_rng(5), seeds, runs)), 1)
    assert found.studies == studies == (runs * (runs - 1)) ** seeds / 2


def test_interval_is_that_of_clopper_and_pearson():
    """Its ends are the shares under which as many, or as few, would be seen once in forty times."""
    low, high = calibration.Calibration(3, 1, 200, 14, 0.01).interval
    assert stats.binom.sf(13, 200, low) == pytest.approx(0.025) == stats.binom.cdf(14, 200, high)
    assert calibration.Calibration(3, 1, 4, 0, 0.01).interval == pytest.approx((0, 1 - 0.025 ** (1 / 4)))


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "runs"), [(3, 3), (5, 4)])
def test_the_interval_holds_the_promise_although_pseudo_studies_share_runs(seeds, runs):
    generator = np.random.default_rng(seeds)
    found = [calibration.calibrate(pool(losses(generator, seeds, runs)), 1) for _ in range(80)]
    assert {one.studies for one in found} <= {*range(1, 4 * seeds * (runs - 1) + 1)}
    held = [one.interval[0] <= 0.05 <= one.interval[1] for one in found]
    assert np.mean(held) > 0.95 - 2 * math.sqrt(0.05 * 0.95 / len(held))


def test_the_noise_is_that_of_a_difference_of_two_runs_of_a_seed():
    generator = np.random.default_rng(2)
    found = calibration.calibrate(pool(losses(generator, 50, 40)), 1)
    assert found.deviation == pytest.approx(0.01 * math.sqrt(2), rel=0.05)
    uneven = {**pool([[1.0, 3.0], [5.0, 5.0]]), 2: pool([[0.0, 1.0, 2.0]])[0]}
    assert calibration.calibrate(uneven, 1).deviation == pytest.approx(math.sqrt(2 * (2 + 0 + 2) / (1 + 1 + 2)))


@pytest.mark.parametrize(("seeds", "comparisons"), [(2, 1), (3, 4), (8, 20)])
def test_the_smallest_effect_is_seen_four_times_in_five(seeds, comparisons):
    found = calibration.Calibration(seeds, comparisons, 1, 0, 0.3)
    shift = found.detectable(seeds, comparisons)
    drawn = np.random.default_rng(seeds).normal(shift, 0.3, (40_000, seeds))
    told = stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05 / comparisons
    assert np.mean(told) == pytest.approx(0.8, abs=0.01)


def test_one_seed_or_one_run_tells_nothing():
    assert calibration.calibrate(pool([[1.0, 2.0, 3.0]]), 1) is None
    assert calibration.calibrate(pool([[1.0], [2.0], [3.0]]), 1) is None


def calibrated(directory, repeats=4, seeds=4, study=BASELINE, skip=()):
    """A study of equals whose first cell was run again; (number, seed) in `skip` are pending."""

    def noise(labels, seed):
        return 0.1 * seed + 0.01 * np.random.default_rng([seed, int(100 * labels["rope_ratio"])]).normal()

    about = dict(study=study, noise=noise, sections=["curves"])
    write_study(directory, PAIR, lambda labels, count: 2.0, (1, 2), seeds, **about)
    plan = json.loads((directory / "plan.json").read_text())
    cell, rows = plan["cells"][0], []
    for number in range(1, repeats + 1):
        about = {"name": f"{CELL} (calibration {number})", "cell": CELL, "directory": f"calibration/{number}"}
        rows.append(cell | about)
        for seed in cell["seeds"]:
            if (number, seed) not in skip:
                shift = 0.1 * seed + 0.01 * np.random.default_rng([seed, 7000 + number]).normal()
                loss, moved = (lambda labels, count: 2.0), (lambda labels, seed, shift=shift: shift)
                write_run(directory, rows[-1], seed, loss, (1, 2), noise=moved)
    write(directory / "plan.json", plan | {"calibration": rows})
    return directory


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Drawn, where a test does not say how many."""
    monkeypatch.setattr(calibration, "DRAWN", 80)


def told(directory):
    report.rebuild(directory)
    text = (directory / "report.md").read_text()
    return text.partition("\n## Calibration\n")[2].partition("\n## ")[0]


def test_the_report_tells_false_verdicts_and_the_smallest_effect(tmp_path):
    text = told(calibrated(tmp_path))
    found = calibration.calibrate(calibration.pool(results.collect(tmp_path)), 2)
    low, high = found.interval
    assert f"{CELL} was run 4 more times" in text and "(16 of 16 runs done)" in text
    assert f"**{found.share:.1%} of {found.studies} pseudo-studies have a false verdict**" in text
    assert f"{low:.1%} to {high:.1%}" in text and "do not trust" not in text
    assert "2 comparisons over 4 seeds" in text
    assert f"| 4 | {found.detectable(4):.4f} | {found.detectable(4, 2):.4f} |" in text
    assert f"| 16 | {found.detectable(16):.4f} | {found.detectable(16, 2):.4f} |" in text


def test_the_report_warns_of_a_broken_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "LEVEL", 0.3)
    assert "more than promised, so do not trust the verdicts.**" in told(calibrated(tmp_path))


def test_repeats_are_in_no_table_of_the_study(tmp_path):
    with_them, without = calibrated(tmp_path / "a"), calibrated(tmp_path / "b", repeats=0)
    assert told(with_them) and not told(without)
    for name in ("results.csv", "timings.csv", "comparisons.csv"):
        assert (with_them / name).read_bytes() == (without / name).read_bytes(), name


def test_a_study_that_compares_nothing_is_calibrated_for_one_comparison(tmp_path):
    text = told(calibrated(tmp_path, study={}))
    assert "one comparison over 4 seeds" in text and "as the smallest of" not in text


def test_nothing_is_told_before_the_last_repeat(tmp_path):
    text = told(calibrated(tmp_path, skip=[(2, 3)]))
    assert "(15 of 16 runs done)" in text and "once all are done" in text and "%" not in text


def test_runs_that_may_not_be_paired_are_left_out(tmp_path):
    calibrated(tmp_path, repeats=2)
    for path in tmp_path.glob("cells/rope_ratio=0.0*/seed-*/result.json"):
        result = json.loads(path.read_text())
        write(path, result | {"segments": [result["segments"][0] | {"platform": "gpu"}]})
    assert {len(runs) for runs in calibration.pool(results.collect(tmp_path)).values()} == {2}
    calibrated(tmp_path / "alone", repeats=1)
    for path in tmp_path.glob("alone/cells/rope_ratio=0.0*/seed-*/result.json"):
        result = json.loads(path.read_text())
        write(path, result | {"segments": [result["segments"][0] | {"platform": "gpu"}]})
    assert "Fewer than two seeds have two runs that may be paired" in told(tmp_path / "alone")
