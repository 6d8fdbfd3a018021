"""The comparisons of a study at each condition, beside the mean that they are judged by."""

from lab.study.judge import evidence
from lab.study.judge.evidence import Comparison
from lab.study.report.page import Piece, Table, Text
from lab.study.report.verdicts import interval, signed
from lab.study.results import Results


def section(study: Results) -> list[Piece]:
    """Paired differences with their 95% intervals: a row for each contrast, and for each cell with a baseline."""
    every = [] if study.results.empty else list(dict.fromkeys(study.results[study.condition]))
    found = [evidence.find(study, (condition,)) for condition in every]
    if not all(found) or not found:
        return [Text("No comparison has finished yet.")]
    columns = [{(one.kind, one.name): one for one in findings.comparisons} for findings in found]
    rows = [
        [name, *(_shown(column[kind, name]) for column in columns), str(columns[-1][kind, name].estimate.n)]
        for kind, name in columns[0]
    ]
    caption = (
        f"Differences in {study.measure.unit} by {study.condition}, with 95% intervals (Student t, paired over seeds, "
        "each by itself and not corrected); below 0 the first side is better. Bold: the interval is without 0."
    )
    return [Table(["comparison", *map(str, every), "seeds"], rows, caption)]


def _shown(one: Comparison) -> str:
    bounds = one.estimate.t_interval
    shown = signed(one.estimate.mean) + (f" {interval(bounds)}" if bounds else "")
    return f"**{shown}**" if bounds and bounds[0] * bounds[1] > 0 else shown
