import collections
import itertools
import random
import types

import matrix
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TESTS = [(f"{contract}[{row}]", contract, row) for contract, row in itertools.product("abcde", range(40))]
MANY = 600  # commits
Item = collections.namedtuple("Item", ("nodeid", "get_closest_marker"))
TESTS += [(f"few[{row}]", "few", row) for row in ("one", "two")]


@pytest.mark.slow
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_sample_has_some_of_every_contract(seed):
    drawn = [test for test in TESTS if test[0] in matrix.sample(TESTS, seed)]
    of = {contract: [row for _, c, row in drawn if c == contract] for _, contract, _ in TESTS}
    assert all(
        len(rows) >= max(matrix.FEWEST, 40 // matrix.ONE_IN) for contract, rows in of.items() if contract != "few"
    )
    assert len(of["few"]) >= matrix.FEWEST and len(drawn) < len(TESTS) / 2


def test_a_seed_draws_one_sample_and_seeds_together_draw_all():
    shuffled = random.Random(0).sample(TESTS, len(TESTS))
    assert matrix.sample(TESTS, 1) == matrix.sample(shuffled, 1) != matrix.sample(TESTS, 2)
    samples = [matrix.sample(TESTS, seed) for seed in range(MANY)]
    assert set.union(*samples) == {test for test, _, _ in TESTS}
    rows = [{row for test, _, row in TESTS if test in drawn} for drawn in samples]
    assert sum(map(len, rows)) / MANY > len(set.union(*rows)) / matrix.ROWS


def run(marks: dict[str, tuple[str, ...]], seed: int, drawn: str = "sample") -> set[str]:
    """The tests, each with its marks, that a commit of this seed runs."""
    at = lambda test: lambda name: name in marks[test] or None  # noqa: E731
    items = [Item(test, at(test)) for test in marks]
    hook = types.SimpleNamespace(pytest_deselected=lambda items: None)
    option = types.SimpleNamespace(matrix=drawn, matrix_seed=seed)
    matrix.pytest_collection_modifyitems(types.SimpleNamespace(option=option, hook=hook), items)
    return {item.nodeid for item in items}


def test_a_commit_runs_half_of_the_long_tests_and_all_others():
    marks = {f"long{i}": ("slow", "long") for i in range(7)}
    marks |= {"fast": (), "slow": ("slow",), "never": ("slow", "whole"), "never long": ("long", "whole")}
    samples = [run(marks, seed) for seed in range(60)]
    assert all(each - {f"long{i}" for i in range(7)} == {"fast", "slow"} and len(each) == 6 for each in samples)
    assert set.union(*samples) == {*marks} - {"never", "never long"}
    assert run(marks, 0, "all") == {*marks} and run({"long": ("long",)}, 0) == {"long"}
