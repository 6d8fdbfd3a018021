"""A page for each cell: what became of it, and the command that makes it, and nothing else, again."""

import html
import json
import re
import shlex
from urllib.parse import unquote

import pytest
from studies import ASKED, write, write_study
from test_report import Page
from test_verdicts import STUDY, VALUES, loss, noise

from lab import report
from lab.study import evaluations, results
from lab.study.define import resolve
from lab.study.report import cell_page

FAILED, PENDING, DONE = (f"rope_ratio=0.5,train_branch={draw}" for draw in ("fixed1", "1-15", "1-7"))


def page_of(directory, name):
    (found,) = directory.glob(f"cells/{name}-*/index.html")
    return found.read_text()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of a baseline in which a run has failed and a cell was not begun."""
    directory = tmp_path_factory.mktemp("study")
    values = VALUES | {"train_branch": ["fixed1", "1-15", "1-7"]}
    skipped = {(FAILED, 1), *((PENDING, seed) for seed in range(4))}
    write_study(directory, values, loss, (1, 16), 4, study=STUDY, noise=noise, skip=skipped)
    (cell,) = directory.glob(f"cells/{FAILED}-*")
    write(cell / "seed-1" / "failure.json", {"reason": "loss is nan, <b>`x`", "step": 137})
    report.rebuild(directory)
    return directory


def test_every_cell_that_is_begun_has_a_page_that_the_report_leads_to(study):
    text = (study / "report.html").read_text()
    targets = {unquote(target) for target in re.findall(r'href="(cells/[^"]*)"', text)}
    assert targets == {path.relative_to(study).as_posix() for path in study.glob("cells/*/index.html")}
    assert len(targets) == 8 and not any(PENDING in target for target in targets)
    linked = re.findall(r"\]\((cells/[^)]*)\)", (study / "report.md").read_text())
    assert {unquote(target) for target in linked} == targets


def test_a_page_needs_nothing_but_the_script_beside_the_figures(study):
    text = page_of(study, DONE)
    targets = [value for _, found in Page(text).found for name, value in found.items() if name in ("src", "href")]
    inside = {target for target in targets if target.startswith("#")}
    assert {*targets} - inside == {"../../report.html", "../../figures/plotly.min.js"}
    assert (study / "figures" / "plotly.min.js").stat().st_size > 10**6 > 10 * len(text)


def test_a_page_tells_states_failures_losses_and_the_verdict(study):
    text = page_of(study, FAILED)
    assert "seed 0 done, seed 1 failed" in text
    assert "<strong>Seed 1 failed</strong> at step 137: loss is nan, &lt;b&gt;" in text
    frame = results.collect(study).results.query("cell == @FAILED and eval_branch == 16")["loss"]
    assert f"{frame.mean():.4f} ± {frame.std():.4f}" in text
    assert "Less its baseline, rope_ratio=0.0,train_branch=fixed1: <strong>cannot tell</strong>" in text
    assert "parameters 297 k" in text and "--cells=6/9" in page_of(study, DONE)


def test_a_config_is_shown_by_what_differs_from_the_baseline(study):
    assert "<td><code>model.position.ratio</code></td>" in page_of(study, DONE)
    rows = re.findall(r"<tr><td>(<code>.*)</tr>", page_of(study, DONE))
    assert len(rows) == 1 and re.sub("<.*?>", " ", rows[0]).split() == ["model.position.ratio", "0.0", "0.5"]
    baseline = page_of(study, "rope_ratio=0.0,train_branch=1-15")
    assert "study's base config" in html.unescape(baseline) and "1.0</td>" in baseline


@pytest.mark.parametrize("line", [
    "python -m lab.main --config=configs/rope_ablation.py",
    "python -m lab.main --config=configs/rope_ablation.py:gpu --cells=1/2 --workdir 'a b' --config.study.seeds=3",
    "python -m lab.main --cells 1/2 --config=configs/rope_ablation.py",
])  # fmt: skip
def test_the_command_of_a_cell_takes_it_and_no_other(study, line):
    asked = results.collect(study)
    asked.plan["command"] = line
    names = [cell["name"] for cell in asked.plan["cells"]]
    for place, name in enumerate(names, 1):
        words = shlex.split(cell_page.command(asked, place))
        (share,) = (word.removeprefix("--cells=") for word in words if word.startswith("--cells"))
        assert names[resolve.share(share)] == [name]
        assert [word for word in words if word.startswith("--workdir")] == [f"--workdir={study}-again"]
        kept = [word for word in shlex.split(line) if word.startswith("--config")]
        assert words[:3] == ["python", "-m", "lab.main"] and [word for word in words if "config" in word] == kept


def test_a_command_that_no_shell_reads_is_quoted(study):
    asked = results.collect(study)
    asked.plan["command"] = "it's <b>"
    assert shlex.split(cell_page.command(asked, 1))[0] == "it's <b>"


def test_a_damaged_config_is_said_to_be_missing(tmp_path):
    write_study(tmp_path, {"rope_ratio": [0.0]}, lambda labels, count: 2.0, (1,), sections=("curves",))
    next(tmp_path.glob("cells/*/config.json")).write_text("{")
    report.rebuild(tmp_path)
    assert "is not there yet" in page_of(tmp_path, "rope_ratio=0.0")


def test_what_is_asked_besides_the_loss_is_there(tmp_path):
    directory = write_study(tmp_path, {"rope_ratio": [0.0]}, lambda labels, count: 2.0, (1,), sections=("curves",))
    plan = json.loads((directory / "plan.json").read_text())
    plan["asks"]["many"] = "length"
    (cell,) = plan["cells"]
    cell["asks"] = cell["asks"] | {"many": ASKED["loss"]}
    write(directory / "plan.json", plan)
    found = evaluations.begun("many", "length", ASKED["loss"])
    rows = [{"length": 512, "loss": 1.2345, "accuracy": 0.5, "tokens": 9}]
    found |= {"complete": True, "conditions": rows, "timings": []}
    evaluations.save(directory / cell["directory"] / "seed-0", found)
    report.rebuild(directory)
    text = page_of(directory, "rope_ratio=0.0")
    assert "many: nats per token by length" in text and "1.2345" in text and "2.0000" in text
