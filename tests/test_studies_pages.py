"""launch/studies.py: pages of what was run, an index of all, and runs that go on."""

import importlib.util
import re
import shutil
import subprocess

import commands
import pytest
from studies import write_study

specification = importlib.util.spec_from_file_location("launch_studies", commands.REPOSITORY / "launch" / "studies.py")
studies = importlib.util.module_from_spec(specification)
specification.loader.exec_module(studies)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository in which one study has run."""
    monkeypatch.setattr(studies, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(studies, "PAGES", tmp_path / "docs")
    values = {"rope_ratio": [0.0, 1.0], "train_branch": ["fixed1", "1-15"]}
    (tmp_path / "docs" / "notes").mkdir(parents=True)
    for name in ("rope_ablation-cpu", "probes-cpu"):
        (tmp_path / "docs" / "notes" / f"{name}.md").write_text(f"By hand of {name}.\n")
    write_study(tmp_path / "runs" / "rope_ablation-cpu", values, counts=(1, 16), seeds=3)
    return tmp_path


def test_a_page_stands_alone_and_the_index_has_all(place):
    assert studies.main(["--pages"]) == 0
    page = (place / "docs" / "rope_ablation-cpu.md").read_text()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert pictures and all((place / "docs" / path).stat().st_size > 1000 for path in pictures)
    assert "](cells/" not in page and "## Answer" in page
    index = (place / "docs" / "README.md").read_text().splitlines()
    lines = [line for line in index if line.startswith(("| [", "| `"))]
    assert len(lines) == len(studies.STUDIES)
    assert lines[0].startswith("| [rope_ablation:cpu](rope_ablation-cpu.md) |") and "runs done**" in lines[0]
    assert all("not run: `python launch/studies.py" in line for line in lines[1:])
    assert page.endswith("## Notes\n\nBy hand of rope_ablation-cpu.\n")
    assert "not run" in (not_run := (place / "docs" / "probes-cpu.md").read_text()) and "By hand of probes" in not_run


def test_a_page_whose_runs_are_elsewhere_stays(place):
    assert studies.main(["--pages"]) == 0
    page, index = (place / "docs" / "rope_ablation-cpu.md").read_text(), (place / "docs" / "README.md").read_text()
    shutil.rmtree(place / "runs")
    assert studies.main(["--pages"]) == 0
    assert (place / "docs" / "rope_ablation-cpu.md").read_text() == page
    assert (place / "docs" / "README.md").read_text() == index


def test_the_pages_of_other_studies_stay(place, monkeypatch):
    assert studies.main(["--pages"]) == 0
    first = place / "docs" / "rope_ablation-cpu.md"
    first.write_text("as it was")
    monkeypatch.setattr(studies, "run", lambda study: 0)
    assert studies.main(["muon_ablation:cpu"]) == 0 and first.read_text() == "as it was"
    assert studies.main(["rope_ablation:cpu", "--pages"]) == 0 and "## Answer" in first.read_text()


@pytest.mark.parametrize(("codes", "code", "begun"), [([0, 1], 0, 2), ([75], 75, 1), ([2], 2, 1)])
def test_a_study_that_stops_stops_all_and_one_that_fails_does_not(place, monkeypatch, codes, code, begun):
    made = []

    def run(study):
        made.append(study)
        return codes[len(made) - 1]

    monkeypatch.setattr(studies, "run", run)
    assert studies.main([*studies.STUDIES[:2]]) == code
    assert made == [*studies.STUDIES[:begun]]
    assert (place / "docs" / "README.md").exists()


def test_a_study_finds_the_cells_of_another_once_there_are_some(place):
    cells = place / "runs" / "rope_ablation-cpu" / "cells"
    ours = place / "runs" / "branch_decoding-cpu" / "cells"
    for study in ("branch_decoding:cpu", "probes:cpu"):
        studies.share_cells(study)
    assert not ours.exists()
    (next(cells.iterdir()) / "identity.json").write_text("{}")
    for study in ("branch_decoding:cpu", "branch_decoding:cpu", "rope_ablation:cpu"):
        studies.share_cells(study)
    assert ours.resolve() == cells.resolve() and not cells.is_symlink()


def test_a_study_that_is_none_is_one_line(place, capsys):
    assert studies.main(["rope:cpu"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("studies: a study = 'rope:cpu' is unknown (did you mean") and told.count("\n") == 1


def test_every_study_is_a_scale_of_a_config():
    from test_configs import CONFIGS, module

    scales = {path.stem: module(path).SCALES for path in CONFIGS}
    assert all(scale in scales[name] for name, _, scale in (study.partition(":") for study in studies.STUDIES))
    assert {name for name, _, _ in (study.partition(":") for study in studies.STUDIES)} == {*scales}


def test_a_study_upon_another_runs_that_first_and_goes_on_from_its_cell(place, monkeypatch):
    called = []

    def ended(command, cwd):
        called.append(dict(flag.split("=", 1) for flag in command[3:]))
        work = called[-1]["--workdir"]
        if "base" in work:
            write_study(
                place / "runs" / "branch_finetune-cpu-base",
                {"rope_ratio": [0.0]},
                loss=lambda labels, count: 2.0,
                counts=(1,),
                seeds=1,
            )
        return subprocess.CompletedProcess(command, codes.pop(0))

    monkeypatch.setattr(studies.subprocess, "run", ended)
    codes = [0, 0]
    assert studies.run("branch_finetune:cpu") == 0
    first, second = called
    assert first["--config"].endswith("branch_finetune.py:cpu-base") and "--config.checkpoint" not in first
    (cell,) = (place / "runs" / "branch_finetune-cpu-base" / "cells").iterdir()
    assert second["--config.checkpoint"] == str(cell)
    codes, called[:] = [75], []
    assert studies.run("branch_finetune:cpu-untuned") == 75 and len(called) == 1, "what it begins from was stopped"
