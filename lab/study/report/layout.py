"""How reports name cells and arrange them into panels."""

import math
import shlex
from collections.abc import Mapping, Sequence
from statistics import fmean
from urllib.parse import quote

from lab.options import leaves
from lab.study.define.cells import ASIDE
from lab.study.report import tables
from lab.study.results import Outcome, Results, identity

WIDEST = 3  # panels in a row, where rows mean nothing
CELL_PAGE = "index.html"  # in the directory of each cell
MOST_CELLS = 60  # of a figure: no reader tells more lines apart, and drawing them takes minutes


def words_without(study: Results, flags: Sequence[str]) -> list[str]:
    """The words of the study's command, but for these flags and their values."""
    try:
        words = shlex.split(study.plan["command"])
    except ValueError:  # a plan that was written by hand
        words = [study.plan["command"]]
    kept, skipped = [], False
    for word in words:
        given = word.split("=")[0] in flags
        if not given and not skipped:
            kept.append(word)
        skipped = given and "=" not in word  # its value is the next word
    return kept


def line_label(study: Results) -> str:
    """The label whose values become the lines of a figure: the first that is numeric, else the first; "" of none."""
    numeric = [
        label for label in study.labels if all(_is_number(cell["labels"].get(label)) for cell in study.plan["cells"])
    ]
    return (numeric or study.labels or [""])[0]


def arrange(study: Results, curves: Mapping[tuple, object], line: str, *, rows_by: str = "") -> list[dict[str, dict]]:
    """Rows of panels {title: {value of `line`: curve}}: a panel for each combination of the other labels, a row for
    each value of `rows_by`, one of them (none given: the last), where there are several. Values without a curve get
    an empty one, so that colours stay put."""
    names = list(dict.fromkeys(cell["labels"].get(line, "") for cell in study.plan["cells"]))
    others = [label for label in study.labels if label != line]
    by = rows_by or (others[-1] if others else None)
    rows: dict = {}
    for key, curve in curves.items():
        labels = dict(zip(study.labels, key, strict=True))
        title = describe({label: labels[label] for label in others})
        panels = rows.setdefault(labels[by] if len(others) > 1 else "", {})
        panels.setdefault(title, {name: {} for name in names})[labels.get(line, "")] = curve
    if len(others) > 1:
        return list(rows.values())
    return panel_rows(rows.get("", {}))


def lowest(study: Results, curves: Mapping[tuple, object]) -> dict[tuple, object]:
    """Of `curves` by cell those that a figure has room for: the cells with the lowest mean loss, in their order."""
    if len(curves) <= MOST_CELLS:
        return dict(curves)
    means = {key: fmean(curve.values()) for key, curve in tables.losses(study).items()}
    kept = set(sorted(curves, key=lambda key: means.get(key, math.inf))[:MOST_CELLS])
    return {key: curve for key, curve in curves.items() if key in kept}


def few(cells: int) -> str:
    """What the caption of such a figure adds."""
    return f" **Of {cells} cells the {MOST_CELLS} with the lowest loss are drawn.**" if cells > MOST_CELLS else ""


def grouped(rows: list[dict[str, dict]], groups: Sequence[tuple[str, Sequence]]) -> list[dict[str, dict]]:
    """Each panel cut into one for each (title, names of lines) of `groups`; none: as it is."""
    if not groups:
        return rows
    panels = [panel for row in rows for panel in row.items()]
    return panel_rows({
        ", ".join(filter(None, (title, group))): {name: curves[name] for name in names if name in curves}
        for title, curves in panels
        for group, names in groups
    })  # fmt: skip


def panel_rows(panels: Mapping[str, object]) -> list[dict]:
    """Panels {title: content} cut into rows, where rows mean nothing."""
    items = list(panels.items())
    return [dict(items[start : start + WIDEST]) for start in range(0, len(items), WIDEST)]


def differences(config: Mapping, other: Mapping) -> dict[str, tuple]:
    """{field: (its value, the other's)} of the fields in which two configs differ; those aside that
    say nothing of what a cell is: how it runs, what it is asked, the study."""
    ours, theirs = leaves(config), leaves(other)
    fields = [field for field in ours | theirs if field.split(".")[0] not in ASIDE]
    found = {field: (ours.get(field, "—"), theirs.get(field, "—")) for field in fields}
    return {field: pair for field, pair in found.items() if pair[0] != pair[1]}


def describe(labels: Mapping[str, object]) -> str:
    """Labels as text: rope_ratio 0.5, train_branch 1-15."""
    return ", ".join(f"{label} {value}" for label, value in labels.items())


def cell_label(study: Results, key: tuple) -> str:
    """A cell by the values of its labels."""
    return describe(dict(zip(study.labels, key, strict=True)))


def run_label(study: Results, run: Outcome) -> str:
    """A cell and its seed."""
    return describe({name: value for name, value in identity(study, run).items() if name != "cell"})


def links(study: Results) -> list[str]:
    """Where the page of each cell of the plan lies, from the study's own pages; "" of one that is not begun."""
    begun = {
        name: any(run.metrics or run.result or run.failure for run in runs) for name, runs in study.runs_by_cell.items()
    }
    return [quote(f"{cell['directory']}/{CELL_PAGE}") if begun[cell["name"]] else "" for cell in study.plan["cells"]]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
