"""What a study compares with what: its baseline, contrasts between groups of cells, and the claims they bear on."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

from lab.errors import UserError, choose
from lab.study.define.settings import STUDY, Expected, Pairs

LAYERS = ("single", "crossed", "aligned")  # one factor changed; several at once; one changed at equal parameters
SIGNS = {2: (1, -1), 4: (1, -1, -1, 1)}  # of the sides of a contrast: a - b, and (a - b) - (c - d)

Labels = Mapping[str, Mapping[str, object]]  # {name of a cell: its labels}


@dataclasses.dataclass(frozen=True)
class Contrast:
    """The loss of one selection less that of another, or the difference of two such differences."""

    name: str
    sides: tuple[Pairs, ...]


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A claim in words, and what it expects: (layer, name of a contrast, sign of that contrast); `published`: what was
    found elsewhere, and where, "" of a claim of the study's own."""

    claim: str
    expected: Expected
    published: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What config.study asks of the statistics; true if it asks for any comparison."""

    judged: tuple
    baseline: Pairs
    contrasts: tuple[Contrast, ...]
    hypotheses: tuple[Hypothesis, ...]

    def __bool__(self) -> bool:
        return bool(self.baseline or self.contrasts)


def settings(study: Mapping) -> Settings:
    """Of config.study, or of what plan.json keeps of it. Raises UserError where a shape is wrong."""
    names = "judged", "baseline", "contrasts", "hypotheses"
    judged, baseline, contrasts, hypotheses = (_tuples(study.get(name, ())) for name in names)
    for name, value in zip(names, (judged, baseline, contrasts, hypotheses), strict=True):
        STUDY.own[name].check(f"study.{name}", value)
    made = tuple(Contrast(name, tuple(sides)) for name, *sides in contrasts)
    return Settings(judged, baseline, made, tuple(Hypothesis(*entry) for entry in hypotheses))


def check(study: Mapping, cells: Labels, conditions: Collection) -> None:
    """Refuses, before anything runs, a baseline, contrast, hypothesis or judged condition that names nothing.

    `study` is config.study, `conditions` the values that cells are evaluated under.
    """
    asked = settings(study)
    for condition in asked.judged:
        choose("a condition in study.judged", condition, conditions)
    _check_values("study.baseline", asked.baseline, cells)
    if asked.baseline and not any(_matches(labels, asked.baseline) for labels in cells.values()):
        near = max(cells, key=lambda name: sum(_matches(cells[name], (pair,)) for pair in asked.baseline))
        raise UserError(f"study.baseline = {_spelled(asked.baseline)} matches no cell; the nearest is {near}")
    names = [contrast.name for contrast in asked.contrasts]
    for contrast in asked.contrasts:
        if names.count(contrast.name) > 1:
            raise UserError(f"study.contrasts has two named {contrast.name!r}; names must differ")
        _check_contrast(contrast, cells)
    for hypothesis in asked.hypotheses:
        for layer, name, sign in hypothesis.expected:
            choose("a layer in study.hypotheses", layer, LAYERS)
            choose("a contrast in study.hypotheses", name, names)
            choose("a sign in study.hypotheses", sign, (-1, 1))


def select(cells: Labels, pairs: Pairs) -> list[str]:
    """The names of the cells that have, for every label, the value or one of the values."""
    return [name for name, labels in cells.items() if _matches(labels, pairs)]


def differing(sides: Sequence[Sequence[Mapping[str, object]]]) -> dict[str, tuple[str, ...]]:
    """{field: its values on each side, joined by |} of the fields that have not the same values on all sides.

    sides: of each the fields that its cells read, as a plan has them. What one side alone reads is not among them: it
    belongs to the entry of a table that reads it, whose name is.
    """
    read = set.intersection(*(set(cell) for side in sides for cell in side))
    shown = {field: tuple(_joined(cell[field] for cell in side) for side in sides) for field in sorted(read)}
    return {field: values for field, values in shown.items() if len({*values}) > 1}


def _joined(values: Iterable) -> str:
    return " | ".join(sorted({*map(str, values)}))


def baselines(cells: Labels, baseline: Pairs) -> dict[str, str]:
    """{cell: its baseline}: the cell that has the baseline's values and otherwise its own. Cells that are baselines
    themselves, and those for which there is none, are left out."""
    if not baseline:
        return {}
    found = {}
    known = {name: _frozen(labels) for name, labels in cells.items()}
    for name, labels in known.items():
        wanted = labels | dict(baseline)
        there = [other for other, its in known.items() if its == wanted]
        if there and there[0] != name:
            found[name] = there[0]
    return found


def _check_contrast(contrast: Contrast, cells: Labels) -> None:
    where = f"study.contrasts {contrast.name!r}"
    for side in contrast.sides:
        _check_values(where, side, cells)
        if not select(cells, side):
            raise UserError(f"{where}: no cell has {_spelled(side)}; cells: {', '.join(list(cells)[:6])}, ...")
    for left, right in zip(contrast.sides[::2], contrast.sides[1::2], strict=True):
        if select(cells, left) == select(cells, right):
            raise UserError(f"{where}: {_spelled(left)} and {_spelled(right)} are the same cells")


def _check_values(where: str, pairs: Pairs, cells: Labels) -> None:
    for label, wanted in pairs:
        choose(f"a label of {where}", label, dict.fromkeys(name for labels in cells.values() for name in labels))
        values = [labels[label] for labels in map(_frozen, cells.values()) if label in labels]
        for value in wanted if isinstance(wanted, tuple) and wanted not in values else (wanted,):
            choose(f"{where} {label}", value, list(dict.fromkeys(values)))


def _matches(labels: Mapping, pairs: Pairs) -> bool:
    own = _frozen(labels)
    return all(
        label in own and (own[label] == wanted or (isinstance(wanted, tuple) and own[label] in wanted))
        for label, wanted in pairs
    )


def _frozen(labels: Mapping) -> dict:
    """Values of labels as a config gives them: JSON has made lists of its tuples."""
    return {label: _tuples(value) for label, value in labels.items()}


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _spelled(pairs: Pairs) -> str:
    return ", ".join(f"{label} {value}" for label, value in pairs) or "all cells"
