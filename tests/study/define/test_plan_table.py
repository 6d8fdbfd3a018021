"""The printed plan: what decoding costs over devices, one line for all cells that cost the same."""

import pytest
import tiny
from rich.console import Console

from lab import model as lab_model
from lab import plan as command
from lab.study.define import plan
from lab.study.define.cell import Cell


def row(name, state=0, **overrides):
    model = lab_model.abstract(tiny.config(**overrides).model)
    costs = {"attention_work": 64, "cache_per_token_per_layer": 32, "state_per_layer": state}
    return {"name": name, **costs, **plan.over_devices(model)}


def printed(rows, table=command.over_devices):
    console = Console(width=150)
    with console.capture() as captured:
        console.print(table(rows))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in captured.get().splitlines() if "│" in line]
    return lines, captured.get()


def test_cells_that_cost_the_same_share_a_line():
    rows = [row("a"), row("b"), row("one group", model__mixer__kv_heads=1)]
    lines, text = printed(rows)
    assert lines == [["a", "64", "32", "16", "16", "16", "4"], ["b", *[""] * 6], ["one group", "64", *["16"] * 4, "8"]]
    assert "state" not in text


def test_a_study_whose_cells_all_cost_the_same_is_one_line():
    assert printed([row(str(number)) for number in range(9)])[0] == [["all 9 cells", "64", "32", *["16"] * 3, "4"]]
    assert printed([row("alone")])[0][0][0] == "alone"


def test_long_lists_of_names_are_cut():
    rows = [*(row(f"cell {number}") for number in range(6)), row("other", model__mixer__kv_heads=1)]
    assert [line[0] for line in printed(rows)[0]] == ["cell 0", "cell 1", "cell 2", "and 3 more", "other"]


def test_groups_that_do_not_divide_are_dashes():
    (line,) = printed([row("three groups", model__mixer__heads=6, model__mixer__kv_heads=3)])[0]
    assert line == ["three groups", "64", "48", "—", "—", "—", "—"]


@pytest.mark.parametrize("states", [(0, 1024), (1024, 1024)])
def test_a_recurrent_state_has_its_column(states):
    lines, text = printed([row(f"state {place}", state) for place, state in enumerate(states)])
    assert {line[-1] for line in lines} == {f"{state:,}" for state in states}
    assert "numbers per row and layer" in " ".join(text.split())


def test_bytes_and_intensities_have_a_line_for_cells_that_share_them():
    one = {"cache_bytes_per_token": 1536, "intensity_training": 12.34, "intensity_decoding": {"1": 0.96, "64": 7.0}}
    stateful = one | {"intensity_decoding": {"1": None, "64": None}}
    rows = [{"name": name} | costs for name, costs in (("a", one), ("b", one), ("delta", stateful))]
    lines, text = printed(rows, command.moved)
    assert lines[0] == ["a", "1,536", "12.3", "1.0", "7.0"] and lines[-1] == ["delta", "1,536", "12.3", "—", "—"]
    assert [line[0] for line in lines] == ["a", "b", "delta"] and "of decoding 64" in text


@pytest.mark.parametrize("over", [{}, {"model__lora__rank": 2}, {"train__freeze": ("embedding",)}], ids=str)
def test_a_cell_is_named_by_the_program_that_trains_it(over):
    """Another one where a part of the model is trained, and so a tree of other kinds of weights."""
    config = tiny.config(model__vocabulary=258, **over)
    assert plan.describe(Cell("one", {}, config))["executable"] == plan.program(config)
