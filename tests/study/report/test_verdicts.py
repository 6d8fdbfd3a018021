"""The report of a study that compares its cells: verdicts first, honest about what limits them."""

import json
import re

import numpy as np
import pytest
from studies import branches, without_plotly, write, write_run, write_study
from test_report import Page, rows_of

from lab import report
from lab.study.judge import statistics

VALUES = {"rope_ratio": [0.0, 0.5, 1.0], "train_branch": ["fixed1", "1-15"]}
CONTRAST = ("all or nothing", (("rope_ratio", 1.0),), (("rope_ratio", 0.0),))
STUDY = {
    "baseline": (("rope_ratio", 0.0),),
    "judged": (1, 16),
    "contrasts": (CONTRAST,),
    "hypotheses": (("a larger share is better", (("single", "all or nothing", -1),)),),
}


def noise(labels, seed):
    return 0.01 * np.random.default_rng([seed, *map(ord, str(labels))]).normal()


def loss(labels, count):
    return 2.0 + 0.001 * count - 0.2 * (labels["rope_ratio"] == 1.0) - 0.001 * labels["rope_ratio"]


def built(directory, **options):
    options = {
        "values": VALUES,
        "loss": loss,
        "counts": (1, 16, 64),
        "seeds": 4,
        "noise": noise,
        "study": STUDY,
    } | options
    write_study(directory, **options)
    written = report.rebuild(directory)
    return (directory / "report.md").read_text(), without_plotly((directory / "report.html").read_text()), written


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return built(tmp_path_factory.mktemp("study"), sections=("curves",), published="configs/published/branches_512.csv")


def table(text, column):
    """The rows of the first Markdown table that begins with this column, links as what they show."""
    text = re.sub(r"\[(.*?)\]\(cells/.*?\)", r"\1", text)
    lines = text[text.index(f"| {column} |") :].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_sections_come_in_the_order_of_an_argument(finished):
    text, _, written = finished
    found = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert found == ["Answer", "Verdicts", "Evidence", "Loss by condition", "Learning curves", "Runs"]
    assert [path.name for path in written][2] == "comparisons.csv"


def test_each_part_is_compared_with_its_own_baseline(finished):
    rows = {(row["rope_ratio"], row["train_branch"]): row for row in table(finished[0], "rope_ratio")}
    verdicts = [rows[ratio, draw]["verdict"] for ratio in ("0.0", "0.5", "1.0") for draw in ("fixed1", "1-15")]
    assert verdicts == ["baseline"] * 2 + ["cannot tell"] * 2 + ["**better**"] * 2
    row = rows["1.0", "1-15"]
    low, high = (float(bound) for bound in row["95% interval"].strip("[]").split(", "))
    assert low < float(row["difference"]) < high < 0 and low < -0.2 < high + 0.02
    assert (row["seeds"], rows["0.0", "1-15"]["difference"]) == ("4", "—")


def test_the_noise_and_the_throughput_stand_beside_a_difference(tmp_path):
    write_study(tmp_path, VALUES, loss, (1, 16), 3, study=STUDY, noise=noise)
    for cell in json.loads((tmp_path / "plan.json").read_text())["cells"]:
        for seed, speed in enumerate((90000.0, 54000.0, 9.0) if cell["labels"]["rope_ratio"] == 1.0 else ()):
            write_run(tmp_path, cell, seed, loss, (1, 16), speed, noise)
    report.rebuild(tmp_path)
    text = (tmp_path / "report.md").read_text()
    rows = {(row["rope_ratio"], row["train_branch"]): row for row in table(text, "rope_ratio")}
    ours, theirs = ({"rope_ratio": ratio, "train_branch": "1-15"} for ratio in (1.0, 0.0))
    spread = np.std([noise(ours, seed) - noise(theirs, seed) for seed in range(3)], ddof=1)
    row = rows["1.0", "1-15"]
    assert row["noise"] == f"{spread:.4f}" and float(row["detectable"]) == pytest.approx(
        spread * statistics.detectable(3), abs=1e-4
    )
    assert row["tokens/s"] == "+20.0%"  # the median, 54,000, less 45,000
    assert (rows["0.5", "1-15"]["tokens/s"], rows["0.0", "1-15"]["tokens/s"]) == ("+0.0%", "—")
    assert rows["0.0", "1-15"]["noise"] == "—"
    (contrast,) = table(text, "contrast")
    assert contrast["tokens/s"] == "+20.0%" and float(contrast["noise"]) > 0


def test_evidence_is_by_claim_and_layer(finished):
    rows = table(finished[0], "claim")
    assert [(row["claim"], row["layer"], row["evidence"]) for row in rows] == [
        ("**a larger share is better**", "all", "**supported**"),
        ("", "single", "supported"),
    ]


def test_published_directions_agree_disagree_or_cannot_be_told(tmp_path):
    """Ratio 1 has the lower loss by 0.2, ratio 0.5 one that noise hides; the last claim was not published."""
    half = ("half or nothing", (("rope_ratio", 0.5),), (("rope_ratio", 0.0),))
    claims = (
        ("more is better", (("single", "all or nothing", -1),), "0.3 (one paper)"),
        ("more is worse", (("single", "all or nothing", 1),), "another paper"),
        ("half is better", (("single", "half or nothing", -1),), "a third"),
        ("half is worse", (("single", "half or nothing", 1),)),
    )
    text, _, _ = built(tmp_path, study=STUDY | {"contrasts": (CONTRAST, half), "hypotheses": claims})
    rows = table(text, "published")
    said = [(row["published"], row["how large, and where"], row["loss there"], row["ours says"]) for row in rows]
    assert said == [
        ("more is better", "0.3 (one paper)", "lower", "**agrees**"),
        ("more is worse", "another paper", "higher", "**disagrees**"),
        ("half is better", "a third", "lower", "**cannot tell**"),
    ]
    low, high = (float(bound) for bound in rows[0]["95% interval"].strip("[]").split(", "))
    assert low < float(rows[0]["ours"]) < high < 0 and rows[0]["compares"] == "all or nothing"
    assert {rows[0][cost] for cost in ("parameters", "training FLOPs", "cache", "attention work")} == {"+0.0%"}


def test_published_losses_stand_beside_ours(finished):
    rows = table(finished[0], "rope_ratio | train_branch | source")
    theirs = [row["1"] for row in rows if row["source"] == "published"]
    assert (theirs[0], theirs[-1]) == ("2.4375", "2.5997")
    ours = [row["1"] for row in rows if row["source"] == "ours"]
    means = [float(text.strip("*").split(" ± ")[0]) for text in ours]
    assert [text.startswith("**") for text in ours] == [mean == min(means) for mean in means]


def test_page_is_well_formed_and_its_scripts_are_inline(finished):
    tags = Page(finished[1]).found
    assert not any("src" in found for tag, found in tags if tag == "script")
    assert not {"link", "iframe"} & {tag for tag, _ in tags} and "url(" not in finished[1]
    assert sum(found.get("class") == "sortable" for tag, found in tags if tag == "table") == 3


def test_changes_of_a_cell_are_listed_against_its_baseline(finished):
    rows = {row["cell"]: row for row in table(finished[0], "cell | changes")}
    assert rows["rope_ratio=0.5,train_branch=1-15"]["changes"] == "model.position.ratio: 0.0 -> 0.5"
    assert "rope_ratio=0.0,train_branch=1-15" not in rows


def test_layout_may_differ_and_is_shown(tmp_path):
    study = {"baseline": (("train_branch", "fixed1"),)}
    text, _, _ = built(tmp_path, study=study, sections=(branches(VALUES), "curves"))
    rows = {row["cell"]: row for row in table(text, "cell | changes")}
    assert rows["rope_ratio=0.5,train_branch=1-15"]["differs in layout"] == "data.draw"
    assert "Refused pairs" not in text and "## Branches" in text and "## Loss by condition" not in text


def test_refused_pairs_are_named_with_their_field(tmp_path):
    write_study(tmp_path, VALUES, loss, (1, 16), 3, study=STUDY, noise=noise)
    path = next(tmp_path.glob("cells/rope_ratio=1.0,train_branch=1-15*/seed-1/result.json"))
    result = json.loads(path.read_text())
    write(path, result | {"segments": [result["segments"][0] | {"platform": "gpu"}]})
    report.rebuild(tmp_path)
    rows = table((tmp_path / "report.md").read_text(), "compared")
    found = {(row["compared"], row["seed"], row["differs in"].partition(";")[0]) for row in rows}
    assert found == {
        ("rope_ratio=1.0,train_branch=1-15", "1", "platform from step 0 on: gpu and cpu"),
        ("all or nothing", "1", "platform from step 0 on: cpu and gpu"),
    }
    assert all("rm -r cells/" in row["differs in"] for row in rows)


def test_one_seed_says_why_there_are_no_intervals(tmp_path):
    text, _, _ = built(tmp_path, seeds=1)
    assert "One seed gives no interval" in text
    assert {row["95% interval"] for row in table(text, "rope_ratio")} == {"—"}
    assert {row["verdict"] for row in table(text, "rope_ratio")} == {"baseline", "cannot tell (one seed)"}


def test_seeds_that_failed_are_said_to_be_missing(tmp_path):
    name = "rope_ratio=1.0,train_branch=1-15"
    write_study(tmp_path, VALUES, loss, (1, 16), 4, study=STUDY, noise=noise, skip={(name, 2)})
    (cell,) = (tmp_path / "cells").glob(f"{name}*")
    write(cell / "seed-2" / "failure.json", {"reason": "loss is nan"})
    report.rebuild(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "flatters their cells: rope_ratio 1.0, train_branch 1-15, seed 2." in text
    rows = {(row["rope_ratio"], row["train_branch"]): row for row in table(text, "rope_ratio")}
    assert rows["1.0", "1-15"]["seeds"] == "3"


@pytest.mark.parametrize(("looks", "said"), [((), False), ((4, 4), False), ((3, 4), True)])
def test_seeds_added_after_a_look_are_said(tmp_path, looks, said):
    text, _, _ = built(tmp_path, looks=looks)
    assert ("The number of seeds changed after a look at results** (3, then 4)" in text) == said


def test_a_study_that_has_just_begun_has_a_page(tmp_path):
    names = {f"rope_ratio={ratio},train_branch={draw}" for ratio in VALUES["rope_ratio"] for draw in ("fixed1", "1-15")}
    text, page_text, _ = built(tmp_path, skip={(name, seed) for name in names for seed in range(4)})
    assert "**Provisional**: 24 of 24 runs are not done." in text and "cannot tell (no pair)" in text
    Page(page_text)


def test_costs_are_drawn_where_cells_differ_in_them(tmp_path):
    write_study(tmp_path, VALUES, loss, (1, 16), 2, study=STUDY, noise=noise)
    plan = json.loads((tmp_path / "plan.json").read_text())
    for place, cell in enumerate(plan["cells"]):
        cell["parameters"] += 1000 * place
    write(tmp_path / "plan.json", plan)
    report.rebuild(tmp_path)
    text = (tmp_path / "report.md").read_text()
    rows = table(text, "point | cell")
    assert (tmp_path / "figures" / "pareto.png").exists() and list(rows[0]) == ["point", "cell", "loss", "parameters"]
    losses = [float(row["loss"]) for row in rows]  # in the order of rising parameters
    front = [loss == min(losses[: place + 1]) for place, loss in enumerate(losses)]
    assert [row["parameters"].startswith("**") for row in rows] == front and not all(front)


def test_studies_that_compare_nothing_have_an_answer_too(tmp_path):
    text, _, written = built(tmp_path, study={})
    assert text.index("## Answer") < text.index("## Branches") and "## Verdicts" not in text
    assert not (tmp_path / "comparisons.csv").exists() and len(written) == 4
    assert rows_of(text, "Recommendation")
