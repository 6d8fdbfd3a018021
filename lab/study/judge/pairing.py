"""Which runs may be subtracted from each other: those of one seed that differ in nothing but what is studied."""

import dataclasses
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence

from lab.study.evaluations import LOSS
from lab.study.judge.statistics import resolution
from lab.study.measure import NATS, Measure
from lab.study.results import Outcome, Results

ASKED_ON = ("platform", "device_kind", "devices", "implementation", "jax", "jaxlib")  # of an evaluation


@dataclasses.dataclass(frozen=True)
class Score:
    """A finished run: the mean of its losses over the judged conditions, those conditions, and what a loss is: nats per
    token, or bits per byte where tokenizers differ."""

    run: Outcome
    loss: float
    conditions: tuple
    measure: Measure = NATS

    def fact(self, name: str):
        """What the run says of itself; False for what it does not mention."""
        return (self.run.result["environment"] | self.run.result).get(name, False)


@dataclasses.dataclass(frozen=True)
class Differences:
    """By seed: the differences, in the measure, and why the others were refused. Unfinished seeds are in neither.

    resolution: the step between float32 losses as large as the largest that was subtracted.
    """

    kept: dict[int, float]
    refused: dict[int, str]
    resolution: float = 0.0
    measure: Measure = NATS


Scores = dict[str, dict[int, Score]]  # {name of a cell: {seed: score}}


def scores(study: Results, judged: Sequence) -> Scores:
    """Of all finished runs; `judged` conditions, or all of them if it is empty."""
    found: Scores = {cell["name"]: {} for cell in study.plan["cells"]}
    for run in study.runs:
        if run.rows():
            losses = {row[study.condition]: row[study.measure.column] for row in run.rows()}
            kept = {condition: loss for condition, loss in losses.items() if not judged or condition in judged}
            mean = statistics.fmean(kept.values()) if kept else math.nan
            found[run.cell["name"]][run.seed] = Score(run, mean, tuple(kept), study.measure)
    return found


def differences(sides: Sequence[Sequence[Mapping[int, Score]]], signs: Sequence[int]) -> Differences:
    """The signed sum over sides of the mean over each side's cells, at every seed that all of them have finished."""
    cells = [cell for side in sides for cell in side]
    kept, refused, largest, measure = {}, {}, 0.0, NATS
    for seed in sorted(set.intersection(*(set(cell) for cell in cells))):
        reason = next(filter(None, (mismatch(cells[0][seed], cell[seed]) for cell in cells)), "")
        if reason:
            refused[seed] = reason
        else:
            means = [statistics.fmean(cell[seed].loss for cell in side) for side in sides]
            kept[seed] = sum(sign * mean for sign, mean in zip(signs, means, strict=True))
            largest, measure = max(largest, *(abs(cell[seed].loss) for cell in cells)), cells[0][seed].measure
    return Differences(kept, refused, resolution(largest), measure)


def mismatch(one: Score, other: Score) -> str:
    """Why two runs of a seed must not be paired: the field and both its values; "" if they may."""
    for score in (one, other):
        if not math.isfinite(score.loss):
            return f"loss of {score.run.cell['name']} is {score.loss} over conditions {score.conditions}"
    if unlike := _other_units(one, other):
        return unlike
    if unlike := _other_segments(one.fact("segments") or [], other.fact("segments") or []):
        if unlike.startswith("vmapped"):  # what is left of a stack that lost a member is none of the same size again
            return f"{unlike}; to compare them, train each alone: study.vmap = 'none', in a --workdir of its own"
        place = shlex.quote(f"{other.run.cell['directory']}/seed-{other.run.seed}")
        return f"{unlike}; to make it again: rm -r {place} in the study's directory, and the study's command"
    asked = [(score.run.asked.get(LOSS) or {}).get("environment", {}) for score in (one, other)]
    for field in ASKED_ON:
        if asked[0].get(field) != asked[1].get(field):
            return f"{field} where they were asked: {asked[0].get(field)} and {asked[1].get(field)}"
    if one.conditions != other.conditions:
        return f"conditions: {one.conditions} and {other.conditions}"
    if unlike := _other_data(one, other):
        return unlike
    if not _same_order(one, other):
        return f"text_hash: {one.fact('text_hash')} and {other.fact('text_hash')}"
    return ""


def _other_units(one: Score, other: Score) -> str:
    """Why the numbers of two runs are of different things; "" if they are not."""
    if one.measure != other.measure:
        return f"judged in {one.measure.unit} and {other.measure.unit}"
    tokenizers = [score.run.cell.get("fields", {}).get("data.tokenizer") for score in (one, other)]
    if one.measure is NATS and None not in tokenizers and tokenizers[0] != tokenizers[1]:
        return f"data.tokenizer: {tokenizers[0]} and {tokenizers[1]}, and losses are per token"
    return ""


def _other_segments(ours: Sequence[dict], theirs: Sequence[dict]) -> str:
    """How the ways in which two runs were made differ; "" if they do not, and so their bits may be compared."""
    steps = [[one["first_step"] for one in segments] for segments in (ours, theirs)]
    if steps[0] != steps[1]:
        return f"segments from steps {', '.join(map(str, steps[0]))} and {', '.join(map(str, steps[1]))}"
    for mine, other in zip(ours, theirs, strict=True):
        for field in mine | other:
            if mine.get(field) != other.get(field):
                return f"{field} from step {mine['first_step']} on: {mine.get(field)} and {other.get(field)}"
    return ""


def _other_data(one: Score, other: Score) -> str:
    """Which texts of two runs were others; "" if none were. A study of several tokenizers, which is judged in bits per
    byte, was not begun unless all cells read the same texts."""
    if one.measure is not NATS:
        return ""
    asked = [(score.run.asked.get(LOSS) or {}).get("parts", {}).get("data") for score in (one, other)]
    if asked[0] != asked[1]:
        return f"validation texts: {asked[0]} and {asked[1]}"
    read = [score.fact("data") for score in (one, other)]
    if _reads_none(one, other) or False in read or read[0] == read[1]:  # False: a result that does not tell
        return ""
    return f"training texts: {read[0]} and {read[1]}"


def _reads_none(one: Score, other: Score) -> bool:
    """Whether one of them is asked with the weights of its checkpoint."""
    return 0 in (score.run.result.get("tokens") for score in (one, other))


def _same_order(one: Score, other: Score) -> bool:
    """The same numbers of texts in the same order, as far as the shorter run goes: runs matched by FLOPs differ in
    length."""
    if _reads_none(one, other):
        return True
    if one.fact("text_hash") == other.fact("text_hash") is not False:
        return True
    hashes = [[line.get("text_hash") for line in score.run.metrics] for score in (one, other)]
    shared = min(map(len, hashes))
    differ_in_length = shared < max(map(len, hashes))
    return bool(shared and differ_in_length and None not in hashes[0] and hashes[0][:shared] == hashes[1][:shared])
