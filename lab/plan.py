"""Prints what a study would train and what each cell would cost; trains nothing and reads no data.

python -m lab.plan --config=configs/rope_ablation.py [--json]
python -m lab.plan --config=configs/head_dim_ablation.py:paper --topology=v5e:2x2    # docs/scale.md
"""

import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from lab import command, runtime
from lab.errors import UserError, choose
from lab.study.numbers import short

COLUMNS = {
    "name": "cell",
    "parameters": "parameters",
    "parameters_non_embedding": "not embedding",
    "train_flops_per_token": "FLOPs / token",
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
OVER_DEVICES = (
    "attention work: numbers multiplied for a query, a key it sees and a layer, heads x (d_qk + d_v); cache: numbers "
    "per token and layer, on one device and on each of 2, 4, 8 tensor-parallel ones (—: the groups do not divide); "
    "copies at 8: how often 8 devices hold each number"
)
STATE = "; state: numbers per row and layer, however long the row"
MOVED = (
    "bytes: of the cache, per token of all layers; intensity: operations of attention for each number read or written, "
    "in orders of growth: of training on the study's batch, and of decoding so many rows to the length of a training "
    "row (—: a layer keeps a state)"
)
NAMED = 4  # cells of a line, where more cost the same


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__, "lab.plan")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--topology", metavar="CHIP:SIDES", help="compile the training step for a slice of TPUs, such as v5e:16x16"
    )
    parser.add_argument("--cell", metavar="NAME", help="that of this cell alone (default: of one cell of each program)")
    flags, config, overridden = command.parse(parser, argv)
    if flags.cell and not flags.topology:
        raise UserError(f"--cell={flags.cell} names a cell to compile; give a slice too, such as --topology=v5e:16x16")
    if flags.topology:
        on_slice(flags, config, overridden)
        return

    from lab.data.dataset import unnamed
    from lab.study.define import calibration
    from lab.study.open import open

    study = open(config, overridden)
    if study.config.run.auto_mesh:
        runtime.simulate_devices(config)
        runtime.open_devices()
        study = study.decide_mesh()
    config, rows = study.config, study.rows
    added = calibration.cost(config, study.cells, rows)
    if flags.json:
        about = {"study": config.study.name, "question": config.study.question}
        print(json.dumps(about | {"mesh": study.mesh or None, "cells": rows, "calibration": added}, indent=1))
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
    console = _console()
    console.print(table)
    console.print(over_devices(rows))
    console.print(moved(rows))
    for line in _trained(rows):
        console.print(line)
    for line in _matches(rows):
        console.print(line)
    console.print(f"{programs} training program{'s' * (programs > 1)} to compile")
    if study.mesh:
        console.print(f"mesh {study.mesh}")
    if added:
        console.print(
            f"calibration: {added['cell']} {config.study.calibrate} more times at every seed, {added['runs']} "
            f"runs of {added['tokens']:,} tokens and {short(added['train_flops'])} training FLOPs in all, "
            f"{added['share']:+.0%} of the study's own"
        )
    for line in dict.fromkeys(filter(None, (unnamed(cell.config) for cell in study.cells))):
        console.print(line)


def _console() -> Console:
    return Console(width=max(Console().width, 150), highlight=False, markup=False, emoji=False)


def on_slice(flags, config, overridden: tuple[str, ...]) -> None:
    """Prints what the training step of each program takes on a slice of TPUs."""
    from lab.slice import show, step

    of, say = step.open_slice(flags.topology), functools.partial(print, file=sys.stderr, flush=True)

    from lab.study.open import open

    study = open(config, overridden)
    if flags.cell:
        choose("--cell", flags.cell, [cell.name for cell in study.cells])
    programs: dict[str, list] = {}
    for cell, row in zip(study.cells, study.rows, strict=True):
        if flags.cell in (None, cell.name):
            programs.setdefault(row["executable"], []).append((cell, row))
    for cells in programs.values():  # refused before anything is compiled
        step.check(cells[0][0].config, of)
    every, console = [], _console()
    for number, cells in enumerate(programs.values(), 1):
        (cell, row), config = cells[0], cells[0][0].config
        say(f"compiling {cell.name} for {of.name} ({number} of {len(programs)})")
        found = show.described(config, of, step.compile_for(config, of, say), row, _keys(config))
        every.append({"cells": [cell.name for cell, _ in cells]} | found)
        if not flags.json:
            more = f" and {len(cells) - 1} more of its program" if len(cells) > 1 else ""
            for line in show.shown(f"{cell.name}{more}", found):
                console.print(line)
    if flags.json:
        print(json.dumps({"study": config.study.name, "programs": every}, indent=1))


def _keys(config) -> float:
    """That a query sees, the mean over layers."""
    from lab.model import abstract
    from lab.study.define.plan import visible_keys

    visible = [visible_keys(block.mixer.rule, config) for block in abstract(config.model, config.run).blocks]
    return sum(visible[layer % len(visible)] for layer in range(config.model.layers)) / config.model.layers


def over_devices(rows: list[dict]) -> Table:
    """What decoding costs: one line for all cells that cost the same."""
    stateful = any(row["state_per_layer"] for row in rows)
    columns = "attention work", "cache", "on 2", "on 4", "on 8", "copies at 8", *["state"] * stateful
    costs = {}
    for row in rows:
        found = row["attention_work"], *row["cache_per_device"].values(), row["cache_copies"]["8"]
        costs[row["name"]] = *map(_shown, found), *[_shown(row["state_per_layer"])] * stateful
    return _by_cost("Cache over devices", OVER_DEVICES + STATE * stateful, columns, costs)


def moved(rows: list[dict]) -> Table:
    """What memory has to carry: one line for all cells that cost the same."""
    decoded = list(rows[0]["intensity_decoding"])
    columns = "bytes", "intensity of training", *(f"of decoding {count}" for count in decoded)
    costs = {}
    for row in rows:
        found = row["intensity_training"], *(row["intensity_decoding"][count] for count in decoded)
        costs[row["name"]] = (
            _shown(row["cache_bytes_per_token"]),
            *("—" if each is None else f"{each:.1f}" for each in found),
        )
    return _by_cost("Bytes and arithmetic intensity", MOVED, columns, costs)


def _by_cost(title: str, caption: str, columns: Sequence[str], costs: Mapping[str, tuple[str, ...]]) -> Table:
    """A line for all cells of {cell: costs} that cost the same."""
    alike: dict[tuple, list[str]] = {}
    for name, shown in costs.items():
        alike.setdefault(shown, []).append(name)
    table = Table(title=title, caption=caption, show_lines=len(alike) < len(costs))
    table.add_column("cell", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for shown, names in alike.items():
        one_line = f"all {len(costs)} cells" if len(names) > 1 else names[0]
        table.add_row(_listed(names) if len(alike) > 1 else one_line, *shown)
    return table


def _listed(names: list[str]) -> str:
    more = len(names) - NAMED + 1
    return "\n".join(names if more <= 1 else [*names[: NAMED - 1], f"and {more} more"])


def _trained(rows: list[dict]) -> Iterator[str]:
    """A line for all cells that train the same part of their weights."""
    alike: dict[tuple, list[str]] = {}
    for row in rows:
        if (trained := row["parameters_trained"]) != row["parameters"]:
            alike.setdefault((trained, row["parameters"]), []).append(row["name"])
    for (trained, every), names in alike.items():
        yield f"{', '.join(names)}: {trained:,} of {every:,} parameters are trained ({trained / every:.2%})"


def _matches(rows: list[dict]) -> Iterator[str]:
    """A line for everything that was solved, with how far off it stayed."""
    from lab.study.define import matching

    for row in rows:
        for match in [*row["match"], *filter(None, [row["length"]])]:
            if match["to"] != row["name"]:
                flag = f", not within {matching.TOLERANCE:.1%}: no value is nearer" if matching.missed(match) else ""
                value, off = f"{match['by']} = {match['value']:,}", f"{match['residual']:+.3%}"
                yield f"{row['name']}: {value} matches {match['on']} of {match['to']} but for {off}{flag}"


def _shown(value) -> str:
    if value is None:
        return "—"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


if __name__ == "__main__":
    command.run(main)
