"""What long documents say of methods and cells: differences paired document by document, and what they make of claims.

A method is an ask of the kind `length` with its overrides; what is asked of retrieval under the same overrides is the
method's too. Every (cell, method) is compared with the plain model of the first cell, on the documents of both.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from lab.options import tuples
from lab.study.evaluations import LOSS
from lab.study.judge.evidence import UNKNOWN
from lab.study.judge.statistics import LEVEL, Estimate, estimate, holm, resolution
from lab.study.results import Results

PARTS = ("all", "within", "beyond", "sliding", "exact")
HYBRID = {"position.map.name", "position.map.cf"}  # what a plain hybrid overrides, besides its rounding
BESIDE = {"trained", "length", "unselected"}  # fields of a position that are no method
SAME = 1e-4  # nats per token: a mean difference up to that is none
ROUNDING = 1e-6  # of the nats per token of one and the same text, summed in another order
LEAST = 10  # documents that say anything: with fewer there is a mean, and no interval, test or verdict

Arm = tuple[str, str]  # (name of a cell, name of a method)


@dataclasses.dataclass(frozen=True)
class Method:
    """An ask of lengths, and the one of retrieval under the same overrides, if there is one."""

    name: str
    overrides: dict
    lengths: tuple[int, ...]
    retrieval: str | None

    @property
    def cf(self) -> float | None:
        """Of a hybrid that does nothing else; None of other methods."""
        aside = {"position.map.rounding", *(f"position.{field}" for field in BESIDE)}
        plain = {*self.overrides} - aside == HYBRID
        rounded = self.overrides.get("position.map.rounding", "none") != "none"
        hybrid = plain and not rounded and self.overrides["position.map.name"] == "hybrid"
        return float(self.overrides["position.map.cf"]) if hybrid else None


@dataclasses.dataclass(frozen=True)
class Paired:
    """An arm less another, over the documents of both. Below 0 it loses less; of `exact`, above 0 it answers more."""

    arm: Arm
    length: int
    part: str
    estimate: Estimate
    adjusted: float | None = None

    @property
    def verdict(self) -> str:
        """better | worse | same | cannot tell, and of too few documents how many there are."""
        if 0 < self.estimate.n < LEAST:
            return f"{UNKNOWN} ({self.estimate.n} document{'s' * (self.estimate.n > 1)})"
        if self.part != "exact" and self.estimate.n and abs(self.estimate.mean) <= SAME:
            return "same"
        if self.adjusted is None or self.adjusted >= LEVEL:
            return UNKNOWN
        return "better" if (self.estimate.mean < 0) == (self.part != "exact") else "worse"


def methods(study: Results) -> list[Method]:
    """In the order of the config: the plain one first, which overrides nothing of the position."""
    asked = study.plan["config"].get("evaluate", {})
    overrides = lambda name: dict(tuples(asked[name].get("model") or ()))  # noqa: E731
    of_retrieval = {repr(overrides(name)): name for name in asked if asked[name].get("kind") == "retrieval"}
    found = [
        Method(name, overrides(name), tuple(one["lengths"]), of_retrieval.get(repr(overrides(name))))
        for name, one in asked.items()
        if one.get("kind") == "length"
    ]
    return sorted(found, key=lambda method: any(field.startswith("position.") for field in method.overrides))


def long_asks(study: Results) -> set[str]:
    """The asks that methods are made of."""
    return {name for method in methods(study) for name in (method.name, method.retrieval) if name}


def rows(study: Results, cell: str, ask: str) -> dict[int, dict]:
    """{length: row}, numbers being means over the seeds that are done."""
    by_length: dict[int, list[dict]] = {}
    for run in study.runs_by_cell[cell]:
        for row in run.rows(ask):
            by_length.setdefault(row["length"], []).append(row)
    return {length: _mean(found) for length, found in by_length.items()}


def by_document(study: Results, cell: str, ask: str, length: int, part: str) -> tuple[str, np.ndarray] | None:
    """(digest of the documents, numbers [n], the mean over seeds): nats per token of a part of every document; of
    `exact`, whether the answer was right. None where that was not asked, or nothing is done."""
    found, texts = [], set()
    for run in study.runs_by_cell[cell]:
        kept = (run.asked.get(ask) or {}).get("documents", ()) if run.rows(ask) else ()
        one = next((entry for entry in kept if entry["length"] == length), None)
        numbers = None if one is None else _numbers(one, part)
        if numbers is not None:
            found.append(numbers)
            texts |= {row["texts"] for row in run.rows(ask) if row["length"] == length}
    return (" ".join(sorted(texts)), np.mean(found, axis=0)) if found and len(texts) == 1 else None


def compare(study: Results) -> list[Paired]:
    """Every arm less the plain model of the first cell, at every length and in every part, as one family of tests."""
    every, cells = methods(study), [cell["name"] for cell in study.plan["cells"]]
    if not every:
        return []
    plain, found = every[0], []
    for cell in cells:
        for method in every:
            for length in method.lengths:
                for part in PARTS:
                    asks = [one.retrieval if part == "exact" else one.name for one in (method, plain)]
                    if (cell, method.name) != (cells[0], plain.name) and all(asks):
                        found.append(between(study, (cell, asks[0]), (cells[0], asks[1]), length, part, method.name))
    return corrected(found)


def corrected(found: list[Paired]) -> list[Paired]:
    """As one family, in which each test counts once, however often it stands there.

    A text of at most L tokens lies within L; what is within L saw nothing of how long its text is; one window over the
    longest documents is their one pass; and two methods may be one, as NTK-aware and dynamic frequencies of one length.
    """
    first = [next(i for i, other in enumerate(found) if one is other or _same_test(one, other)) for one in found]
    once = list(dict.fromkeys(first))
    adjusted = dict(zip(once, holm([found[i].estimate.p for i in once]), strict=True))
    return [dataclasses.replace(one, adjusted=adjusted[i]) for one, i in zip(found, first, strict=True)]


def _same_test(one: Paired, other: Paired) -> bool:
    """Whether both are of the same losses. Answers may be alike by chance: they are right or wrong, and few."""
    ours, theirs = one.estimate.values, other.estimate.values
    if "exact" in (one.part, other.part) or not ours or len(ours) != len(theirs):
        return False
    return bool(np.allclose(ours, theirs, rtol=0, atol=ROUNDING))


def between(study: Results, arm: Arm, other: Arm, length: int, part: str, name: str = "") -> Paired:
    """One arm less another, before correction; without a number where they read other documents, and with a mean alone
    where these are too few, or weights were trained apart: they differ by the luck of seeds, of which documents tell
    nothing."""
    ours, theirs = (by_document(study, *one, length, part) for one in (arm, other))
    paired = ours is not None and theirs is not None and ours[0] == theirs[0]
    differences = ours[1] - theirs[1] if paired else []
    step = resolution(float(np.mean(ours[1]))) if paired and part != "exact" else 0.0
    few = 0 < len(differences) < LEAST
    apart = arm[0] != other[0] and any(
        run.result and run.result["tokens"] for cell in (arm[0], other[0]) for run in study.runs_by_cell[cell]
    )
    untested = few or (apart and len(differences))
    found = Estimate(len(differences), float(np.mean(differences))) if untested else estimate(differences, step)
    return Paired((arm[0], name or arm[1]), length, part, found)


def best_cf(study: Results, cell: str, length: int) -> Method | None:
    """The hybrid of the lowest loss, or the plain model."""
    losses = {}
    for method in hybrids(study):
        if length in (found := rows(study, cell, method.name)):
            losses[method.name] = found[length]["loss"]
    return next((m for m in hybrids(study) if m.name == min(losses, key=losses.get)), None) if losses else None


def hybrids(study: Results) -> list[Method]:
    """The plain model, which is cf 1, and the hybrids by their cf."""
    every = methods(study)
    return [*every[:1], *sorted((one for one in every if one.cf is not None), key=lambda one: one.cf)]


def cf(method: Method) -> float:
    """Of a plain model 1."""
    return 1.0 if method.cf is None else method.cf


def phase(name: str) -> str:
    """What timings.csv calls an ask."""
    return "eval" if name == LOSS else name


def _numbers(kept: Mapping, part: str) -> np.ndarray | None:
    if part == "exact":
        return np.ravel(kept["exact"]).astype(float) if "exact" in kept else None
    if "edges" not in kept:
        return None
    if part == "sliding":
        return np.array(kept["sliding"]) / kept["sliding_tokens"] if kept.get("sliding_tokens") else None
    span = {"all": slice(None), "within": slice(1), "beyond": slice(1, None)}[part]
    tokens = sum(kept["tokens"][span])
    return np.array(kept["nats"])[:, span].sum(1) / tokens if tokens else None


def _mean(found: Sequence[dict]) -> dict:
    """Of rows of several seeds."""
    numbers = {name for row in found for name, value in row.items() if isinstance(value, int | float)}
    means = {
        name: statistics.fmean(row[name] for row in found if row.get(name) is not None)
        for name in numbers
    }  # fmt: skip
    return found[0] | means
