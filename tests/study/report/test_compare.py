"""Several studies side by side."""

import commands
import pytest
from studies import write_study

from lab import report

PAIR = {"rope_ratio": [0.0, 1.0]}


def study(directory, shift=0.0, noise=lambda labels, seed: 0.01 * seed, **options):
    options = {"values": PAIR, "counts": (1, 16), "seeds": 4, "sections": ("curves",)} | options
    return str(write_study(directory, loss=lambda labels, count: 2.0 + shift, noise=noise, **options))


def written(tmp_path, *directories):
    report.main([*directories, "--output", str(tmp_path / "out")])
    return (tmp_path / "out" / "comparison.md").read_text(), (tmp_path / "out" / "comparison.html").read_text()


def rows(text, column):
    lines = text[text.index(f"| {column} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_cells_of_one_name_are_paired_across_studies(tmp_path):
    def noise(labels, seed):
        return 0.01 * seed + 0.001 * (seed % 2)

    a, b, c = study(tmp_path / "a"), study(tmp_path / "b", -0.1, noise), study(tmp_path / "c")
    text, page = written(tmp_path, a, b, c)
    assert len(rows(text, "study")) == 6 and [row[3] for row in rows(text, "study")] == ["0 1 2 3"] * 6
    found = {row[0]: row[1:4] for row in rows(text, "cell | seeds")}
    assert found[f"{b}: rope_ratio=0.0"] == ["4", "**better**", "-0.0995"]
    assert found[f"{c}: rope_ratio=1.0"][1] == "cannot tell (no spread)"
    assert 'class="sortable"' in page


def test_studies_judged_otherwise_are_refused_by_name(tmp_path):
    a, b = study(tmp_path / "a"), study(tmp_path / "b", study={"judged": (1,)})
    text, _ = written(tmp_path, a, b)
    assert rows(text, "compared")[0][3] == "conditions: (1,) and (1, 16)"
    assert {row[2] for row in rows(text, "cell | seeds")} == {"cannot tell (no pair)"}


def test_studies_without_a_cell_in_common_are_listed(tmp_path):
    a = study(tmp_path / "a")
    b = study(tmp_path / "b", values={"rope_ratio": [0.5]})
    text, _ = written(tmp_path, a, b)
    assert len(rows(text, "study")) == 3 and "No later study has a cell named like one of" in text


@pytest.mark.parametrize("arguments", [["a", "a"], ["a", "none"], ["a", "--output", "x"]])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    study(tmp_path / "a")
    assert commands.ended(report.main, *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_comparison_is_written_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study(tmp_path / "a"), study(tmp_path / "b")
    report.main(["a", "b"])
    assert capsys.readouterr().out.split() == ["comparison.md", "comparison.html"]
    assert (tmp_path / "comparison.html").exists() and not (tmp_path / "a" / "report.md").exists()
