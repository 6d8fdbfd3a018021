"""Verdicts on studies whose truth is known: nothing found where nothing is, and intervals that keep their promise."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from studies import write, write_study

from lab.study import results
from lab.study.judge import evidence
from lab.study.judge.evidence import UNKNOWN, overall
from lab.study.judge.pairing import Differences
from lab.study.report import verdicts

PAIR = {"rope_ratio": [0.0, 0.5, 1.0]}
BASELINE = {"baseline": (("rope_ratio", 0.0),)}
CONTRASTS = {
    "contrasts": (
        ("all or nothing", (("rope_ratio", 1.0),), (("rope_ratio", 0.0),)),
        ("the upper half", (("rope_ratio", (0.5, 1.0)),), (("rope_ratio", 0.0),)),
    ),
    "hypotheses": (
        ("more is better", (("single", "all or nothing", -1), ("crossed", "the upper half", -1))),
        ("more is worse", (("single", "all or nothing", 1),)),
    ),
}


def noisy(scale=0.01, among=0.1):
    """Noise with a part that all cells of a seed share, which pairing takes out."""

    def noise(labels, seed):
        shared = np.random.default_rng(seed).normal() * among
        return shared + scale * np.random.default_rng([seed, int(1000 * labels["rope_ratio"])]).normal()

    return noise


def found(directory, study, loss=lambda labels, count: 2.0, **options):
    options = {"values": PAIR, "counts": (1,), "seeds": 5, "noise": noisy()} | options
    return evidence.find(results.collect(write_study(directory, loss=loss, study=study, **options)))


def test_a_study_that_compares_nothing_has_no_findings(tmp_path):
    assert found(tmp_path, {}) is None


def test_pairing_finds_what_the_spread_between_seeds_hides(tmp_path):
    better = found(tmp_path, BASELINE, loss=lambda labels, count: 2.0 - 0.05 * labels["rope_ratio"])
    verdicts = {one.name: one.verdict for one in better.comparisons}
    assert verdicts["rope_ratio=1.0"] == "better"
    losses = [score.loss for score in better.scores["rope_ratio=0.0"].values()]
    assert np.std(losses) > 0.05  # more than the effect
    worse = found(tmp_path, BASELINE, loss=lambda labels, count: 2.0 + 0.05 * labels["rope_ratio"])
    assert worse.comparisons[-1].verdict == "worse"


@pytest.mark.parametrize(("noise", "effect", "verdict"), [
    (noisy(), 0.0, UNKNOWN),
    (lambda labels, seed: 0.01 * seed, 0.0, f"{UNKNOWN} (no spread)"),
    (lambda labels, seed: 0.01 * seed, 0.1, f"{UNKNOWN} (no spread)"),  # the seeds draw nothing of what differs
], ids=["noise", "identical", "apart by a constant"])  # fmt: skip
def test_null_studies_cannot_tell(tmp_path, noise, effect, verdict):
    findings = found(
        tmp_path, BASELINE | CONTRASTS, lambda labels, count: 2.0 + effect * labels["rope_ratio"], noise=noise
    )
    assert {one.verdict for one in findings.comparisons} == {verdict}
    assert {one.outcome for one in findings.evidence} == {UNKNOWN}


def test_one_seed_has_a_difference_and_no_verdict(tmp_path):
    findings = found(tmp_path, BASELINE, loss=lambda labels, count: 2.0 - labels["rope_ratio"], seeds=1)
    assert {one.verdict for one in findings.comparisons} == {"cannot tell (one seed)"}
    assert all(one.estimate.t_interval is None and one.estimate.mean for one in findings.comparisons)


@pytest.mark.parametrize("name", ["all or nothing", "flipped"])
def test_correction_is_over_baseline_and_contrasts_together(tmp_path, name):
    """The first contrast compares what the baseline does, in this direction or the other: they are one test."""
    (_, more, less), other = CONTRASTS["contrasts"]
    contrasts = (("all or nothing", more, less) if name != "flipped" else ("flipped", less, more)), other
    loss = lambda labels, count: 2.0 - 0.01 * labels["rope_ratio"]  # noqa: E731
    findings = found(tmp_path, BASELINE | {"contrasts": contrasts}, loss=loss)
    smallest = min(findings.comparisons, key=lambda one: one.estimate.p)
    assert len(findings.comparisons) == 4
    assert smallest.adjusted == pytest.approx(min(1.0, 3 * smallest.estimate.p))
    named = {one.name: one.adjusted for one in findings.comparisons}
    assert named[name] == pytest.approx(named["rope_ratio=1.0"])


def test_verdicts_are_those_of_the_corrected_tests():
    differences = Differences({0: -0.01, 1: -0.02, 2: -0.03, 3: -0.001, 4: -0.02}, {})
    alone = evidence.compare("contrast", "one", "other", differences, {})
    assert 0.05 / 4 < alone.estimate.p < 0.05
    assert [one.verdict for one in evidence.corrected([alone])] == ["better"]
    assert [one.verdict for one in evidence.corrected([alone] * 4)] == [UNKNOWN] * 4


def test_hypotheses_are_supported_contradicted_or_open(tmp_path):
    findings = found(tmp_path, CONTRASTS, loss=lambda labels, count: 2.0 - 0.5 * labels["rope_ratio"])
    assert [one.outcome for one in findings.evidence] == ["supported", "supported", "contradicted"]
    assert overall(["supported", "supported"]) == "supported"
    assert overall(["supported", UNKNOWN]) == overall(["supported", "contradicted"]) == UNKNOWN
    assert overall(["contradicted", UNKNOWN]) == "contradicted"


def test_a_contrast_called_single_in_which_more_differs_is_flagged(tmp_path):
    place = write_study(tmp_path, values=PAIR, counts=(1,), seeds=2, loss=lambda labels, count: 2.0, study=CONTRASTS)
    written = json.loads((place / "plan.json").read_text())
    for cell in written["cells"]:
        ratio = cell["labels"]["rope_ratio"]
        cell["fields"] = {"model.position.ratio": ratio, "model.layers": 2 + int(ratio), "model.dim": 8}
    write(place / "plan.json", written)
    findings = evidence.find(results.collect(place))
    single, several, other = findings.evidence
    assert single.comparison.differing == {"model.layers": ("3", "2"), "model.position.ratio": ("1.0", "0.0")}
    assert (
        single.told_layer == other.told_layer == "single, **but 2 fields differ**" and several.told_layer == "crossed"
    )
    assert verdicts.differing(single.comparison) == "model.layers: 2 / 3; model.position.ratio: 0.0 / 1.0"
    told = "".join(str(piece) for piece in verdicts.evidence(findings))
    assert "but 2 fields differ" in told


def test_comparisons_csv_has_a_row_for_each(tmp_path):
    findings = found(tmp_path, BASELINE | CONTRASTS, seeds=4)
    with open(evidence.write_csv(tmp_path / "comparisons.csv", findings.comparisons), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["baseline", "baseline", "contrast", "contrast"]
    for row, one in zip(rows, findings.comparisons, strict=True):
        known = one.estimate
        numbers = [float(row[name]) for name in ("difference", "t_low", "bootstrap_high", "p", "p_holm", "detectable")]
        assert numbers == [
            known.mean, known.t_interval[0], known.bootstrap_interval[1], known.p, one.adjusted, known.detectable
        ]  # fmt: skip
        assert (row["n"], row["seeds"], row["verdict"]) == ("4", "0 1 2 3", one.verdict)


MIXED = {0.0: 0.0, 0.25: 0.0, 0.5: 0.0, 0.75: -0.02, 1.0: 0.03}  # of rope_ratio on the loss; noise is 0.01
NULL = dict.fromkeys(MIXED, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "effects"), [
    pytest.param(3, MIXED, id="3-mixed", marks=pytest.mark.whole),
    pytest.param(3, NULL, id="3-null"),
    pytest.param(5, MIXED, id="5-mixed"),
    pytest.param(5, NULL, id="5-null", marks=pytest.mark.whole),
    pytest.param(10, MIXED, id="10-mixed", marks=pytest.mark.whole),
    pytest.param(10, NULL, id="10-null", marks=pytest.mark.whole),
])  # fmt: skip
def test_intervals_cover_the_truth_and_false_findings_are_rare(tmp_path, n, effects):
    """Simulated studies of four variants that share a baseline."""
    values = {"rope_ratio": list(effects)}
    study = results.collect(write_study(tmp_path, values, lambda labels, count: 2.0, (1,), n, study=BASELINE))
    truth = {f"rope_ratio={ratio}": effect for ratio, effect in effects.items()}
    generator, studies = np.random.default_rng(n), 600
    covered = {"t_interval": [], "bootstrap_interval": []}
    false_findings = true_findings = 0
    for _ in range(studies):
        findings = evidence.find(_drawn(study, truth, generator))
        for one in findings.comparisons:
            for name, hits in covered.items():
                if interval := getattr(one.estimate, name):
                    hits.append(interval[0] <= truth[one.name] <= interval[1])
        told = [one.name for one in findings.comparisons if one.verdict != UNKNOWN]
        false_findings += any(not truth[name] for name in told)
        true_findings += any(truth[name] for name in told)
    assert np.mean(covered["t_interval"]) == pytest.approx(0.95, abs=0.02)
    if n > 3:
        assert np.mean(covered["bootstrap_interval"]) == pytest.approx(0.95, abs=0.02)
    else:
        assert not covered["bootstrap_interval"]
    assert false_findings / studies < 0.05 + 2 * (0.05 * 0.95 / studies) ** 0.5  # more studies: test_statistics.py
    assert effects is NULL or true_findings / studies > {3: 0.1, 5: 0.6, 10: 0.99}[n]  # or nothing would be worth it


def _drawn(study, truth, generator):
    """The same study with fresh losses: what a seed does to all cells, the effect, and noise."""
    shared = generator.normal(0, 0.05, 10)
    runs = []
    for run in study.runs:
        loss = 2.0 + shared[run.seed] + truth[run.cell["name"]] + generator.normal(0, 0.01)
        found = run.asked["loss"] | {"conditions": [{"eval_branch": 1, "loss": loss}]}
        runs.append(dataclasses.replace(run, asked={"loss": found}))
    return results.Results(study.directory, study.plan, runs)
