"""Prints what a study would train and what each cell would cost; trains nothing and reads no data.

python -m lab.plan --config=configs/rope_ablation.py [--json]
"""

import json
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from lab import command

COLUMNS = {
    "name": "cell",
    "parameters": "parameters",
    "parameters_non_embedding": "not embedding",
    "train_flops_per_token": "FLOPs/token",
    "cache_per_token_per_layer": "cache",
    "tokens": "tokens",
    "executable": "program",
    "head_dim": "head dim",
    "pairs_branch": "branch",
    "pairs_time": "time",
    "pairs_index": "index",
}


CAPTION = (
    "FLOPs of one token in a training step; cache: numbers per token and layer; program: cells of one name share one "
    "compilation; branch, time, index: rotary pairs of a head that carry them"
)


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags, config, overridden = command.parse(parser, argv)

    from lab.study import cells as study_cells
    from lab.study import plan

    rows = plan.table(config, study_cells.resolve(config, overridden))
    if flags.json:
        print(json.dumps({"study": config.study.name, "question": config.study.question, "cells": rows}, indent=1))
        return
    title = f"{config.study.name}: {config.study.question} {len(rows)} cells, seeds of each: {config.study.seeds}"
    table = Table(title=title, caption=CAPTION)
    for name in COLUMNS:
        table.add_column(
            COLUMNS[name], justify="left" if name in ("name", "executable") else "right", no_wrap=name == "name"
        )
    for row in rows:
        table.add_row(*(_shown(row[name]) for name in COLUMNS))
    programs = len({row["executable"] for row in rows})
    console = Console(width=max(Console().width, 150), highlight=False)
    console.print(table)
    for line in _matches(rows):
        console.print(line)
    console.print(f"{programs} training program{'s' * (programs > 1)} to compile")


def _matches(rows: list[dict]) -> Iterator[str]:
    """A line for everything that was solved, with how far off it stayed."""
    from lab.study import matching

    for row in rows:
        for match in [*row["match"], *filter(None, [row["length"]])]:
            if match["to"] != row["name"]:
                flag = f", not within {matching.TOLERANCE:.1%}: no value is nearer" if matching.missed(match) else ""
                value, off = f"{match['by']} = {match['value']:,}", f"{match['residual']:+.3%}"
                yield f"{row['name']}: {value} matches {match['on']} of {match['to']} but for {off}{flag}"


def _shown(value) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


if __name__ == "__main__":
    command.run(main)
