"""The comparisons of a study with their statistics, and what they say of its hypotheses."""

import csv
import dataclasses
import io
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from lab.storage import write_atomically
from lab.study.define.contrasts import SIGNS, Contrast, Settings, baselines, differing, select, settings
from lab.study.judge import pairing, statistics
from lab.study.judge.pairing import Differences, Scores
from lab.study.judge.residuals import COSTS, Residuals, faster, residuals, throughput
from lab.study.judge.statistics import LEVEL, Estimate
from lab.study.results import Results

COLUMNS = (
    "kind", "name", "against", "n", "difference", "deviation", "t_low", "t_high", "bootstrap_low", "bootstrap_high",
    "p", "p_holm", "detectable", "verdict", "seeds", "refused", *(cost.column for cost in COSTS.values()), "differs_in",
)  # fmt: skip
UNKNOWN = "cannot tell"
NO_TEST = {0: "no pair", 1: "one seed"}  # why there is none, by the number of differences


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`name` less `against`, over the seeds that both have: below 0, `name` has the lower loss."""

    kind: str  # baseline | contrast | study
    name: str
    against: str
    differences: Differences
    estimate: Estimate
    residuals: Residuals  # by how much `name` costs more
    adjusted: float | None = None  # p after Holm's correction over the comparisons of the study
    differing: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # {field: its values by side}
    speed: float = math.nan  # by how much `name` trains faster, as it was measured

    @property
    def verdict(self) -> str:
        """better | worse | cannot tell, and where too few seeds or equal differences are the reason, that reason."""
        if self.adjusted is None:
            return f"{UNKNOWN} ({NO_TEST.get(self.estimate.n, 'no spread')})"
        if self.adjusted >= LEVEL:
            return UNKNOWN
        return "better" if self.estimate.mean < 0 else "worse"


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What one contrast says of a claim that expects its sign."""

    claim: str
    layer: str
    comparison: Comparison
    sign: int
    published: str = ""  # of the claim: what was found elsewhere, and where

    @property
    def told_layer(self) -> str:
        """The layer, and where it says that one thing differs and more do, how many."""
        several = self.layer == "single" and len(self.comparison.differing) > 1
        return f"{self.layer}, **but {len(self.comparison.differing)} fields differ**" if several else self.layer

    @property
    def outcome(self) -> str:
        """supported | contradicted | cannot tell."""
        found = {"better": -1, "worse": 1}.get(self.comparison.verdict, 0)
        return UNKNOWN if not found else "supported" if found == self.sign else "contradicted"


@dataclasses.dataclass(frozen=True)
class Findings:
    settings: Settings
    scores: Scores
    baselines: dict[str, str]  # {cell: the cell it is compared with}
    comparisons: list[Comparison]  # with the baseline in the plan's order, then the contrasts
    evidence: list[Evidence]

    def of_kind(self, kind: str) -> list[Comparison]:
        return [comparison for comparison in self.comparisons if comparison.kind == kind]


def find(study: Results, judged: tuple | None = None) -> Findings | None:
    """None of a study that names neither a baseline nor a contrast. judged: conditions instead of the study's."""
    asked = settings(study.plan["config"].get("study", {}))
    if not asked:
        return None
    if judged is not None:
        asked = dataclasses.replace(asked, judged=judged)
    scores = pairing.scores(study, asked.judged)
    cells = {cell["name"]: cell["labels"] for cell in study.plan["cells"]}
    against = baselines(cells, asked.baseline)
    sides = [("baseline", name, other, ([name], [other])) for name, other in against.items()]
    for contrast in asked.contrasts:
        sides.append(("contrast", contrast.name, _against(contrast), [select(cells, side) for side in contrast.sides]))
    planned, speeds = {cell["name"]: cell for cell in study.plan["cells"]}, throughput(study)
    found = [_compare(*names, its, scores, planned, speeds) for *names, its in sides]
    comparisons = corrected(found, [_pair(pair) for *_, pair in sides])
    named = {comparison.name: comparison for comparison in comparisons if comparison.kind == "contrast"}
    evidence = [
        Evidence(hypothesis.claim, layer, named[name], sign, hypothesis.published)
        for hypothesis in asked.hypotheses
        for layer, name, sign in hypothesis.expected
    ]
    return Findings(asked, scores, against, comparisons, evidence)


def compare(
    kind: str, name: str, against: str, differences: Differences, costs: Residuals, speed: float = math.nan
) -> Comparison:
    """A comparison that stands alone, before correction."""
    return Comparison(kind, name, against, differences, _estimate(differences), costs, speed=speed)


def _estimate(differences: Differences) -> Estimate:
    return statistics.estimate(list(differences.kept.values()), differences.resolution)


def _pair(sides: Sequence[Sequence[str]]) -> frozenset:
    """Which cells are compared: the same for both directions of one test."""
    signs = SIGNS[len(sides)]
    return frozenset(
        frozenset(frozenset(cells) for cells, its in zip(sides, signs, strict=True) if its == sign) for sign in (1, -1)
    )


def corrected(comparisons: list[Comparison], pairs: Sequence[Hashable] | None = None) -> list[Comparison]:
    """The same, as one family of tests. pairs: what each compares: two of one pair are one test. None: all differ."""
    pairs = range(len(comparisons)) if pairs is None else pairs
    tests = {pair: one.estimate.p for pair, one in zip(pairs, comparisons, strict=True)}
    adjusted = dict(zip(tests, statistics.holm([*tests.values()]), strict=True))
    return [dataclasses.replace(one, adjusted=adjusted[pair]) for pair, one in zip(pairs, comparisons, strict=True)]


def overall(outcomes: Iterable[str]) -> str:
    """Of several contrasts: what all of them say, and contradicted as soon as one is and none supports."""
    outcomes = set(outcomes)
    if outcomes == {"supported"}:
        return "supported"
    return "contradicted" if "contradicted" in outcomes and "supported" not in outcomes else UNKNOWN


def write_csv(path: Path, comparisons: list[Comparison]) -> Path:
    """One row for each comparison; seeds that were paired and refused are joined by spaces."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_row(one) for one in comparisons)
    return write_atomically(path, text.getvalue().encode())


def _row(one: Comparison) -> list:
    known, missing = one.estimate, (None, None)
    intervals = *(known.t_interval or missing), *(known.bootstrap_interval or missing)
    tests = known.p, one.adjusted, known.detectable, one.verdict
    seeds = (" ".join(map(str, found)) for found in (one.differences.kept, one.differences.refused))
    costs = ("" if math.isnan(value) else value for value in one.residuals.values())
    return [
        one.kind,
        one.name,
        one.against,
        known.n,
        known.mean,
        known.deviation,
        *intervals,
        *tests,
        *seeds,
        *costs,
        " ".join(one.differing),
    ]


def _compare(
    kind: str,
    name: str,
    against: str,
    sides,
    scores: Scores,
    planned: Mapping[str, dict],
    speeds: Mapping[str, float],
) -> Comparison:
    found = [[scores[cell] for cell in side] for side in sides]
    costs = residuals([[planned[cell] for cell in side] for side in sides])
    speed = faster([[speeds[cell] for cell in side] for side in sides])
    made = compare(kind, name, against, pairing.differences(found, SIGNS[len(sides)]), costs, speed)
    return dataclasses.replace(
        made, differing=differing([[planned[cell].get("fields", {}) for cell in s] for s in sides])
    )


def _against(contrast: Contrast) -> str:
    plus, minus, *rest = (
        ", ".join(f"{label} {_values(value)}" for label, value in side) or "all cells" for side in contrast.sides
    )
    return f"({plus}) - ({minus})" if not rest else f"[({plus}) - ({minus})] - [({rest[0]}) - ({rest[1]})]"


def _values(value) -> str:
    return " | ".join(map(str, value)) if isinstance(value, tuple) else str(value)
