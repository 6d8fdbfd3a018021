"""The report on probes: which share of the answers each cell gives right, by difficulty."""

from lab.study.report.page import Piece, Table, Text
from lab.study.results import Results


def section(study: Results) -> list[Piece]:
    """Accuracy by cell and condition, the mean over the seeds that are done."""
    frame = study.results
    if "accuracy" not in frame.columns:
        return [Text("No accuracy has been recorded yet.")]
    means = frame.groupby(["cell", study.condition])["accuracy"].mean()
    every = list(dict.fromkeys(frame[study.condition]))
    rows = [
        [*map(str, study.key(cell)), *(f"{means[cell['name'], value]:.1%}" for value in every)]
        for cell in study.plan["cells"]
        if cell["name"] in means
    ]
    caption = f"Share of answers that are right, by {study.condition}: means over seeds."
    return [Table([*study.labels, *map(str, every)], rows, caption)]
