"""The pages: complete, honest about what is missing, self-contained, and free of what the inputs could smuggle in."""

import html.parser
import itertools
import json
import re
import shlex
from urllib.parse import unquote

import commands
import numpy as np
import pytest
import scipy
from studies import HEADS, RATIOS, plausible, without_plotly, write, write_study

from lab import report
from lab.errors import UserError
from lab.study import results
from lab.study.report import figures, labels, page, sections

PUBLISHED = "configs/published/branches_512.csv"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Collects tags and attributes, and checks that every element is closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def built(directory, **options):
    write_study(directory, **options)
    report.rebuild(directory)
    return (directory / "report.md").read_text(), without_plotly((directory / "report.html").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study with published numbers: its directory, Markdown and HTML."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, *built(directory, published=PUBLISHED)


def test_what_memory_carries_is_a_table_of_every_cell(finished):
    directory, text, _ = finished
    cells = json.loads((directory / "plan.json").read_text())["cells"]
    assert len(cells) == 10
    for cell in cells:
        last = "—" if cell["labels"]["rope_ratio"] == 0.0 else "7.0"
        assert f"| {' | '.join(map(str, cell['labels'].values()))} | 1,536 | 12.3 | 1.0 | {last} |" in text


def rows_of(text, heading, after=""):
    """The rows of the first Markdown table after a heading, and after a line that begins with `after`."""
    text = text[text.index(f"### {heading}\n") :]
    text = text[text.index(f"\n{after}") :]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0]
    header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in table.splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_page_is_well_formed_and_needs_nothing_from_outside(finished):
    directory, _, text = finished
    parsed = Page(text)
    targets = [value for _, found in parsed.found for name, value in found.items() if name in ("src", "href")]
    pages = [target for target in targets if not target.startswith(("data:image/png;base64,", "#"))]
    assert len(pages) == 10 and all((directory / unquote(target)).is_file() for target in pages)
    assert not {"link", "iframe"} & {tag for tag, _ in parsed.found}
    assert "url(" not in text and "@import" not in text and "http" not in text
    ids = {found.get("id") for _, found in parsed.found}
    assert all(target[1:] in ids for target in targets if target.startswith("#"))
    assert sum(tag == "img" for tag, _ in parsed.found) == 4


def test_markdown_links_lead_to_figures(finished):
    directory, text, _ = finished
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(links) == 4
    assert all((directory / link).read_bytes().startswith(b"\x89PNG") for link in links)


def test_seed_table_has_our_losses_the_published_ones_and_both_bests(finished):
    _, text, _ = finished
    row = rows_of(text, "Loss by rope_ratio and train_branch", "eval_branch 32")[-1]
    ours = plausible({"rope_ratio": 1.0, "train_branch": "1-15"}, 32)
    assert row == {
        "rope_ratio": "1.0",
        "fixed1": row["fixed1"],
        "1-15": f"**{ours:.4f}**",
        "best": "1-15",
        "published fixed1": "**5.8063**",
        "published 1-15": "**2.6340**",
        "published best": "1-15",
    }


def test_scaling_curve_has_fluctuation_beside_the_published(finished):
    _, text, _ = finished
    rows = rows_of(text, "Scaling with the number of branches", "train_branch 1-15")
    ours, published = rows[-2:]
    labels = {"rope_ratio": 1.0, "train_branch": "1-15"}
    assert ours["fluctuation"] == f"**{plausible(labels, 64) - plausible(labels, 1):.3f}**"
    assert (published["source"], published["32"], published["64"]) == ("published", "2.634", "—")
    assert published["fluctuation"] == f"{2.6340 - 2.5806:.3f}"


def test_spread_of_fixed1_over_ratios(finished):
    _, text, _ = finished
    ours, published = rows_of(text, "Spread of the models trained on a fixed number of branches")
    assert (ours["spread"], published["spread"]) == ("0.010", f"{2.4609 - 2.4375:.3f}")


def test_recommendation_is_a_config_of_the_best_cells(finished):
    _, text, html_text = finished
    rows = {row["use"]: row for row in rows_of(text, "Recommendation")}
    assert (rows["16 to 64 branches"]["rope_ratio"], rows["16 to 64 branches"]["train_branch"]) == ("1.0", "1-15")
    assert rows["16 to 64 branches"]["published"] == "1.0, 1-15"
    assert (rows["one branch"]["rope_ratio"], rows["one branch"]["train_branch"]) == ("0.0", "fixed1")
    assert "--config.model.position.ratio=1.0 --config.data.draw=1-15\n" in text
    assert "One seed, no error bars" in text and "One seed, no error bars" in html_text
    assert "Provisional" not in text


@pytest.mark.slow
def test_recommended_config_changes_all_that_the_cell_changes(tmp_path):
    text, _ = built(
        tmp_path, values=HEADS, loss=lambda labels, count: plausible(labels, count) - (labels["head"] == "h16")
    )
    line = next(line for line in text.splitlines() if line.startswith("--config.model.mixer.heads"))
    wanted = ["model.mixer.heads=16", "model.position.ratio=1.0", "data.draw=1-15", "model.mixer.kv_heads=4"]
    assert shlex.split(line) == [f"--config.{field}" for field in wanted]


@pytest.mark.slow
def test_head_study_has_a_table_for_each_draw_and_its_frequency_pairs(tmp_path):
    text, _ = built(tmp_path, values=HEADS, published="configs/published/head_dim_1024.csv")
    row = rows_of(text, "Loss by rope_ratio and head", "train_branch 1-15, eval_branch 64")[-1]
    assert (row["published h16"], row["published best"]) == ("**2.8152**", "h16")
    assert {"h8", "h16", "h32", "best"} < set(row)
    pairs = {(row["head"], row["rope_ratio"]): row for row in rows_of(text, "Frequency pairs of a head")}
    assert len(pairs) == 15
    carried = [pairs["h16", "0.75"][f"carry {axis}"] for axis in ("branch", "time", "index")]
    assert carried == ["12", "12", "8"] and pairs["h16", "0.75"]["frequency pairs"] == "32"
    spread = rows_of(text, "Spread of the models trained on a fixed number of branches")
    assert [row["spread"] for row in spread if row["source"] == "published"] == [
        "0.025",
        "0.044",
        "0.067",
        "0.082",
        "0.051",
    ]


def test_half_done_study_is_marked_provisional_and_shows_failures(tmp_path):
    failed, pending = "rope_ratio=0.25,train_branch=fixed1", "rope_ratio=0.5,train_branch=fixed1"
    write_study(tmp_path, skip={(failed, 0), (pending, 0)})
    cell = next(cell for cell in json.loads((tmp_path / "plan.json").read_text())["cells"] if cell["name"] == failed)
    reason = "loss is nan | batch <img src=http://x> `3f`"
    write(tmp_path / cell["directory"] / "seed-0" / "failure.json", {"reason": reason, "step": 137})
    report.rebuild(tmp_path)
    text, page_text = (tmp_path / "report.md").read_text(), without_plotly((tmp_path / "report.html").read_text())
    assert "**8 of 10 cells done**, 1 failed, 1 pending" in text
    assert "**Provisional**: 2 of 10 runs are not done." in text
    assert "| rope_ratio 0.25, train_branch fixed1, seed 0 | 137 | loss is nan \\| batch &lt;img src=http://x>" in text
    assert not any(found.get("src", "").startswith("http") for _, found in Page(page_text).found)
    row = rows_of(text, "Loss by rope_ratio and train_branch", "eval_branch 1")[2]
    assert (row["fixed1"], row["best"]) == ("—", "—")  # one of one is no comparison


def test_study_without_results_or_published_numbers_has_a_page(tmp_path):
    everything = {
        (f"rope_ratio={ratio},train_branch={draw}", 0) for ratio in RATIOS["rope_ratio"] for draw in ("fixed1", "1-15")
    }
    text, page_text = built(tmp_path, skip=everything)
    assert "**0 of 10 cells done**, 10 pending" in text and "No cell has finished yet." in text
    assert "No step has been logged yet." in text and "published" not in rows_of(text, "Frequency pairs of a head")[0]
    Page(page_text)
    assert (tmp_path / "results.csv").read_text().count("\n") == 1


def test_several_seeds_give_a_deviation_instead_of_the_caveat(tmp_path):
    text, _ = built(tmp_path, seeds=2)
    assert "is 0.0071 nats" in text and "no error bars" not in text  # 0.01 / sqrt(2)
    assert "**20 of 20 runs done**" in text


def test_unpaired_texts_and_mixed_environments_are_called_out(tmp_path):
    write_study(tmp_path)
    path = next(tmp_path.glob("cells/*/seed-0/result.json"))
    result = json.loads(path.read_text())
    write(path, result | {"text_hash": "f" * 64, "environment": result["environment"] | {"platform": "gpu"}})
    report.rebuild(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "read different training texts" in text and "different environments" in text


def test_what_a_user_writes_cannot_become_markup(tmp_path):
    write_study(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    hostile = "<script>alert(1)</script> {{ 7 * 7 }} & `<b>`"
    write(tmp_path / "plan.json", plan | {"question": hostile, "study": "<i>x</i>", "command": "</pre><script>"})
    report.rebuild(tmp_path)
    text = without_plotly((tmp_path / "report.html").read_text())
    assert not {"i", "b"} & {tag for tag, _ in Page(text).found} and "<script>alert" not in text
    assert "{{ 7 * 7 }}" in text
    assert "<script>alert" not in (tmp_path / "report.md").read_text()


def test_two_rebuilds_write_the_same_bytes(tmp_path):
    write_study(tmp_path, counts=(1, 16), published=PUBLISHED)
    seen = []
    for _ in range(2):
        report.rebuild(tmp_path)
        files = [path for path in tmp_path.rglob("*") if path.is_file() and "cells" not in path.parts]
        seen.append({path.relative_to(tmp_path): path.read_bytes() for path in files})
    # The plan, two tables, two pages, four figures, their events, and the script of the pages of cells.
    assert seen[0] == seen[1] and len(seen[0]) == 11


def test_a_study_of_other_labels_has_an_overview_and_curves(tmp_path):
    values = {"head": ["h8", "h16"]}
    text, page_text = built(tmp_path, values=values, sections=("curves",), loss=lambda labels, count: 2.0, counts=(1,))
    assert "**2 of 2 cells done**" in text and "figures/learning_curves.png" in text
    Page(page_text)


def test_branches_section_refuses_a_study_without_its_labels(tmp_path):
    write_study(tmp_path, {"head": ["h8"]}, loss=lambda labels, count: 2.0)
    with pytest.raises(UserError, match="a label of the section 'branches' = 'rope_ratio' is unknown"):
        report.rebuild(tmp_path)


def test_unknown_section_is_refused_with_the_nearest(tmp_path):
    write_study(tmp_path, sections=("branch",))
    with pytest.raises(UserError, match="did you mean 'branches'"):
        sections.make(results.collect(tmp_path), None)


def test_commands_on_the_page_run_all_of_the_study_where_it_lies(tmp_path):
    """Whichever job of several wrote the plan last, and whatever its directory is called."""
    place = write_study(tmp_path / "my runs", counts=(1,))
    plan = json.loads((place / "plan.json").read_text())
    for flag in ("--cells=7/16", "--cells 7/16"):
        write(place / "plan.json", plan | {"command": f"python -m lab.main {flag} --config='a b.py'"})
        report.rebuild(place)
        text = (place / "report.md").read_text()
        assert "\npython -m lab.main '--config=a b.py'\n" in text and f"\npython -m lab.report '{place}'\n" in text


def test_command_line(tmp_path, capsys):
    write_study(tmp_path / "study", counts=(1, 2))
    report.main([str(tmp_path / "study")])
    printed = capsys.readouterr().out.split()
    assert [path.rsplit("/", 1)[1] for path in printed] == ["results.csv", "timings.csv", "report.md", "report.html"]
    assert commands.ended(report.main, tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_names_beside_lines_never_touch_and_stay_in_the_panel():
    heights = [1.0, 1.01, 1.02, 0.0, 0.99, 2.0, 2.0]
    spaced = labels.spaced(heights, gap=0.1, bottom=0.0, top=2.0)
    order = sorted(spaced)
    assert min(b - a for a, b in itertools.pairwise(order)) > 0.1 - 1e-9
    assert order[0] >= 0 and order[-1] <= 2.0
    assert [heights[place] for place in sorted(range(7), key=spaced.__getitem__)] == sorted(heights)


def test_names_of_curves_that_end_low_lie_above_the_axis():
    curves = {f"a{number}": [{step: 4 - 0.02 * step + 1e-3 * number for step in range(101)}] for number in range(7)}
    axes = figures.learning_curves([{"": curves}]).axes[0]
    assert len(axes.texts) == 7
    assert min(text.get_window_extent().y0 for text in axes.texts) >= axes.get_window_extent().y0


@pytest.mark.parametrize("count", [*range(9), 100, 333])
def test_smoothing_keeps_straight_lines_and_evens_out_noise_to_both_ends(count):
    line = np.arange(count) * 0.3 - 2
    assert figures._smooth(line.tolist()) == pytest.approx(line.tolist())
    noise = np.random.default_rng(0).normal(size=(200, count))
    smooth = np.array([figures._smooth(row.tolist()) for row in noise])
    assert count < 3 or (smooth.std(axis=0) < 0.95 * noise.std(axis=0)).all()
    for row, found in zip(noise[:3], smooth[:3], strict=True):  # as Savitzky and Golay of the first degree
        width = next((w for w in range(2 * max(2, count // 50) + 1, 2, -2) if w <= count), 0)
        assert not width or found == pytest.approx(scipy.signal.savgol_filter(row, width, 1), abs=1e-12)


def test_names_of_points_cover_neither_each_other_nor_points():
    pairs = {str(10 + number): (number // 2 + 0.05 * (number % 2), 2.0 + number // 2 % 3) for number in range(12)}
    axes = figures.pareto({"seconds": pairs}).axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    points = [axes.transData.transform(place) for place in pairs.values()]
    assert [text.get_text() for text in axes.texts] == list(pairs)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.contains(*place) for box in boxes for place in points)


def test_only_columns_of_numbers_are_aligned_to_the_right():
    table = page.Table(["a", "b", "c", "d"], [["1.5", "1-15", "**2.0**", "3 MiB"], ["—", "2", "-1e-3", "4 M"]])
    assert page._numeric(table) == [True, False, True, False]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("branch", r"study\.sections = 'branch' is unknown \(did you mean 'branches'\?\)"),
        ("branches", r"must be \('branches', ratio, draw, \[head\]\), each by a label .*: rope_ratio, train_branch$"),
        (["branches", "rope_ratio"], r"must be \('branches', ratio, draw, \[head\]\)"),
        (
            ["branches", "rope_ratio", "train_branches"],
            r"label of the section 'branches' = 'train_branches' is unknown",
        ),
        (["curves", "rope_ratio"], r"must be 'curves': the section takes no labels"),
    ],
    ids=str,
)
def test_sections_that_cannot_be_made_are_refused_in_one_line(entry, told):
    with pytest.raises(UserError, match=told) as error:
        sections.parts([entry], ["rope_ratio", "train_branch"])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_section_reads_the_labels_that_it_is_given(tmp_path):
    """Under other labels the same losses make the same tables."""
    renamed = {"rope_ratio": "share", "train_branch": "drawn"}
    texts = []
    for place, names in (("own", {}), ("renamed", renamed)):
        directory = write_study(tmp_path / place)
        for path in directory.rglob("*.json"):
            text = path.read_text()
            for old, new in names.items():
                text = text.replace(f'"{old}"', f'"{new}"')
            write(path, json.loads(text))
        made = sections.make(results.collect(directory), None)
        texts.append(page.markdown("", [part for part in made if part.title == "Branches"]))
    for old, new in renamed.items():
        texts[0] = texts[0].replace(old, new)
    assert texts[1].replace("rope_ratio", "share").replace("train_branch", "drawn") == texts[0]
