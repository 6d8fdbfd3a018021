"""The part of a report on branches that were decoded in parallel: maps, by share of rotary pairs and by their number,
of what they are worth to the model itself, and of how much leaks from branch to branch."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pandas as pd

from lab.study.numbers import number
from lab.study.report import figures, live
from lab.study.report.layout import arrange, panel_rows
from lab.study.report.page import Chart, Heading, Piece, Table, Text
from lab.study.results import Results

NAME = "decoding"  # in SECTIONS, and the kind of the asks that it tells of


class Map(NamedTuple):
    """What is drawn of a column: what it is, and the format of its numbers."""

    told: str
    format: str = ".2f"


MAPS = {
    "loss": Map("Loss of generated tokens as they were drawn, beside the other branches (nats per token)"),
    "loss_alone": Map("Loss of the same tokens, each branch read alone as an ordinary text (nats per token)"),
    "cost": Map("What decoding in parallel costs: the loss alone less that in parallel (nats per token)"),
    "attention_on_others": Map("Share of attention that generated tokens give to other branches"),
    "swap_kl": Map("KL of next tokens before and after the text of one other branch is swapped (nats)", ".2g"),
}


def section(ratio: str, draw: str) -> Callable[[Results], list[Piece]]:
    """The section of a study with these labels."""
    return functools.partial(_section, ratio, draw)


def asks(study: Results) -> list[str]:
    """The asks of a study that decode."""
    asked = study.plan["config"].get("evaluate", {})
    return [name for name in study.further_asks if asked.get(name, {}).get("kind") == NAME]


def _section(ratio: str, draw: str, study: Results) -> list[Piece]:
    blocks: list[Piece] = []
    for name in asks(study):
        frame = study.answers(name)
        if not frame.empty:
            frame = frame.assign(cost=frame["loss_alone"] - frame["loss"])
            blocks += [Heading(name), Text(_measured(study, name)), *_maps(ratio, draw, study, name, frame)]
            blocks.append(_table(study, name, frame))
    return blocks or [Text("Nothing has been decoded yet.")]


def _measured(study: Results, name: str) -> str:
    asked = study.plan["config"]["evaluate"][name]
    begun = {
        "shared": f"went on from one prompt, the first {asked['prompt_tokens']} tokens of a validation text",
        "own": f"began each with the first {asked['prompt_tokens']} tokens of a validation text of its own",
    }[asked["prompt"]]
    return (
        f"{asked['texts']} groups of branches {begun}, and generated {asked['new_tokens']} tokens a branch at "
        f"temperature {asked['temperature']:g}: the same texts and random numbers for every cell. At temperature 1 the "
        "loss alone less that in parallel is in the mean the KL divergence, per token, of how the model goes on in "
        "parallel from how it goes on alone. Attention is a mean over layers, heads and generated tokens; given "
        "evenly, nearly (n - 1) / n of it would go to the others of n branches. A swap is of one branch, for that of "
        "another group: it is one of many at high counts. At one branch there is no other."
    )


def _maps(ratio: str, draw: str, study: Results, name: str, frame: pd.DataFrame) -> list[Piece]:
    axis, found = study.further_asks[name], []
    for column, of in MAPS.items():
        means = _means(study, frame, axis, column)
        if not means:
            continue
        panels = panel_rows({t: p for row in arrange(study, means, ratio, rows_by=draw) for t, p in row.items()})
        drawn = panels, ratio, axis, of.format
        caption = f"{of.told}: means over seeds{_spread(study, frame, axis, column)}; dark is lower."
        found.append(Chart(f"{name}_{column}", figures.png(figures.heat_maps(*drawn)), caption, live.heat_maps(*drawn)))
    return found


def _means(study: Results, frame: pd.DataFrame, axis: str, column: str) -> Mapping[tuple, dict[int, float]]:
    """{cell: {branches: mean over seeds}}, of what is known."""
    of_cell = frame.astype({column: float}).dropna(subset=column).groupby(["cell", axis])[column].mean()
    every = {study.key(cell): of_cell.get(cell["name"]) for cell in study.plan["cells"] if cell["name"] in of_cell}
    return {key: curve.to_dict() for key, curve in every.items()}


def _spread(study: Results, frame: pd.DataFrame, axis: str, column: str) -> str:
    """Their standard deviation over seeds, pooled; "" of one seed."""
    variances = frame.astype({column: float}).groupby(["cell", axis])[column].var().dropna()
    return f" (standard deviation {variances.mean() ** 0.5:.2g})" if len(variances) else ""


def _table(study: Results, name: str, frame: pd.DataFrame) -> Table:
    axis = study.further_asks[name]
    counts, rows = sorted({*frame[axis]}), []
    for column in MAPS:
        for key, curve in _means(study, frame, axis, column).items():
            rows.append([column, *map(str, key), *(number(curve.get(count), 4) for count in counts)])
    columns = ["measure", *study.labels, *map(str, counts)]
    return Table(columns, rows, f"The same numbers by {axis}", sortable=True, folded=True)
