"""The part of a report for each further ask: what was found, cell by condition."""

from lab.study.judge import documents
from lab.study.judge.residuals import beside
from lab.study.numbers import number
from lab.study.report import costs, decoding, lengths, questions
from lab.study.report.page import Piece, Section, Table
from lab.study.results import Results


def sections(study: Results) -> list[Section]:
    """One for each ask beside the one named loss that any run has answered, titled by its name; those of methods over
    lengths, those that decode and those of questions are told together, where the study has that section."""
    named = {entry if isinstance(entry, str) else entry[0] for entry in study.plan["sections"]}
    told = [*(documents.long_asks(study) if lengths.NAME in named else ())]
    told += decoding.asks(study) if decoding.NAME in named else ()
    told += questions.told(study) if questions.NAME in named else ()
    asks = {name: column for name, column in study.further_asks.items() if name not in told}
    found = [Section(name, _table(study, name, column)) for name, column in asks.items()]
    return [section for section in found if section.blocks]


def _table(study: Results, name: str, column: str) -> list[Piece]:
    frame = study.answers(name)
    if frame.empty:
        return []
    means, beside_them = frame.groupby(["cell", column])[study.measure.column].mean(), beside(study)
    every = list(dict.fromkeys(frame[column]))
    rows = [
        [
            *map(str, study.key(cell)),
            *(number(means.get((cell["name"], value)), 4) for value in every),
            *beside_them.cells[study.key(cell)],
        ]
        for cell in study.plan["cells"]
        if cell["name"] in set(frame["cell"])
    ]
    caption = f"Loss ({study.measure.unit}) by {column}: means over seeds."
    table = Table([*study.labels, *map(str, every), *beside_them.columns], rows, caption, sortable=True)
    return [table, costs.common(study)]
