"""A published series beside ours: by label, with or without conditions, and which published signs hold."""

import numpy as np
import pytest
from studies import write_study
from test_verdicts import table

from lab import report
from lab.study import results
from lab.study.judge import evidence
from lab.study.report import series, tables

SERIES = "configs/published/attention_series.csv"
OURS = {"MHA": 2.0, "GQA2-128": 2.1, "GQA1-256": 1.9, "MLA": 2.0, "not published": 2.2}
VALUES = {"variant": list(OURS)}


def contrast(name, *variants):
    return (name, *((("variant", variant),) for variant in variants))


STUDY = {
    "baseline": (("variant", "MHA"),),
    "contrasts": (
        contrast("width", "GQA1-256", "GQA2-128"),  # published -0.030, ours -0.2
        contrast("against width", "GQA1-256", "MHA"),  # published -0.001, ours -0.1
        contrast("the other sign", "GQA2-128", "not published"),
        contrast("no difference", "MLA", "MHA"),  # published a tie
        contrast("of differences", "GQA1-256", "GQA2-128", "MLA", "MHA"),  # published -0.030, ours -0.2
    ),
}


def loss(labels, count):
    return OURS[labels["variant"]] + 0.001 * count


def noise(labels, seed):
    return 0.1 * seed + 0.001 * np.random.default_rng([seed, *map(ord, labels["variant"])]).normal()


def built(directory, **options):
    options = {"seeds": 4, "published": SERIES, "study": STUDY, "loss": loss, "noise": noise} | options
    return write_study(directory, VALUES, counts=(1, 2), sections=("series",), **options)


def told(directory):
    report.rebuild(directory)
    return (directory / "report.md").read_text().split("\n## The published series")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return told(built(tmp_path_factory.mktemp("study")))


def test_ours_and_theirs_are_side_by_side(text):
    rows = {row["variant"]: row for row in table(text, "variant")}
    wide = rows["GQA1-256"]
    assert (wide["published loss"], wide["published difference"]) == ("2.7200", "-0.0010")
    assert (wide["verdict"], wide["sign replicates"]) == ("**better**", "yes")
    assert (wide["parameters"], wide["published parameters"], wide["published cache"]) == ("297 k", "943 M", "512")
    assert (wide["FLOPs per token"], wide["attention work"], wide["cache"]) == ("1.93 M", "192", "48")
    assert rows["MHA"]["verdict"] == "baseline" and rows["MHA"]["published difference"] == "—"
    unknown = rows["not published"]
    assert (unknown["published loss"], unknown["sign replicates"], unknown["verdict"]) == ("—", "—", "**worse**")


def test_the_interval_of_a_loss_is_over_seeds_and_that_of_a_difference_over_pairs(text):
    row = {row["variant"]: row for row in table(text, "variant")}["GQA1-256"]
    mean, half = map(float, row["loss ± 95%"].split(" ± "))
    # Seeds move a loss by 0.1 each: mean 1.9 + 0.15, deviation 0.129, t of 3 degrees of freedom 3.182.
    assert mean == pytest.approx(1.9 + 0.15 + 0.0015, abs=0.01)
    assert half == pytest.approx(3.182 * 0.1291 / 2, abs=0.01)
    low, high = (float(bound) for bound in row["95% interval"].strip("[]").split(", "))
    assert low < -0.1 < high + 0.01 and high - low < 0.02


def line(text, name):
    (found,) = [line for line in text.splitlines() if line.startswith(f"**{name}**")]
    return found


@pytest.mark.parametrize(("name", "answer", "theirs"), [
    ("width", "yes", "-0.0300"),
    ("against width", "yes", "-0.0010"),
    ("no difference", "cannot tell", "+0.0000, a tie"),
    ("of differences", "yes", "-0.0300"),
])  # fmt: skip
def test_each_contrast_says_whether_its_sign_replicates(text, name, answer, theirs):
    assert f": **{answer}**. Published {theirs}; ours " in line(text, name)
    assert "Residuals: parameters +0.0%, training FLOPs +0.0%, cache +0.0%, attention work +0.0%." in text


def test_contrasts_that_are_not_published_are_named(text):
    assert "Not published on every side: the other sign." in text
    assert "Of 4 contrasts with published losses on every side: yes 3, no 0, cannot tell 1." in text


def findings(directory, **options):
    study = results.collect(built(directory, **options))
    return {one.name: one for one in evidence.find(study).of_kind("contrast")}


@pytest.mark.parametrize(("difference", "answer"), [(-0.003, "yes"), (0.003, "no"), (0.0, "cannot tell")])
def test_a_sign_replicates_or_not(tmp_path, difference, answer):
    found = findings(tmp_path)
    assert series.replicates(found["width"], difference) == answer
    assert series.replicates(found["the other sign"], difference) == answer  # ours: better too
    assert series.replicates(found["no difference"], difference) == "cannot tell"  # ours: no verdict


def test_one_seed_replicates_nothing(tmp_path):
    found = findings(tmp_path, seeds=1)
    assert {series.replicates(one, -0.03) for one in found.values()} == {"cannot tell"}
    text = told(tmp_path)
    assert ": **cannot tell**. Published -0.0300; ours -0." in line(text, "width")
    assert " —, cannot tell (one seed). " in line(text, "width")
    assert not any("±" in row["loss ± 95%"] for row in table(text, "variant"))


def test_a_sign_that_does_not_replicate_is_said(tmp_path):
    reversed_ = {name: -value for name, value in OURS.items()}
    built(tmp_path, loss=lambda labels, count: 5.0 + reversed_[labels["variant"]])
    text = told(tmp_path)
    assert ": **no**. Published -0.0300; ours +0." in line(text, "width") and ", worse. " in line(text, "width")
    assert "yes 0, no 3, cannot tell 1" in text
    assert {row["variant"]: row["sign replicates"] for row in table(text, "variant")}["GQA1-256"] == "no"


def test_published_differences_are_means_over_sides():
    theirs = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0}
    assert series.published_difference([["a", "b"], ["c"]], theirs) == 1.5 - 4.0
    assert series.published_difference([["a"], ["b"], ["c"], ["d"]], theirs) == (1 - 2) - (4 - 8)
    assert series.published_difference([["a", "e"], ["c"]], theirs) is None


def test_one_published_loss_holds_for_all_conditions(tmp_path):
    study = results.collect(built(tmp_path))
    theirs = tables.published(study)
    assert theirs["MLA",] == {1: 2.721, 2: 2.721} and ("not published",) not in theirs
    assert series.published(study)["variant=GQA1-256"] == 2.72


def write_csv(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("judged", "published"), [
    ((), {"MHA": 2.8}), ((1,), {"MLA": 2.5, "MHA": 2.6}), ((2,), {"MHA": 3.0})
])  # fmt: skip
def test_losses_by_condition_are_judged_like_ours(tmp_path, judged, published):
    """A variant that lacks a judged condition is not published; the mean over others would be another quantity."""
    path = write_csv(tmp_path / "theirs.csv", "variant,eval_branch,loss\nMLA,1,2.5\nMHA,1,2.6\nMHA,2,3.0\n")
    study = results.collect(built(tmp_path / "study", published=path, study={"judged": judged}))
    assert series.published(study) == pytest.approx({f"variant={name}": loss for name, loss in published.items()})


@pytest.mark.parametrize("text", [
    "model,loss\nMLA,2.5\n",  # no column for the label
    "variant,size,loss\nMLA,small,2.5\nMLA,large,2.4\n",  # two losses for one cell
    "variant,loss\nother,2.5\n",
])  # fmt: skip
def test_losses_of_other_cells_are_not_set_beside_ours(tmp_path, text):
    directory = built(tmp_path / "study", published=write_csv(tmp_path / "theirs.csv", text))
    assert tables.published(results.collect(directory)) == {}
    text = told(directory)
    assert "names no published losses of its cells" in text and "replicate?" not in text


def test_a_variant_may_be_called_none(tmp_path):
    path = write_csv(tmp_path / "theirs.csv", "variant,loss\nNone,2.5\nnone,2.6\n")
    write_study(tmp_path / "study", {"variant": ["None", "none"]}, lambda labels, count: 2.0, (1,), published=path)
    assert tables.published(results.collect(tmp_path / "study")) == {("None",): {1: 2.5}, ("none",): {1: 2.6}}


def test_a_study_that_compares_nothing_or_has_just_begun_has_a_section(tmp_path):
    built(tmp_path / "none", study={})
    rows = table(told(tmp_path / "none"), "variant")
    assert {row["verdict"] for row in rows} == {"—"} and rows[0]["published loss"] == "2.7210"
    directory = built(tmp_path / "begun", skip={(f"variant={name}", seed) for name in OURS for seed in range(4)})
    assert "No cell has finished yet." in told(directory)


@pytest.mark.parametrize(
    ("name", "count", "least"), [("attention_series", 18, "GQA1-(512+64)-S3"), ("vo_rope", 9, "QK")]
)
def test_published_files_name_each_variant_once(tmp_path, name, count, least):
    path = f"configs/published/{name}.csv"
    frame = results.collect(built(tmp_path, published=path)).published()
    assert len(frame) == frame["variant"].nunique() == count
    assert frame.loc[frame["loss"].idxmin(), "variant"] == least
