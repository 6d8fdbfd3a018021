"""The part of a report that tells what its verdicts are worth: false ones among equals, and the smallest effect."""

from lab.study.judge import calibration
from lab.study.judge.calibration import Calibration
from lab.study.judge.evidence import Findings
from lab.study.judge.statistics import LEVEL
from lab.study.numbers import number
from lab.study.report.page import Piece, Table, Text
from lab.study.results import Results, outcomes

MORE = (1, 2, 4)  # times as many seeds


def section(study: Results, findings: Findings | None) -> list[Piece]:
    """Nothing for a study that is not calibrated."""
    repeats = study.plan.get("calibration", [])
    if not repeats:
        return []
    states = [run.status for run in outcomes(study.directory, repeats)]
    told = (
        f"Nothing differs here: {repeats[0]['cell']} was run {len(repeats)} more times at each of its seeds, on the "
        f"same texts from other initial values ({states.count('done')} of {len(states)} runs done"
        + f", {states.count('failed')} failed" * ("failed" in states)
        + ")."
    )
    if "pending" in states:
        return [Text(f"{told} **Verdicts are tried once all are done.**")]
    found = calibration.calibrate(calibration.pool(study), max(1, len(findings.comparisons) if findings else 0))
    if found is None:
        return [Text(f"{told} **Fewer than two seeds have two runs that may be paired**, so that nothing can be told.")]
    return [Text(told), Text(_false_verdicts(found)), _effects(found, study.measure.unit)]


def _false_verdicts(found: Calibration) -> str:
    low, high = found.interval
    several = f"{found.comparisons} comparisons" if found.comparisons > 1 else "one comparison"
    return (
        f"**{found.share:.1%} of {found.studies} pseudo-studies have a false verdict** (95% interval {low:.1%} to "
        f"{high:.1%}, Clopper-Pearson), where at most {LEVEL:.0%} are promised: {_judged(low, high)} Each is drawn "
        f"from these runs, has {several} over {found.seeds} seeds, pairs runs of one seed, and is judged as the "
        "study is. Each repeat of a run adds but a few of them, as more would share runs and promise too much."
    )


def _judged(low: float, high: float) -> str:
    if low > LEVEL:
        return "**more than promised, so do not trust the verdicts.**"
    return "the promise is kept." if high <= LEVEL else "nothing speaks against it."


def _effects(found: Calibration, unit: str) -> Table:
    families = (1, found.comparisons) if found.comparisons > 1 else (1,)
    rows = [
        [str(seeds), *(number(found.detectable(seeds, family), 4) for family in families)]
        for seeds in (found.seeds * more for more in MORE)
    ]
    columns = ["seeds", "smallest effect", *(f"as the smallest of {family} comparisons" for family in families[1:])]
    caption = (
        f"Smallest effect: the difference, in {unit}, that so many seeds find 4 times in 5, if two runs of one "
        f"seed differ by chance as these do (standard deviation {found.deviation:.4f}). Cells that begin with the same "
        "weights may differ by less."
    )
    return Table(columns, rows, caption)
