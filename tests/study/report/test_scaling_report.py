"""The report of a study over rungs, and of a ladder of sizes: laws, gains, and what is missing said in a line."""

import json
import re

import numpy as np
import pytest
from studies import without_plotly, write, write_run, write_study
from test_report import Page
from test_verdicts import table

from lab import report
from lab.study import results
from lab.study.judge import scaling as laws
from lab.study.report import headline, live, page, scaling

COMPUTE = {"s": 1e11, "m": 1e12, "l": 1e13}
ABOVE = {"xl": 1e14}
WORTH = {"base": 1.0, "better": 1.5, "fades": 1.6, "slow": 1.0}
STUDY = {"baseline": (("variant", "base"),)}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(laws, "RESAMPLES", 10)


def loss(labels, count):
    """1.5 + 200 / C^0.25, of a variant as if it had had more compute; `fades` gains less on every rung."""
    compute = (COMPUTE | ABOVE)[labels["rung"]]
    worth = WORTH[labels["variant"]] / (1.25 ** np.log10(compute / 1e11) if labels["variant"] == "fades" else 1)
    return 1.5 + 200 / (compute * worth) ** 0.25


def noise(labels, seed):
    own = np.random.default_rng([seed, *map(ord, str(labels))]).normal()
    return 0.003 * np.random.default_rng([seed, *map(ord, labels["rung"])]).normal() + 0.0005 * own


def made(directory, rungs=("s", "m", "l"), variants=tuple(WORTH), **options):
    """Each rung has ten times the compute: size and tokens grow alike. `slow` takes twice the time of a step."""
    values = {"variant": list(variants), "rung": list(rungs)}
    options = {"seeds": 3, "study": STUDY, "loss": loss, "noise": noise, "sections": ()} | options
    write_study(directory, values, counts=(1,), **options)
    plan = json.loads((directory / "plan.json").read_text())
    for cell in plan["cells"]:
        scale = (COMPUTE | ABOVE)[cell["labels"]["rung"]] / 1e11
        cell["train_flops_per_token"] = 1e11 * scale**0.5 / 512_000
        cell["tokens"] = round(512_000 * scale**0.5)
        cell["parameters_non_embedding"], cell["parameters"] = (round(size * scale**0.5) for size in (30_000, 46_000))
        for seed in cell["seeds"]:
            speed = 512_000 / (scale**0.5 * (2 if cell["labels"]["variant"] == "slow" else 1))
            write_run(directory, cell, seed, options["loss"], (1,), speed, options["noise"])
    write(directory / "plan.json", plan)
    return directory


def told(directory):
    """The section alone, as Markdown; its page and figures are written too."""
    page.write(directory, "made", [page.Section("Scaling", scaling.section(results.collect(directory)))])
    return (directory / "report.md").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = made(tmp_path_factory.mktemp("study"))
    return directory, told(directory)


def test_gains_of_every_variant_stand_in_one_table(finished):
    rows = {(row["variant"], row["at equal"]): row for row in table(finished[1], "variant | at equal")}
    assert len(rows) == 6  # three variants, at equal steps and at equal time
    gain = lambda *key: [float(rows[key][rung].split(" ")[0].strip("†")) for rung in COMPUTE]  # noqa: E731
    assert gain("better", "steps") == pytest.approx([1.5] * 3, rel=0.05) == gain("better", "time")
    assert gain("fades", "steps") == pytest.approx([1.6, 1.28, 1.02], rel=0.05)
    assert gain("slow", "steps") == pytest.approx([1.0] * 3, rel=0.05)
    assert gain("slow", "time") == pytest.approx([0.5] * 3, rel=0.05)
    verdicts = {key: row["with size"] for key, row in rows.items()}
    assert verdicts["better", "steps"] == verdicts["better", "time"] == "**holds**"
    assert verdicts["fades", "steps"] == "**shrinks**" and verdicts["slow", "steps"] == "**cannot tell**"
    assert "†" in rows["better", "steps"]["l"] and "†" not in rows["better", "steps"]["s"]
    assert {row["seeds"] for row in rows.values()} == {"3"}


def test_one_ratio_of_tokens_to_parameters_is_said_and_compute_is_fitted(finished):
    _, text = finished
    assert "N decides D, as where D / N is constant" in text
    (row,) = table(text, "E | K | g")
    assert float(row["E"].split(" ")[0]) == pytest.approx(1.5, abs=0.05) and row["runs"] == "9"
    assert re.fullmatch(r"0\.2\d+ \[0\.\d+, 0\.\d+\]", row["g"])


def test_the_figures_have_a_picture_and_panels_to_look_into(finished):
    directory, text = finished
    assert text.count("![scaling_") == 2
    assert all((directory / "figures" / f"scaling_{name}.png").stat().st_size > 5000 for name in ("fit", "gains"))
    html = (directory / "report.html").read_text()
    Page(without_plotly(html))
    assert "seconds of training" in html


def test_points_and_lines_of_a_ladder_share_their_colours():
    figure = live.ladder({"C": ({"base": {1e9: 3.0, 1e10: 2.5}, "new": {1e9: 2.9}}, {"base": {1e9: 3.0, 1e10: 2.5}})})
    points, other, line = figure["panels"][0]["data"]
    assert (points["mode"], other["mode"], line["mode"]) == ("markers", "markers", "lines")
    assert points["line"] == line["line"] and points["y"] == [3.0, 2.5] and not line["showlegend"]
    assert figure["panels"][0]["layout"]["xaxis"]["type"] == "log"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(rungs=("s", "m")), "A gain needs 3 rungs**, and the study has 2 (s, m): add to study.rungs."),
        (dict(study={}), "A gain is against a baseline**, and the study names none: set study.baseline."),
        (dict(variants=("base",)), "No variant has a baseline**"),
        (dict(seeds=1, variants=("base", "better")), "cannot tell (one seed)"),
        (
            dict(variants=("base", "better"), skip=[("variant=better,rung=l", seed) for seed in range(3)]),
            "cannot tell: 2 rungs (s, m) have paired seeds, and a gain needs 3",
        ),
        (
            dict(rungs=("s", "m", "l", "xl"), skip=[("variant=better,rung=xl", seed) for seed in range(3)]),
            "cannot tell: no pair at xl",
        ),
    ],
    ids=str,
)
def test_what_gains_lack_is_said_in_a_line(tmp_path, options, said):
    options = {"variants": ("base", "better"), "seeds": 2} | options
    skipped = options.pop("skip", ())
    directory = made(tmp_path, **options)
    for cell in json.loads((directory / "plan.json").read_text())["cells"]:
        for seed in (seed for name, seed in skipped if name == cell["name"]):
            (directory / cell["directory"] / f"seed-{seed}" / "result.json").unlink(missing_ok=True)
    assert said in told(directory)


def test_a_study_over_rungs_has_the_section_unasked(tmp_path):
    report.rebuild(made(tmp_path, rungs=("s", "m"), variants=("base", "better"), seeds=1, sections=("curves",)))
    text = (tmp_path / "report.md").read_text()
    assert text.count("\n## Scaling\n") == 1 and "A gain needs 3 rungs" in text
    assert "there are 2 amounts of compute C, and it needs 3" in text


def grid(labels, count):
    n, d = labels["rope_ratio"] * 1e6, labels["train_branch"] * 1e6
    return 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28


def test_a_ladder_of_sizes_and_tokens_has_the_law_of_both(tmp_path):
    """A study without rungs that names the section: labels of any name, sizes and tokens from the plan."""
    values = {"rope_ratio": [1, 4, 16], "train_branch": [20, 60, 180]}
    write_study(tmp_path, values, grid, (1,), sections=("scaling",), noise=lambda labels, seed: 0.0)
    plan = json.loads((tmp_path / "plan.json").read_text())
    for cell in plan["cells"]:
        cell["parameters_non_embedding"] = cell["labels"]["rope_ratio"] * 10**6
        cell["parameters"] = cell["parameters_non_embedding"] + 500_000
        cell["tokens"] = cell["labels"]["train_branch"] * 10**6
    write(tmp_path / "plan.json", plan)
    text = told(tmp_path)
    rows = {row["N"]: row for row in table(text, "N | E | A")}
    assert [*rows] == ["not embedding", "all parameters", "Hoffmann et al. 2022", "Besiroglu et al. 2024"]
    found = [float(rows["not embedding"][name].split(" [")[0]) for name in ("E", "A", "a", "B", "b")]
    assert found == pytest.approx([1.69, 406.4, 0.34, 410.7, 0.28], rel=0.02)
    assert rows["Besiroglu et al. 2024"]["b"] == "0.3658" and rows["not embedding"]["runs"] == "9"
    assert "Compute-equivalent" not in text and "![scaling_fit]" in text
    answer = headline.answer(results.collect(tmp_path), None)
    said = re.search(r"loss falls as N\^-a and D\^-b\*\* .*: a (\S+).*, b (\S+).*, towards (\S+)", answer).groups()
    assert [float(x) for x in said] == pytest.approx([0.34, 0.28, 1.69], abs=0.011)
